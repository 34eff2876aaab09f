"""Exposure: drop spans that are too dark or too bright to show anything.

The measure: the share of pixels whose grey level is between `dark` and `bright`, the mean over the frames looked at.
The default asks for little, since drawings on black and objects before white are well exposed and have few such pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.measures import PerFrame, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class ExposureConfig:
    """Too dark, too bright."""

    threshold: float = 0.01
    """Least share of pixels (0 to 1) that are neither dark nor bright."""
    dark: int = 16
    """Grey level up to which a pixel is dark."""
    bright: int = 240
    """Grey level from which on a pixel is bright."""
    rate: float = 4.0
    """Frames a second that are looked at."""

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 <= self.dark < self.bright <= 256:
            raise WorldloomError("exposure: rate is positive, and 0 <= dark < bright <= 256", got=self)


class ExposureStage:
    """Keeps spans in which something can be seen."""

    name = "exposure"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("dark", "bright", "rate")
    Config = ExposureConfig

    def __init__(self, config: ExposureConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        def shares(frame: Frame) -> np.ndarray:
            grey = frame.grey(64)
            return np.array([(grey <= self.config.dark).mean(), (grey >= self.config.bright).mean()])

        return PerFrame(shares, max(1, round(fps / self.config.rate)))

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        limit = self.config.threshold
        for span in spans:
            dark, bright = within(signals[span.source.key], span).astype(np.float64).mean(0).tolist()
            value = max(0.0, 1 - dark - bright)
            kept = value >= limit
            reason = f"{100 * dark:.0f} % of it is dark, {100 * bright:.0f} % bright"
            verdicts.append(Verdict(span, kept, "exposed share", value, limit, reason))
        return verdicts
