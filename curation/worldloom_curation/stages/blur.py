"""Blur: drop spans that are out of focus or smeared.

The measure is that of Crété, Dolmière, Ladret and Nicolas (2007), "The blur effect: perception and estimation with a
new no-reference perceptual blur metric": the picture is blurred once more, and it is asked how much of the difference
between neighbouring pixels is lost by it. A sharp picture loses most of it, a blurred one little. 0 is sharp, 1 is
blurred. Here it is the median over the frames looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation import pictures
from worldloom_curation.measures import PerFrame, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals

_FILTER = 9  # pixels of the mean filter, as in the paper


@dataclass(frozen=True)
class BlurConfig:
    """Out of focus."""

    threshold: float = 0.7
    """Most blur (0 to 1); a span with more is dropped."""
    side: int = 256
    """Short side at which it is measured, in pixels; a picture that is sharp there need not be at its own size."""
    rate: float = 2.0
    """Frames a second that are looked at."""

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.side < 32:
            raise WorldloomError("blur: rate is positive, side is at least 32", got=self)


def blur(grey: np.ndarray) -> float:
    """The blur of a picture, uint8 ``(h, w)``: the worse of its two directions; 1 for a plain one."""
    cv2 = pictures.opencv()
    image = grey.astype(np.float32)
    worst = 0.0
    for axis, size in ((0, (1, _FILTER)), (1, (_FILTER, 1))):
        smooth = cv2.blur(image, size, borderType=cv2.BORDER_REFLECT)
        before = np.abs(np.diff(image, axis=axis))
        lost = np.maximum(0, before - np.abs(np.diff(smooth, axis=axis)))
        total = float(before.sum())
        worst = max(worst, (total - float(lost.sum())) / total if total else 1.0)
    return worst


class BlurStage:
    """Keeps sharp spans."""

    name = "blur"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("side", "rate")
    Config = BlurConfig

    def __init__(self, config: BlurConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        side = self.config.side
        return PerFrame(lambda frame: blur(frame.grey(side)), max(1, round(fps / self.config.rate)))

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        limit = self.config.threshold
        for span in spans:
            value = float(np.median(within(signals[span.source.key], span)))
            kept = value <= limit
            verdicts.append(Verdict(span, kept, "blur", value, limit, "it is sharp" if kept else "it is blurred"))
        return verdicts
