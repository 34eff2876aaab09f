"""Safety: drop spans in which nudity is seen.

NudeNet looks at some frames a second (package ``nudenet``; the classes are those that generated videos are refused
for, see `worldloom.detectors`). A span's value is the highest score of its frames. Faces are blurred where clips are
written: ``write.faces = "blur"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from worldloom.errors import WorldloomError
from worldloom_curation.measures import PerFrame, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom.detectors import NudityGuard
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class SafetyConfig:
    """Nudity."""

    threshold: float = 0.5
    """Score (0 to 1) from which on a span is dropped."""
    rate: float = 2.0
    """Frames a second that are looked at."""

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 < self.threshold <= 1:
            raise WorldloomError("safety: rate is positive, and threshold lies in (0, 1]", got=self)


@dataclass(frozen=True)
class _Known(SafetyConfig):
    detector: str = ""
    """What looks, and its version: part of the key of every result."""


class SafetyStage:
    """Keeps spans without nudity.

    Raises:
        WorldloomError: NudeNet is not installed.
    """

    name = "safety"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("rate", "detector")
    Config = SafetyConfig

    def __init__(self, config: SafetyConfig) -> None:
        from worldloom.detectors import NudityGuard

        # At this threshold it never stops at the first finding, but tells the highest score.
        self._guard: NudityGuard = NudityGuard(threshold=2.0, stride=1)
        self.config = _Known(**asdict(config), detector=self._guard.fingerprint)

    def observer(self, source: Source, fps: float) -> Observer | None:
        def score(frame: Frame) -> float:
            return float(self._guard.check_video(frame.rgb()[None]).facts["highest_score"])

        return PerFrame(score, max(1, round(fps / self.config.rate)))

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        limit = self.config.threshold
        for span in spans:
            value = float(within(signals[span.source.key], span).max())
            kept = value < limit
            reason = "no nudity is seen" if kept else "nudity is seen"
            verdicts.append(Verdict(span, kept, "nudity score", value, limit, reason))
        return verdicts
