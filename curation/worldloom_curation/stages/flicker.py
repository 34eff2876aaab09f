"""Flicker: drop spans whose brightness jumps up and down from frame to frame: strobes, lamps beating with the shutter.

The measure, in grey levels: how far each cell's mean brightness is from the middle between the frames before and after
it (the second difference over two), of that the median over the cells, and of its magnitude the mean over the span's
frames. A thing that moves changes some cells at a time, and a fade has no second difference; only what makes most of
the picture go up and down at once is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom_curation.measures import PerFrame, within
from worldloom_curation.stage import Observer, Source, Span, Verdict
from worldloom_curation.stages.frozen import LEVELS, cells

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class FlickerConfig:
    """Brightness that jumps."""

    threshold: float = 3.0
    """Most flicker, in grey levels (0 to 255); a span with more is dropped."""


def flicker(levels: np.ndarray) -> float:
    """The measure of grey levels ``(t, cells)``; 0 for fewer than three frames."""
    if len(levels) < 3:
        return 0.0
    bends = levels[1:-1] - (levels[:-2] + levels[2:]) / 2
    return float(np.abs(np.median(bends, axis=1)).mean())


class FlickerStage:
    """Keeps spans of even brightness."""

    name = "flicker"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = FlickerConfig

    def __init__(self, config: FlickerConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return PerFrame(cells, kind=np.uint16)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        limit = self.config.threshold
        for span in spans:
            value = flicker(within(signals[span.source.key], span).astype(np.float64) / LEVELS)
            kept = value <= limit
            reason = "its brightness is even" if kept else "its brightness jumps from frame to frame"
            verdicts.append(Verdict(span, kept, "flicker", value, limit, reason))
        return verdicts
