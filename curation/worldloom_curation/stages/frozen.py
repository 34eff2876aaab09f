"""Frozen: cut out stretches in which the picture stands still to the last detail, and spans of nothing else.

A picture that stalls in the recording, a title card, a slide. Every frame is averaged over `CELLS` x `CELLS` cells; a
frame is frozen while no cell differs by more than `tolerance` grey levels from the frame with which the stretch began.
Held against the beginning and not against the frame before, slow pans and fades are no stills; and one cell is enough,
so that neither is a still picture in which one small thing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation import pictures
from worldloom_curation.measures import PerFrame, cut_out, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

CELLS = 8
LEVELS = 128
"""Steps in which a grey level is stored."""
# X in which a grey level is stored


@dataclass(frozen=True)
class FrozenConfig:
    """Stretches that stand still."""

    seconds: float = 1.0
    """Shortest stretch that counts."""
    tolerance: float = 2.0
    """Most change of a cell, in grey levels (0 to 255): encoding a still picture changes it a little."""
    min_frames: int = 17
    """Shortest clip that is kept of what is left, in frames."""
    frames_multiple: int = 1
    """Clips that were cut have 1 + k * this frames, as in split."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.min_frames < 1 or self.frames_multiple < 1:
            raise WorldloomError("frozen: seconds, min_frames and frames_multiple must be positive", got=self)


def cells(frame: Frame) -> np.ndarray:
    """Mean grey level of each cell, in steps of 1 / `LEVELS`: uint16 ``(CELLS * CELLS,)``."""
    cv2 = pictures.opencv()
    small = frame.grey(64).astype(np.float32)
    return np.round(cv2.resize(small, (CELLS, CELLS), interpolation=cv2.INTER_AREA).ravel() * LEVELS)


def stretches(levels: np.ndarray, tolerance: float, least: int) -> list[tuple[int, int]]:
    """``[start, end)`` of the stretches of at least `least` frames."""
    found: list[tuple[int, int]] = []
    began = 0
    for at in range(1, len(levels) + 1):
        if at == len(levels) or np.abs(levels[at] - levels[began]).max() > tolerance:
            if at - began >= least:
                found.append((began, at))
            began = at
    return found


class FrozenStage:
    """Cuts frozen stretches out; drops what is left where it is too short."""

    name = "frozen"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = FrozenConfig

    def __init__(self, config: FrozenConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return PerFrame(cells, kind=np.uint16)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [verdict for span in spans for verdict in self._cut(span, signals[span.source.key])]

    def _cut(self, span: Span, signals: Signals) -> list[Verdict]:
        limit = self.config.seconds
        levels = within(signals, span).astype(np.float32) / LEVELS
        least = max(2, round(limit * span.fps))
        every = stretches(levels, self.config.tolerance, 2)
        frozen = [(span.start + start, span.start + end) for start, end in every if end - start >= least]
        longest = max((end - start for start, end in every), default=0) / span.fps

        def verdict(part: Span, kept: bool) -> Verdict:
            if kept:
                reason = "the frozen stretches are cut off it" if frozen else "no frozen stretch is that long"
                return Verdict(part, True, "frozen seconds", 0.0 if frozen else longest, limit, reason)
            seconds = (part.end - part.start) / span.fps
            return Verdict(part, False, "frozen seconds", seconds, limit, "the picture stands still")

        def short(part: Span) -> Verdict:
            reason = f"{part.frames} frames are left beside a frozen stretch"
            return Verdict(part, False, "frames", float(part.frames), float(self.config.min_frames), reason)

        return cut_out(span, frozen, self.config.min_frames, self.config.frames_multiple, verdict, short)
