"""Motion: drop spans in which nothing moves.

The measure, in grey levels (0 to 255): every frame is made grey and shrunk (area average, short side `side` pixels,
which averages sensor noise and compression noise away), and compared with the frame `gap` seconds before it; of the
absolute differences the mean over the pixels is taken, and of those the mean over the span's frames. A gap in seconds
and not in frames makes the value independent of the frame rate. 0 is a frozen picture; README.md lists values of real
videos.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom_curation.pictures import opencv
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class MotionConfig:
    """How much must move."""

    threshold: float = 0.25
    """Least motion, in grey levels (0 to 255); a span with less is dropped. 0 keeps everything."""
    gap: float = 0.25
    """Seconds between the two frames that are compared."""
    side: int = 64
    """Short side of the frames that are compared, in pixels; a smaller frame is compared as it is."""


class FrameChanges:
    """Collects each frame's mean absolute difference to the frame `gap` before it (float32; NaN for the first)."""

    def __init__(self, side: int, gap: int) -> None:
        self._cv2, self._side, self._gap = opencv(), side, gap
        self._before: deque[np.ndarray] = deque(maxlen=gap)
        self._changes: list[float] = []

    def add(self, frame: Frame) -> None:
        grey = frame.grey(self._side)
        known = len(self._before) == self._gap
        change = self._cv2.norm(grey, self._before[0], self._cv2.NORM_L1) / grey.size if known else float("nan")
        self._changes.append(change)
        self._before.append(grey)

    def result(self) -> dict[str, np.ndarray]:
        return {"changes": np.asarray(self._changes, np.float32), "gap": np.asarray(self._gap)}


def motion(signals: Signals, start: int, end: int) -> float:
    """The measure of frames ``[start, end)``, both frames of every comparison inside the span."""
    first = start + int(signals["gap"])
    if first >= end:  # shorter than the gap: nothing to compare, so nothing is known to move
        return 0.0
    return float(signals["changes"][first:end].astype(np.float64).mean())


class MotionStage:
    """Keeps spans whose motion reaches the threshold."""

    name = "motion"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("gap", "side")
    Config = MotionConfig

    def __init__(self, config: MotionConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return FrameChanges(self.config.side, max(1, round(self.config.gap * fps)))

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for span in spans:
            value = motion(signals[span.source.key], span.start, span.end)
            kept = value >= self.config.threshold
            reason = "it moves" if kept else "it hardly moves" if value else "it stands still"
            verdicts.append(Verdict(span, kept, "motion", value, self.config.threshold, reason))
        return verdicts
