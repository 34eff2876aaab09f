"""Rewards and ends of a world that only shows frames: linear heads on latents, fitted by ridge regression.

A step of a world adds one latent frame. A head sees the latent frames before and after the step, pooled to a grid of at
most 8x8, as one vector x and gives ``w . x + b``: the reward of the step, or how much it looks like the last one of an
episode. The fit is in closed form (Hoerl and Kennard 1970): ``w = (X'X + penalty n v I)^-1 X'y`` with X and y centred
and v the mean variance of a feature; the penalty is the one of a few that does best on held-out clips.

Letters: n steps, d features, c h w a latent frame, r video frames of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.shards import Dataset, ShardSample, open_dataset
from worldloom_model_zoo.starts import read_sample

if TYPE_CHECKING:
    from worldloom.protocols import VideoTokenizer

Target = Literal["reward", "termination"]
GRID = 8
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class HeadFit:
    """What a head was fitted to, and how well it does on clips it did not see."""

    target: Target
    penalty: float
    """The chosen one."""
    score: float
    """Held-out clips: R^2 of a reward; of a termination the mean of the shares found among last and other steps."""
    steps: int
    """Steps it was fitted to."""
    held_out: int
    """Steps it was measured on."""


class LinearHead:
    """A reward or termination head for `WorldModelEnv`.

    Args:
        weight: ``(d,)``.
        bias: added.
        fit: how it came about.
    """

    def __init__(self, weight: Tensor, bias: float, fit: HeadFit) -> None:
        self.weight, self.bias, self.fit = weight, bias, fit

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Latent frames before and after a step, ``(n, 2, c, h, w)`` -> ``(n,)``: float64 rewards, or bool ends.

        Raises:
            WorldloomError: latents of another size than it was fitted to.
        """
        x = _features(latents)
        if x.shape[1] != len(self.weight):
            raise WorldloomError(
                "the head was fitted to other latents", got=f"{x.shape[1]} features, it takes {len(self.weight)}"
            )
        value = (x.double() @ self.weight.to(x.device, torch.float64) + self.bias).cpu().numpy()
        return value > 0.5 if self.fit.target == "termination" else value

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save

        from worldloom.artifacts import atomic_write

        facts = {"bias": repr(self.bias), "fit": json.dumps(asdict(self.fit))}
        data = save({"weight": self.weight.contiguous()}, facts)
        atomic_write(Path(path), data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LinearHead:
        """Read what `save` wrote.

        Raises:
            WorldloomError: no such file, or another one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                return cls(file.get_tensor("weight"), float(facts["bias"]), HeadFit(**json.loads(facts["fit"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WorldloomError("this is no head", got=f"{path}: {error}", do="fit one with fit_head") from error


@torch.no_grad()
def fit_head(
    tokenizer: VideoTokenizer,
    dataset: Dataset | str | Path,
    target: Target,
    *,
    size: tuple[int, int] | None = None,
    held_out: float = 0.2,
) -> LinearHead:
    """Fit a head to a dataset of clips that carry rewards, or say that their episode ended.

    Args:
        target: ``reward``, the sum over the r frames of a step; or ``termination``, true of the last step of a clip
            whose metadata says ``terminated``. There the few last steps weigh as much as all others together.
        size: (height, width) the frames are fitted to; None keeps theirs.
        held_out: share of the clips (every k-th) that choose the penalty and give the score; in (0, 0.5].

    Raises:
        WorldloomError: no rewards, no clip that ends, fewer than two clips.
    """
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    if not 0 < held_out <= 0.5:
        raise WorldloomError("held_out is a share of the clips, in (0, 0.5]", got=held_out)
    every = round(1 / held_out)
    fitted, kept = _Moments(), []
    found = 0.0
    for number, (x, y) in enumerate(_examples(tokenizer, dataset, target, size)):
        found += float(np.abs(y).sum())
        if number % every == every - 1:
            kept.append((x, y))
        else:
            fitted.add(x, y)
    if target == "termination" and not found:
        raise WorldloomError(
            "no clip of the dataset says that its episode ended", got=str(dataset.root), do="record longer episodes"
        )
    if not kept or not fitted.count:
        raise WorldloomError(f"fitting a head needs at least {every} clips", got=len(dataset))
    x, y = np.concatenate([part for part, _ in kept]), np.concatenate([part for _, part in kept])
    best: tuple[float, float, np.ndarray, float] | None = None
    for penalty in PENALTIES:
        weight, bias = fitted.solve(penalty, balance=target == "termination")
        score = _score(x @ weight + bias, y, target)
        if best is None or score > best[0]:
            best = (score, penalty, weight, bias)
    assert best is not None
    score, penalty, weight, bias = best
    return LinearHead(torch.from_numpy(weight), bias, HeadFit(target, penalty, score, fitted.count, len(y)))


class _Moments:
    """Sums from which ridge regression is solved, so that no more than one clip's features are held."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[bool, list] = {}
        """Label is positive -> [steps, sum x, X'X, sum y, X'y]; apart, so that classes can be weighed."""

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        self.count += len(y)
        for positive in (False, True):
            rows = (y > 0.5) == positive
            if rows.any():
                u, v = x[rows], y[rows]
                new = [len(v), u.sum(0), u.T @ u, v.sum(), u.T @ v]
                old = self._sums.get(positive)
                self._sums[positive] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def solve(self, penalty: float, *, balance: bool) -> tuple[np.ndarray, float]:
        """Weight ``(d,)`` and bias; `balance` makes both classes weigh alike."""
        parts = list(self._sums.values())
        scale = [1 / part[0] if balance else 1.0 for part in parts]
        n, sx, xx, sy, xy = (
            np.sum([k * part[i] for k, part in zip(scale, parts, strict=True)], axis=0) for i in range(5)
        )
        mx, my = sx / n, sy / n
        covariance = xx / n - np.outer(mx, mx)
        spread = np.trace(covariance) / len(mx)
        weight = np.linalg.solve(covariance + (penalty * spread + 1e-12) * np.eye(len(mx)), xy / n - mx * my)
        return weight, float(my - mx @ weight)


def _score(made: np.ndarray, y: np.ndarray, target: Target) -> float:
    if target == "reward":
        return float(1 - np.square(made - y).sum() / max(np.square(y - y.mean()).sum(), 1e-12))
    shares = [float(((made[y == label] > 0.5) == label).mean()) for label in (0, 1) if (y == label).any()]
    return float(np.mean(shares))


def _examples(
    tokenizer: VideoTokenizer, dataset: Dataset, target: Target, size: tuple[int, int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features ``(n, d)`` and labels ``(n,)`` of the steps of each clip."""
    ratio = tokenizer.temporal_ratio
    for sample in dataset:
        steps = (sample.clip.frames - 1) // ratio
        if not steps:
            continue
        y = _labels(sample, target, steps, ratio)
        # The last steps of a clip, so that an episode's end is among them.
        first = sample.clip.frames - 1 - steps * ratio
        frames = read_sample(sample, size)[first:]
        latents = tokenizer.encode(media.to_tensor(frames[None]))[0].transpose(0, 1)  # (t, c, h, w)
        pairs = torch.stack([latents[:-1], latents[1:]], dim=1)
        yield _features(pairs).double().cpu().numpy(), y


def _labels(sample: ShardSample, target: Target, steps: int, ratio: int) -> np.ndarray:
    if target == "termination":
        y = np.zeros(steps)
        y[-1] = bool(sample.clip.metadata.get("terminated"))
        return y
    if "rewards" not in sample.arrays:
        raise WorldloomError(
            "a clip carries no rewards", got=sample.clip.id, do="record the environment with worldloom curate record"
        )
    return sample.arrays["rewards"][-steps * ratio :].reshape(steps, ratio).sum(1, dtype=np.float64)


def _features(latents: Tensor) -> Tensor:
    """``(n, 2, c, h, w)`` -> ``(n, d)``."""
    if latents.ndim != 5 or latents.shape[1] != 2:
        raise WorldloomError("a head takes latent frames (n, 2, c, h, w)", got=tuple(latents.shape))
    h, w = (min(side, GRID) for side in latents.shape[-2:])
    flat = latents.flatten(0, 1)
    pooled = F.adaptive_avg_pool2d(flat, (h, w)) if (h, w) != tuple(latents.shape[-2:]) else flat
    return pooled.unflatten(0, latents.shape[:2]).flatten(1)
