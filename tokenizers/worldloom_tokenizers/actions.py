"""Action tokenizers: actions of any space to integer tokens and back.

Numbers become tokens in one of two ways. *Binned*: every column has bins of its own, uniform or of equal counts
(RT-1, Brohan et al. 2022, arXiv:2212.06817; OpenVLA, Kim et al. 2024, arXiv:2406.09246, both 256 uniform ones). *FSQ*:
columns are scaled to the levels of finite scalar quantisation (`worldloom_tokenizers.fsq`), and several columns share a
token. Choices (discrete spaces) map exactly.

An action is a float vector as `worldloom curate record` stores it: Discrete one-hot; MultiDiscrete, MultiBinary and Box
their entries in C order; Tuple its parts in order; Dict its parts in the order of ``space.spaces``, which Gymnasium
sorts by key. A tokenizer is a row of parts, one for each stretch of columns, and tokens come in the order of the parts.

After a round trip a number is off by at most half its bin (`ActionCodec.error_bound`), rounding to float32 aside.
Values outside the range are refused, or with ``clip=True`` moved to its border; `ActionCodec.outside` says how many.

Letters: b batch, T steps, a action columns, n tokens of an action, m any number of actions, k columns of a part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldloom import config as configs
from worldloom.artifacts import atomic_dir
from worldloom.errors import WorldloomError, missing_extra
from worldloom.weights import read_weights, write_weights
from worldloom_tokenizers import fsq

_UNBOUNDED = 1e6  # a Box at least this wide says nothing about the values in it


@dataclass(frozen=True)
class Part:
    """A stretch of columns that is tokenised in one way."""

    kind: Literal["choice", "integers", "binned", "fsq"]
    """``choice``: one-hot columns, one token. ``integers``: a token for each column of whole numbers. ``binned``: a
    token for each column of numbers. ``fsq``: a token for as many columns of numbers as there are levels."""
    columns: int
    """How many columns."""
    sizes: tuple[int, ...]
    """Number of ids of each token: the choices, the numbers of each integer, or the bins."""
    levels: tuple[int, ...] = ()
    """Of ``fsq``: levels of each column of a token."""


class ActionCodec:
    """An action tokenizer (`worldloom.protocols.ActionTokenizer`): make it by `binned`, `fsq`, `choice`, `from_space`.

    Args:
        parts: how the columns are cut up.
        statistics: one tensor for each part, float64: bin edges ``(k, bins + 1)`` of ``binned``, ``(k, 2)`` lowest and
            highest value of ``fsq``, ``(k, 1)`` smallest numbers of ``integers``, and an empty one of ``choice``.
    """

    def __init__(self, parts: Sequence[Part], statistics: Sequence[Tensor]) -> None:
        if not parts:
            raise WorldloomError("an action has at least one column", got=tuple(parts))
        assert len(parts) == len(statistics), "statistics for every part"
        self.parts, self.statistics = tuple(parts), tuple(statistics)
        self.sizes = tuple(size for part in parts for size in part.sizes)
        """Number of ids of each token of an action."""

    # -- made from data and spaces -----------------------------------------------------------------------------------

    @classmethod
    def binned(
        cls,
        actions: Tensor,
        bins: int = 256,
        spacing: Literal["uniform", "quantile"] = "uniform",
        quantiles: tuple[float, float] = (0.0, 1.0),
    ) -> ActionCodec:
        """Bins fitted to float actions ``(..., a)``: one token for each column.

        Args:
            spacing: equal widths, or equal numbers of the given values in each bin.
            quantiles: the range that is covered, e.g. (0.01, 0.99) as in OpenVLA to leave outliers out.

        Raises:
            WorldloomError: no actions, values that are not finite, too few bins.
        """
        columns = _fittable(actions)
        if bins < 2:
            raise WorldloomError("there must be at least two bins", got=bins)
        if spacing == "uniform":
            return cls._of_bounds(_range(columns, quantiles), "binned", bins, ())
        shares = torch.linspace(*_checked(quantiles), bins + 1, dtype=torch.float64)
        edges = torch.quantile(columns, shares, dim=0).T.contiguous()
        return cls([Part("binned", len(edges), (bins,) * len(edges))], [edges])

    @classmethod
    def fsq(
        cls,
        actions: Tensor,
        levels: Sequence[int] = (255,),
        scaling: Literal["affine", "linear"] = "affine",
        quantiles: tuple[float, float] = (0.0, 1.0),
    ) -> ActionCodec:
        """Finite scalar quantisation fitted to float actions ``(..., a)``: one token for ``len(levels)`` columns.

        Args:
            levels: of each column of a token; their product is the number of ids.
            scaling: ``affine`` maps a column's range to its levels, both ends exact; ``linear`` maps zero to the middle
                level, so that resting is exact, and takes odd levels.
            quantiles: the range that is covered.

        Raises:
            WorldloomError: no actions, values that are not finite, columns that do not fill the tokens, even levels
                with ``linear``.
        """
        columns = _fittable(actions)
        bounds = _range(columns, quantiles)
        if scaling == "linear":
            if any(level % 2 == 0 for level in levels):
                raise WorldloomError("linear scaling takes odd levels: zero has one of its own", got=tuple(levels))
            reach = bounds.abs().amax(dim=1)
            bounds = torch.stack([-reach, reach], dim=1)
        return cls._of_bounds(bounds, "fsq", 0, tuple(levels))

    @classmethod
    def choice(cls, choices: int) -> ActionCodec:
        """One-hot actions of a discrete space: one token, exact."""
        if choices < 1:
            raise WorldloomError("a discrete action has at least one choice", got=choices)
        return cls([Part("choice", choices, (choices,))], [torch.zeros(0, dtype=torch.float64)])

    @classmethod
    def from_space(
        cls,
        space: Any,
        *,
        kind: Literal["binned", "fsq"] = "binned",
        bins: int = 256,
        levels: Sequence[int] = (255,),
        actions: Tensor | None = None,
    ) -> ActionCodec:
        """The tokenizer of a Gymnasium action space, for action vectors as the module describes them.

        Args:
            kind: how the numbers of a Box become tokens.
            bins: uniform bins of ``binned``.
            levels: of ``fsq``.
            actions: ``(..., a)`` recorded actions; a column of a Box that has no bounds takes its range from them.

        Raises:
            WorldloomError: a space without a fixed size, or a Box without bounds and no actions.
        """
        try:
            from gymnasium import spaces
        except ImportError as error:
            raise missing_extra("gymnasium", "curation") from error
        parts: list[Part] = []
        statistics: list[Tensor] = []

        def add(space: Any) -> None:
            if isinstance(space, spaces.Dict):
                for inner in space.spaces.values():
                    add(inner)
                return
            if isinstance(space, spaces.Tuple):
                for inner in space.spaces:
                    add(inner)
                return
            if isinstance(space, spaces.Discrete):
                codec = cls.choice(int(space.n))
            elif isinstance(space, spaces.MultiDiscrete):
                counts = tuple(int(count) for count in space.nvec.flatten())
                codec = cls._of_integers(counts, torch.from_numpy(space.start.flatten()).double())
            elif isinstance(space, spaces.MultiBinary):
                count = math.prod(space.shape)
                codec = cls._of_integers((2,) * count, torch.zeros(count).double())
            elif isinstance(space, spaces.Box):
                first = sum(part.columns for part in parts)
                codec = cls._of_bounds(_box_bounds(space, first, actions), kind, bins, tuple(levels))
            else:
                raise WorldloomError("actions of this kind of space have no fixed size", got=space)
            parts.extend(codec.parts)
            statistics.extend(codec.statistics)

        add(space)
        codec = cls(parts, statistics)
        if actions is not None and actions.shape[-1] != codec.action_dim:
            raise WorldloomError(f"actions of this space have {codec.action_dim} columns", got=tuple(actions.shape))
        return codec

    @classmethod
    def _of_integers(cls, counts: tuple[int, ...], start: Tensor) -> ActionCodec:
        return cls([Part("integers", len(counts), counts)], [start[:, None]])

    @classmethod
    def _of_bounds(cls, bounds: Tensor, kind: str, bins: int, levels: tuple[int, ...]) -> ActionCodec:
        """``(k, 2)`` lowest and highest values."""
        columns = len(bounds)
        if kind == "binned":
            if bins < 2:
                raise WorldloomError("there must be at least two bins", got=bins)
            steps = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
            edges = torch.lerp(bounds[:, :1], bounds[:, 1:], steps[None])  # exact at both ends
            return cls([Part("binned", columns, (bins,) * columns)], [edges])
        fsq.check_levels(levels)
        if columns % len(levels):
            raise WorldloomError(
                "each token takes as many columns as there are levels",
                got=f"{columns} columns, {len(levels)} levels",
                do="give one level, or as many as divide the columns",
            )
        sizes = (math.prod(levels),) * (columns // len(levels))
        return cls([Part("fsq", columns, sizes, levels)], [bounds])

    # -- ActionTokenizer ---------------------------------------------------------------------------------------------

    @property
    def action_dim(self) -> int:
        """Columns of an action."""
        return sum(part.columns for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of an action."""
        return len(self.sizes)

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to this less one; token i uses the first ``sizes[i]``."""
        return max(self.sizes)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the parts and their statistics."""
        digest = hashlib.sha256(configs.dumps(_Record(self.parts)).encode())
        for tensor in self.statistics:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def encode(self, actions: Tensor, *, clip: bool = False) -> Tensor:
        """``(b, T, a)`` or ``(T, a)`` floats -> int64 ``(b, T, n)`` or ``(T, n)``.

        Args:
            clip: move numbers outside the range to its border instead of refusing them.

        Raises:
            WorldloomError: another shape, values that are not finite, that are outside the range (without ``clip``), or
                that are no choice or number of a discrete space.
        """
        flat = self._check_actions(actions)
        if not clip and (beyond := self._outside(flat)).any():
            column = int(beyond.double().mean(dim=0).argmax())
            low, high = self._bounds()[column].tolist()
            values = flat[:, column]
            raise WorldloomError(
                f"actions are outside the range: column {column} goes from {low:.6g} to {high:.6g}",
                got=f"{values.min():.6g} to {values.max():.6g}, {int(beyond[:, column].sum())} of {len(flat)} values",
                do="encode with clip=True, or fit the tokenizer to these actions",
            )
        tokens, first = [], 0
        for part, stats in zip(self.parts, self.statistics, strict=True):
            tokens.append(_encode(part, stats.to(flat.device), flat[:, first : first + part.columns]))
            first += part.columns
        return torch.cat(tokens, dim=1).view(*actions.shape[:-1], self.tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        """int ``(b, T, n)`` or ``(T, n)`` -> float32 ``(b, T, a)`` or ``(T, a)``: the middle of each bin.

        Raises:
            WorldloomError: another shape or type, or an id that its token does not have.
        """
        if tokens.ndim not in (2, 3) or tokens.shape[-1] != self.tokens or tokens.dtype.is_floating_point:
            raise WorldloomError(
                f"tokens are integers (b, T, {self.tokens}) or (T, {self.tokens})", got=_described(tokens)
            )
        flat = tokens.reshape(-1, self.tokens).long()
        wrong = (flat < 0) | (flat >= torch.tensor(self.sizes, device=flat.device))
        if wrong.any():
            row, which = wrong.nonzero()[0].tolist()
            raise WorldloomError(
                f"the ids of token {which} are 0 to {self.sizes[which] - 1}", got=int(flat[row, which])
            )
        actions, first = [], 0
        for part, stats in zip(self.parts, self.statistics, strict=True):
            actions.append(_decode(part, stats.to(flat.device), flat[:, first : first + len(part.sizes)]))
            first += len(part.sizes)
        return torch.cat(actions, dim=1).float().view(*tokens.shape[:-1], self.action_dim)

    def error_bound(self) -> Tensor:
        """float64 ``(a,)``: by how much a column can be off after a round trip, at most; half its widest bin."""
        bounds = []
        for part, stats in zip(self.parts, self.statistics, strict=True):
            if part.kind == "binned":
                bounds.append(stats.diff(dim=1).amax(dim=1) / 2)
            elif part.kind == "fsq":
                bounds.append((stats[:, 1] - stats[:, 0]) / (2 * (_levels(part) - 1)))
            else:
                bounds.append(torch.zeros(part.columns, dtype=torch.float64))
        return torch.cat(bounds)

    def outside(self, actions: Tensor) -> Tensor:
        """float64 ``(a,)``: the share of each column's values that `encode` with ``clip=True`` would move."""
        return self._outside(self._check_actions(actions)).double().mean(dim=0)

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a folder with ``config.toml`` and ``model.safetensors``, all or nothing."""
        with atomic_dir(path) as folder:
            configs.save(_Record(self.parts), folder / "config.toml")
            write_weights({f"parts.{i}": tensor for i, tensor in enumerate(self.statistics)}, folder)

    @classmethod
    def load(cls, path: Path) -> ActionCodec:
        """Read what `save` wrote.

        Raises:
            WorldloomError: missing or damaged files, or statistics that do not fit the parts.
        """
        tensors = read_weights(path)
        parts = configs.load(_Record, path / "config.toml").parts
        names = [f"parts.{i}" for i in range(len(parts))]
        shapes = [_statistics_shape(part) for part in parts]
        if sorted(names) != sorted(tensors) or any(
            tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float64
            for name, shape in zip(names, shapes, strict=True)
        ):
            raise WorldloomError("the statistics are of another tokenizer than config.toml describes", got=path)
        return cls(parts, [tensors[name] for name in names])

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_actions(self, actions: Tensor) -> Tensor:
        """``(m, a)`` float64."""
        if actions.ndim not in (2, 3) or actions.shape[-1] != self.action_dim:
            raise WorldloomError(
                f"actions are (b, T, {self.action_dim}) or (T, {self.action_dim})", got=_described(actions)
            )
        flat = actions.reshape(-1, self.action_dim).double()
        if not torch.isfinite(flat).all():
            raise WorldloomError("the actions hold values that are not finite", do="check how they were recorded")
        return flat

    def _bounds(self) -> Tensor:
        """``(a, 2)``; unbounded where a column is no number."""
        bounds = []
        for part, stats in zip(self.parts, self.statistics, strict=True):
            if part.kind in ("binned", "fsq"):
                bounds.append(stats[:, [0, -1]])
            else:
                bounds.append(torch.tensor([-math.inf, math.inf], dtype=torch.float64).expand(part.columns, 2))
        return torch.cat(bounds)

    def _outside(self, flat: Tensor) -> Tensor:
        low, high = self._bounds().to(flat.device).unbind(dim=1)
        return (flat < low) | (flat > high)


@dataclass(frozen=True)
class _Record:
    """``config.toml`` of an action tokenizer."""

    parts: tuple[Part, ...]
    kind: str = "actions"


# -- one part --------------------------------------------------------------------------------------------------------


def _encode(part: Part, stats: Tensor, x: Tensor) -> Tensor:
    """``(m, k)`` float64 -> int64 ``(m, tokens of the part)``."""
    if part.kind == "choice":
        if not ((x == 0) | (x == 1)).all() or not (x.sum(dim=1) == 1).all():
            raise WorldloomError(
                f"a discrete action is a one-hot vector of {part.columns}", do="set the chosen entry to 1, others to 0"
            )
        return x.argmax(dim=1, keepdim=True)
    if part.kind == "integers":
        ids = x - stats[:, 0]
        sizes = torch.tensor(part.sizes, device=x.device)
        wrong = (ids != ids.round()) | (ids < 0) | (ids >= sizes)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            low = int(stats[column, 0])
            raise WorldloomError(
                f"entry {column} of a discrete action is a whole number from {low} to {low + part.sizes[column] - 1}",
                got=float(x[row, column]),
            )
        return ids.long()
    x = x.clamp(stats[:, 0], stats[:, -1])
    if part.kind == "binned":
        return torch.searchsorted(stats[:, 1:-1].contiguous(), x.T.contiguous(), right=True).T
    levels = _levels(part).to(x.device)
    low, high = stats.unbind(dim=1)
    span = torch.where(high > low, high - low, 1.0)  # a column that never moved has no width
    digits = ((x - low) / span * (levels - 1)).round()
    codes = (digits - levels // 2) / (levels // 2)
    return fsq.codes_to_indices(codes.unflatten(1, (len(part.sizes), -1)), part.levels, dim=2)


def _decode(part: Part, stats: Tensor, ids: Tensor) -> Tensor:
    """int64 ``(m, tokens of the part)`` -> float64 ``(m, k)``."""
    if part.kind == "choice":
        return torch.nn.functional.one_hot(ids[:, 0], part.columns).double()
    if part.kind == "integers":
        return ids + stats[:, 0]
    if part.kind == "binned":
        middles = (stats[:, :-1] + stats[:, 1:]) / 2
        return middles.T.gather(0, ids)
    levels = _levels(part).to(ids.device)
    codes = fsq.indices_to_codes(ids, part.levels, dim=2).flatten(1).double()
    digits = (codes * (levels // 2) + levels // 2).round()
    return torch.lerp(stats[:, 0], stats[:, 1], digits / (levels - 1))


def _levels(part: Part) -> Tensor:
    """float64 ``(k,)``: the levels of each column."""
    return torch.tensor(part.levels * len(part.sizes), dtype=torch.float64)


def _statistics_shape(part: Part) -> tuple[int, ...]:
    if part.kind == "choice":
        return (0,)
    return (part.columns, {"integers": 1, "fsq": 2}.get(part.kind, part.sizes[0] + 1))


# -- fitting ---------------------------------------------------------------------------------------------------------


def _fittable(actions: Tensor) -> Tensor:
    """``(..., a)`` -> ``(m, a)`` float64."""
    if actions.ndim < 2 or not actions.numel():
        raise WorldloomError("a tokenizer is fitted to actions (..., a)", got=_described(actions))
    columns = actions.reshape(-1, actions.shape[-1]).double()
    if not torch.isfinite(columns).all():
        raise WorldloomError("the actions hold values that are not finite", do="check how they were recorded")
    return columns


def _checked(quantiles: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= quantiles[0] < quantiles[1] <= 1:
        raise WorldloomError("quantiles are two shares, the lower first, from 0 to 1", got=quantiles)
    return quantiles


def _range(columns: Tensor, quantiles: tuple[float, float]) -> Tensor:
    """``(a, 2)``: the values of each column at the quantiles."""
    shares = torch.tensor(_checked(quantiles), dtype=torch.float64)
    return torch.quantile(columns, shares, dim=0).T.contiguous()


def _box_bounds(space: Any, first: int, actions: Tensor | None) -> Tensor:
    """``(k, 2)``: the space's bounds, and the range of the actions where it has none."""
    low, high = (torch.from_numpy(side.flatten()).double() for side in (space.low, space.high))
    bounds = torch.stack([low, high], dim=1)
    bounded = torch.isfinite(bounds).all(dim=1) & (high - low < _UNBOUNDED)
    if bounded.all():
        return bounds
    if actions is None:
        raise WorldloomError(
            "this space has no bounds", got=space, do="give recorded actions, from which the range is taken"
        )
    seen = _range(_fittable(actions)[:, first : first + len(bounds)], (0.0, 1.0))
    return torch.where(bounded[:, None], bounds, seen)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
