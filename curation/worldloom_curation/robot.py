"""Numbers about actions: what kind they are, how large they are, how late the picture follows them, their statistics.

Letters: T frames, a size of an action, s size of a state. ``actions[t]`` leads from frame t to frame t+1, so an episode
of T frames has T-1 of them; `FrameMotion` measures that same step in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Source, Span

Kind = Literal["choices", "absolute", "relative"]
"""``choices``: zeros and ones. ``absolute``: targets, in the state's units. ``relative``: changes or velocities."""

STILL = frozenset({"noop", "no-op", "no_op", "none", "idle", "stay", "still", "nothing", "do_nothing"})
"""Names of choices that do nothing, in lower case."""

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
"""The quantiles in statistics, named as LeRobot v3 names them."""

_MAX_ROWS = 200_000  # rows that quantiles are taken from


class FrameMotion:
    """Observer of the mean absolute difference between each small grey frame and the one before it.

    ``motion``: float32 ``(T,)`` in grey levels, NaN for the first frame; ``motion[t + 1]`` is the step of
    ``actions[t]``.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._before: np.ndarray | None = None
        self._motion: list[float] = []

    def add(self, frame: Frame) -> None:
        # ITU-R BT.601 luma
        grey = frame.colour(self._side).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        self._motion.append(float("nan") if self._before is None else float(np.abs(grey - self._before).mean()))
        self._before = grey

    def result(self) -> dict[str, np.ndarray]:
        return {"motion": np.asarray(self._motion, np.float32)}


def span_actions(span: Span) -> np.ndarray | None:
    """The actions ``(span.frames - 1, a)`` of a span; None where its source has none, or not one for every step."""
    actions = span.source.actions
    if actions is None or span.step != 1 or len(actions) < span.end - 1:
        return None
    return actions[span.start : max(span.start, span.end - 1)]


def action_names(facts: Mapping[str, Any], size: int) -> list[str]:
    """A name for each component of an action: the recorded ones where there are as many, else ``action 0``, ..."""
    names = [str(name) for name in facts.get("action_names") or ()]
    return names if len(names) == size else [f"action {i}" for i in range(size)]


def are_choices(actions: np.ndarray) -> bool:
    """Whether all values are zeros and ones."""
    return bool(actions.size) and bool(np.isin(actions, (0.0, 1.0)).all())


@dataclass(frozen=True)
class ActionSpace:
    """What all the actions of one run that have the same components have in common."""

    names: tuple[str, ...]
    kind: Kind
    median: np.ndarray
    """``(a,)``"""
    deviation: np.ndarray
    """``(a,)``: 1.4826 x the median absolute deviation (the standard deviation of a normal distribution); where that is
    0, which a gripper's two positions make it, the standard deviation."""
    extent: np.ndarray
    """``(a,)``: from the 1 % to the 99 % quantile; the smallest and the largest where those are equal."""

    def activity(self, actions: np.ndarray, gap: int = 1) -> np.ndarray:
        """How much is done in each step and the `gap` - 1 after it, as a share of `extent`: ``(n, a) -> (n,)``.

        The largest over the components. Choices: 1, or 0 for those that do nothing. Relative actions: their size.
        Absolute ones: how far apart the targets are, the one before the first included.
        """
        if not len(actions):
            return np.zeros(0)
        values = actions.astype(np.float64)
        if self.kind == "choices":
            values = values[:, [i for i, name in enumerate(self.names) if name.lower() not in STILL]]
            return _ahead(values, gap).max(axis=1, initial=0.0)
        if self.kind == "relative":
            return _ahead(_share(values, self.extent), gap).max(axis=1, initial=0.0)
        before = np.concatenate([values[:1], values[:-1]])
        high, low = _ahead(np.maximum(values, before), gap), -_ahead(-np.minimum(values, before), gap)
        return _share(high - low, self.extent).max(axis=1, initial=0.0)


def _ahead(values: np.ndarray, steps: int) -> np.ndarray:
    """The largest of each row and the `steps` - 1 after it, ``(n, a) -> (n, a)``."""
    padded = np.concatenate([values, np.full((steps - 1, values.shape[1]), -np.inf)])
    return np.lib.stride_tricks.sliding_window_view(padded, steps, axis=0).max(axis=-1)


def _share(values: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """``|values| / extent``; components that never change count for nothing."""
    return np.where(extent > 0, np.abs(values) / np.where(extent > 0, extent, 1.0), 0.0)


def action_spaces(sources: Iterable[Source], kind: str = "auto") -> dict[tuple[str, ...], ActionSpace]:
    """The action spaces of a run, by the names of their components.

    Args:
        sources: equal content counts once.
        kind: ``auto``: absolute where a state of the same size lies nearer to the actions than their own median does,
            otherwise relative. Zeros and ones are choices whatever is said here.
    """
    groups: dict[tuple[str, ...], dict[str, Source]] = {}
    for source in sources:
        if source.actions is not None and len(source.actions):
            names = tuple(action_names(source.facts, source.actions.shape[1]))
            groups.setdefault(names, {})[source.key] = source
    return {names: _space(names, list(group.values()), kind) for names, group in groups.items()}


def space_of(span: Span, spaces: Mapping[tuple[str, ...], ActionSpace]) -> ActionSpace:
    """The action space of a span with actions."""
    actions = span.source.actions
    assert actions is not None, "asked for a span with actions only"
    return spaces[tuple(action_names(span.source.facts, actions.shape[1]))]


def _space(names: tuple[str, ...], sources: Sequence[Source], kind: str) -> ActionSpace:
    total = sum(len(source.actions) for source in sources if source.actions is not None)
    every = -(-total // _MAX_ROWS)
    rows = np.concatenate([source.actions[::every] for source in sources if source.actions is not None])
    rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    if not len(rows):
        rows = np.zeros((1, len(names)))
    median = np.median(rows, axis=0)
    deviation = 1.4826 * np.median(np.abs(rows - median), axis=0)
    low, high = np.quantile(rows, (0.01, 0.99), axis=0)
    extent = np.where(high > low, high - low, rows.max(axis=0) - rows.min(axis=0))
    if are_choices(rows):
        found: Kind = "choices"
    elif kind == "auto":
        found = "absolute" if _follow_state(sources, median) else "relative"
    else:
        found = "absolute" if kind == "absolute" else "relative"
    return ActionSpace(names, found, median, np.where(deviation > 0, deviation, rows.std(axis=0)), extent)


def _follow_state(sources: Sequence[Source], median: np.ndarray) -> bool:
    near = far = 0.0
    for source in sources:
        actions, state = source.actions, source.arrays.get("state")
        if actions is None or state is None or state.shape[1] != actions.shape[1]:
            continue
        rows = min(len(actions), len(state))
        near += float(np.nansum(np.abs(actions[:rows] - state[:rows])))
        far += float(np.nansum(np.abs(actions[:rows] - median)))
    return near < far


@dataclass(frozen=True)
class Lag:
    """By how many frames the picture comes after the actions, and how sure that is."""

    frames: int
    """Positive: the picture is late. Negative: the actions are."""
    correlation: float
    """Of action magnitude and motion at that lag, 0 to 1 (below 0 where they are opposed)."""
    sigma: float
    """`correlation`, as many standard errors away from none at all."""
    margin: float
    """How much higher it is than the next peak at another lag."""


def find_lag(magnitude: np.ndarray, motion: np.ndarray, limit: int) -> Lag | None:
    """The lag, within ``[-limit, limit]``, at which motion correlates best with the magnitude of the actions.

    Values over the 98 % quantile are cut to it, for a cut or a flash must not decide. Standard errors are Fisher's,
    with the effective number of samples of two autocorrelated series (Bartlett 1935).

    Args:
        magnitude: ``(n,)``, or ``(n, k)`` indicator columns of choices; then the multiple correlation is taken,
            adjusted for their number.
        motion: ``(n,)``, the same steps.
        limit: at most a third of the steps is tried.

    Returns:
        None where one of the two does not change, or there are fewer than 12 steps.
    """
    steps = len(motion)
    limit = min(limit, steps // 3)
    if steps < 12 or limit < 1:
        return None
    y = _clipped(motion)
    x = magnitude.astype(np.float64) if magnitude.ndim == 2 else _clipped(magnitude)
    if not np.isfinite(y).all() or not np.isfinite(x).all() or y.std() == 0 or x.std() == 0:
        return None
    lags = range(-limit, limit + 1)
    found = np.array([_correlation(*_overlap(x, y, lag)) for lag in lags])
    best = int(np.argmax(found))
    lag, peak = lags[best], float(found[best])
    rivals = [
        found[i]
        for i in range(len(found))
        if i != best and found[i] >= found[max(i - 1, 0)] and found[i] >= found[min(i + 1, len(found) - 1)]
    ]
    fitted, seen = _fitted(*_overlap(x, y, lag))
    samples = _effective(fitted, seen)
    sigma = float(np.arctanh(min(max(peak, 0.0), 1 - 1e-9)) * np.sqrt(max(samples - 3, 0.0)))
    return Lag(lag, peak, sigma, peak - max((float(rival) for rival in rivals), default=0.0))


def _clipped(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.minimum(values, np.quantile(values, 0.98)) if np.isfinite(values).all() else values


def _overlap(x: np.ndarray, y: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of x, and those of y that come `lag` later."""
    return (x[: len(x) - lag], y[lag:]) if lag >= 0 else (x[-lag:], y[: len(y) + lag])


def _fitted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What x says y should be; x itself where it is a single series."""
    if x.ndim == 1:
        return x, y
    design = np.column_stack([x, np.ones(len(x))])
    return design @ np.linalg.lstsq(design, y, rcond=None)[0], y


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    fitted, y = _fitted(x, y)
    if fitted.std() < 1e-12 or y.std() < 1e-12:
        return 0.0
    r = float(np.corrcoef(fitted, y)[0, 1])
    if x.ndim == 2:
        free = len(y) - 1 - np.linalg.matrix_rank(x - x.mean(axis=0))
        squared = 1 - (1 - r * r) * (len(y) - 1) / max(free, 1)
        r = float(np.sqrt(squared)) if squared > 0 else 0.0
    return r


def _effective(x: np.ndarray, y: np.ndarray) -> float:
    """Bartlett's effective number of samples for the correlation of two autocorrelated series."""
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    total = 1.0
    for lag in range(1, n // 4):
        both = (x[:-lag] @ x[lag:]) * (y[:-lag] @ y[lag:]) / max((x @ x) * (y @ y), 1e-30)
        if both <= 0:  # what follows is noise
            break
        total += 2 * (1 - lag / n) * both
    return float(n / total)


@dataclass
class Statistics:
    """Statistics per component, gathered part by part; exact but for the quantiles of more than 200,000 rows."""

    count: int = 0
    """Rows."""
    parts: list[np.ndarray] = field(default_factory=list[np.ndarray])
    _sum: Any = 0.0
    _squares: Any = 0.0
    _low: Any = np.inf
    _high: Any = -np.inf
    _every: int = 1

    def add(self, rows: np.ndarray) -> None:
        """More rows ``(n, a)``."""
        if not len(rows):
            return
        values = rows.astype(np.float64)
        self._sum = self._sum + values.sum(axis=0)
        self._squares = self._squares + (values**2).sum(axis=0)
        self._low, self._high = np.minimum(self._low, values.min(axis=0)), np.maximum(self._high, values.max(axis=0))
        self.parts.append(values[(-self.count) % self._every :: self._every])
        self.count += len(rows)
        while sum(len(part) for part in self.parts) > _MAX_ROWS:
            self.parts = [np.concatenate(self.parts)[::2]]
            self._every *= 2

    def result(self) -> dict[str, Any]:
        """``count``, and ``mean``, ``std``, ``min``, ``max`` and the `QUANTILES`, each ``(a,)``; empty without rows."""
        if not self.count:
            return {}
        mean = self._sum / self.count
        std = np.sqrt(np.maximum(self._squares / self.count - mean**2, 0.0))
        points = np.quantile(np.concatenate(self.parts), list(QUANTILES.values()), axis=0)
        named = dict(zip(QUANTILES, points, strict=True))
        return {"count": self.count, "mean": mean, "std": std, "min": self._low, "max": self._high, **named}


def describe(
    found: dict[str, tuple[Sequence[str], Statistics]], arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Add a clip's actions, state and rewards to the statistics of a dataset."""
    for name in ("actions", "state", "rewards"):
        array = arrays.get(name)
        if array is None:
            continue
        rows = array.reshape(len(array), -1)
        names = action_names(facts, rows.shape[1]) if name == "actions" else _state_names(name, facts, rows.shape[1])
        entry = found.setdefault(name, (names, Statistics()))
        if len(entry[0]) == rows.shape[1]:
            entry[1].add(rows)


def _state_names(name: str, facts: Mapping[str, Any], size: int) -> list[str]:
    names = [str(item) for item in facts.get("state_names") or ()] if name == "state" else ["reward"]
    return names if len(names) == size else [f"{name} {i}" for i in range(size)]


def statistics_table(found: Mapping[str, tuple[Sequence[str], Statistics]]) -> dict[str, Any]:
    """The statistics as ``dataset.json`` holds them: array -> names, count, and a list per statistic."""
    table: dict[str, Any] = {}
    for name, (names, statistics) in found.items():
        result = statistics.result()
        if not result or not np.isfinite(result["mean"]).all():
            continue
        listed = {key: [round(float(x), 6) for x in value] for key, value in result.items() if key != "count"}
        table[name] = {"names": list(names), "count": result["count"], **listed}
    return {"statistics": table} if table else {}
