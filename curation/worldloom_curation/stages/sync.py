"""Sync: find by how many frames the picture comes after the actions (or before), and drop what is too far off.

The magnitude of the actions is correlated with the motion in the picture at every lag up to `search`; the lag of the
highest correlation counts if it is trustworthy: high, significant, and clearly above every other peak. Each clip's
metadata gets ``sync``: lag, correlation, sigma, margin, trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.robot import STILL, FrameMotion, Lag, action_names, are_choices, find_lag, span_actions
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class SyncConfig:
    """Whether actions and picture belong to the same moment."""

    max_lag: int = 2
    """Most frames by which the picture may be late or early."""
    search: int = 15
    """Lags up to this many frames are tried, in both directions."""
    drop: bool = True
    """Drop what is further off; false only marks it."""
    min_correlation: float = 0.3
    """A lag at a lower correlation is not trusted, and drops nothing."""
    min_sigma: float = 4.0
    """Nor is one whose correlation is fewer standard errors away from none."""
    min_margin: float = 0.1
    """Nor is one whose correlation is not this much above that of the next peak."""
    kind: Literal["auto", "absolute", "relative"] = "auto"
    """An action's magnitude: its change from the one before (absolute), its size (relative), or what fits better."""
    side: int = 64
    """Short side of the frames that are compared, in pixels."""

    def __post_init__(self) -> None:
        if self.max_lag < 0 or self.search <= self.max_lag:
            raise WorldloomError(
                "sync.max_lag must not be negative, and sync.search must be larger",
                got=f"max_lag {self.max_lag}, search {self.search}",
            )


class SyncStage:
    """Keeps spans whose actions and motion are in step, or of which that cannot be said. Needs actions."""

    name = "sync"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("side",)
    Config = SyncConfig

    def __init__(self, config: SyncConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return FrameMotion(self.config.side) if source.actions is not None else None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span, signals) for span in spans]

    def _verdict(self, span: Span, signals: Mapping[str, Signals]) -> Verdict:
        actions = span_actions(span)
        if actions is None:
            return Verdict(span, True, reason="it has no actions")
        names = action_names(span.source.facts, actions.shape[1])
        motion = signals[span.source.key]["motion"][span.start + 1 : span.end]
        lag = best_lag(actions, names, motion, self.config.search, self.config.kind)
        limit = float(self.config.max_lag)
        if lag is None:
            return Verdict(span, True, reason="too short, or the actions or the picture never change")
        trusted = (
            lag.correlation >= self.config.min_correlation
            and lag.sigma >= self.config.min_sigma
            and lag.margin >= self.config.min_margin
        )
        found = {
            "lag": lag.frames,
            "correlation": round(lag.correlation, 4),
            "sigma": round(lag.sigma, 2),
            "margin": round(lag.margin, 4),
            "trusted": trusted,
        }
        marked = replace(span, notes={**span.notes, "sync": found})
        about = f"correlation {lag.correlation:.2f}, {lag.sigma:.1f} sigma, margin {lag.margin:.2f}"
        if not trusted:
            return Verdict(marked, True, "lag", None, limit, f"the lag cannot be told ({about})")
        late = "the picture is in step" if not lag.frames else f"the picture is {abs(lag.frames)} frames "
        late += "" if not lag.frames else "late" if lag.frames > 0 else "early"
        kept = abs(lag.frames) <= self.config.max_lag or not self.config.drop
        return Verdict(marked, kept, "lag", float(lag.frames), limit, f"{late} ({about})")


def best_lag(actions: np.ndarray, names: Sequence[str], motion: np.ndarray, search: int, kind: str) -> Lag | None:
    """`find_lag` of actions ``(n, a)`` and the motion of their steps ``(n,)``, with the magnitude that fits best."""
    found = [lag for x in _magnitudes(actions, names, kind) if (lag := find_lag(x, motion, search)) is not None]
    return max(found, key=lambda lag: lag.correlation, default=None)


def _magnitudes(actions: np.ndarray, names: Sequence[str], kind: str) -> list[np.ndarray]:
    """What stands for the magnitude: columns of choices as they are (what moves how much is found out), else norms."""
    if are_choices(actions):
        doing = [i for i, name in enumerate(names) if name.lower() not in STILL]
        used = [i for i in doing if 0 < actions[:, i].mean() < 1]
        return [actions[:, used].astype(np.float64)] if used else []
    extent = actions.max(axis=0) - actions.min(axis=0)
    scaled = actions[:, extent > 0].astype(np.float64) / extent[extent > 0]
    if not np.isfinite(scaled).all() or not scaled.shape[1]:
        return []
    size = np.linalg.norm(scaled, axis=1)
    change = np.linalg.norm(np.diff(scaled, axis=0, prepend=scaled[:1]), axis=1)
    return {"absolute": [change], "relative": [size]}.get(kind, [change, size])
