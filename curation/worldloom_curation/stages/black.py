"""Black: cut out stretches of black frames, as between shots and at the ends of fades.

A frame is black where at least `share` of its pixels are darker than `level`. Measured is, for every frame, the grey
level below which that share of the pixels lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.measures import PerFrame, cut_out, runs, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class BlackConfig:
    """Stretches of black frames."""

    level: float = 24.0
    """Grey level (0 to 255) under which a pixel is black."""
    share: float = 0.995
    """Share of the pixels that must be."""
    seconds: float = 0.1
    """Shortest stretch that is cut out."""
    min_frames: int = 17
    """Shortest clip that is kept of what is left, in frames."""
    frames_multiple: int = 1
    """Clips that were cut have 1 + k * this frames, as in split."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.min_frames < 1 or self.frames_multiple < 1:
            raise WorldloomError("black: share lies in (0, 1], min_frames and frames_multiple are at least 1", got=self)


class BlackStage:
    """Cuts black stretches out; drops what is left where it is too short."""

    name = "black"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("share",)
    Config = BlackConfig

    def __init__(self, config: BlackConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        share = self.config.share

        def level(frame: Frame) -> float:
            grey = frame.grey(64).ravel()
            at = min(len(grey) - 1, int(np.ceil(share * len(grey))) - 1)
            return float(np.partition(grey, at)[at])

        return PerFrame(level, kind=np.uint8)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [verdict for span in spans for verdict in self._cut(span, signals[span.source.key])]

    def _cut(self, span: Span, signals: Signals) -> list[Verdict]:
        limit = self.config.level
        levels = within(signals, span)
        found = runs(levels < limit, max(1, round(self.config.seconds * span.fps)))
        dark = [(span.start + start, span.start + end) for start, end in found]

        def verdict(part: Span, kept: bool) -> Verdict:
            level = float(np.median(levels[part.start - span.start : part.end - span.start]))
            reason = "black frames are cut off it" if kept and dark else "it is not black" if kept else "it is black"
            return Verdict(part, kept, "dark level", level, limit, reason)

        def short(part: Span) -> Verdict:
            reason = f"{part.frames} frames are left beside black ones"
            return Verdict(part, False, "frames", float(part.frames), float(self.config.min_frames), reason)

        return cut_out(span, dark, self.config.min_frames, self.config.frames_multiple, verdict, short)
