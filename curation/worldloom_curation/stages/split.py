"""Split: cut a source into spans, at shot boundaries or at a fixed length.

Shots, by one of two detectors:

- Mode ``shots``: that of PySceneDetect's `AdaptiveDetector`. It scores every small frame (mean change of hue,
  saturation and brightness against the frame before: ``content_val``) and holds the score against the average of its
  neighbours. The scores are kept and its two thresholds applied to them, so that other thresholds need no new decoding.
  (The package itself would look for edges too, which have no weight in the score and take most of its time.)
- Mode ``transnet``: TransNet V2, a network that knows dissolves and wipes too; slower by far. See `stages.shots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.pictures import opencv
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class SplitConfig:
    """Where clips begin and end. Lengths are those of the clips, after thinning to `fps`."""

    mode: Literal["shots", "transnet", "fixed", "whole"] = "shots"
    """Videos: cut into shots by PySceneDetect (shots) or TransNet V2 (transnet), at a fixed length, or not at all."""
    recorded: Literal["whole", "fixed"] = "whole"
    """Recorded episodes: kept whole, or cut at a fixed length (`max_frames`)."""
    min_frames: int = 17
    """Shortest clip, in frames."""
    min_seconds: float = 0.0
    """Shortest clip, in seconds; the stricter of the two holds."""
    max_frames: int = 300
    """Longest clip, in frames; a longer shot is cut into even pieces."""
    max_seconds: float = 10.0
    """Longest clip, in seconds; the stricter of the two holds. Recorded episodes and fixed cuts go by frames alone."""
    fps: float = 0.0
    """Thin videos to about this rate by taking every k-th frame, k = round(source / fps); 0 keeps every frame."""
    frames_multiple: int = 1
    """Clip lengths are 1 + k * this (4 suits a tokenizer with temporal ratio 4); 1 allows any length."""
    adaptive_threshold: float = 3.0
    """A cut changes this many times more than the frames around it (PySceneDetect's adaptive ratio)."""
    min_content: float = 15.0
    """A cut changes at least this much (PySceneDetect's content_val, 0 to 255)."""
    window: int = 2
    """Frames on each side that a cut is compared with."""
    scan_side: int = 100
    """Frames are halved until their short side has at most this many pixels, and scored so."""
    transition: float = 0.4
    """TransNet V2: probability over which a frame is part of a transition."""
    margin: float = 0.0
    """Seconds that are cut off each shot beside a cut, where players and codecs blend; 0.5 in cosmos-curate."""

    def __post_init__(self) -> None:
        for name in ("min_frames", "max_frames", "frames_multiple", "window", "scan_side"):
            if getattr(self, name) < 1:
                raise WorldloomError(f"split.{name} must be at least 1", got=getattr(self, name))
        if self.fps < 0 or self.margin < 0 or self.max_seconds <= 0:
            raise WorldloomError("split.fps and split.margin must not be negative, and split.max_seconds be positive")
        if not 0 < self.transition < 1:
            raise WorldloomError("split.transition lies between 0 and 1", got=self.transition)
        if self.min_frames > self.max_frames:
            raise WorldloomError(
                "split.min_frames is larger than split.max_frames", got=f"{self.min_frames} > {self.max_frames}"
            )


class ContentScores:
    """Collects ``content_val`` of small frames (float32; 0 for the first): the mean change of hue (0 to 179),
    saturation and brightness, as PySceneDetect's ContentDetector has it by its default weights."""

    def __init__(self, side: int) -> None:
        self._cv2, self._side = opencv(), side
        self._two: list[np.ndarray] = []  # the small frame and the one before it, as hue, saturation and brightness
        self._scores: list[float] = []

    def add(self, frame: Frame) -> None:
        small, known = frame.halved(self._side), len(self._scores) > 0
        self._two = self._two[::-1] if known else [np.empty_like(small), np.empty_like(small)]
        hsv = self._cv2.cvtColor(small, self._cv2.COLOR_RGB2HSV, self._two[0])
        self._scores.append(self._cv2.norm(hsv, self._two[1], self._cv2.NORM_L1) / hsv.size if known else 0.0)

    def result(self) -> dict[str, np.ndarray]:
        return {"content": np.asarray(self._scores, np.float32)}


def adaptive_ratio(content: np.ndarray, window: int, min_content: float) -> np.ndarray:
    """Score over the mean score of `window` frames on each side, at most 255; 0 where the window does not fit.

    PySceneDetect's AdaptiveDetector: where the neighbours do not change at all, the ratio is 255 if the score itself
    reaches `min_content`. ``(t,) -> (t,)``.
    """
    content = content.astype(np.float64)
    ratio = np.zeros_like(content)
    # Scores begin at frame 1 (frame 0 has no predecessor), but the detector does hold frame 0's zero in its window.
    for i in range(window, len(content) - window):
        around = (content[i - window : i].sum() + content[i + 1 : i + 1 + window].sum()) / (2 * window)
        if around >= 1e-5:
            ratio[i] = min(content[i] / around, 255.0)
        elif content[i] >= min_content:
            ratio[i] = 255.0
    return ratio


def find_cuts(content: np.ndarray, config: SplitConfig) -> list[int]:
    """The frames at which a new shot begins, as AdaptiveDetector finds them with no minimum scene length.

    Two cuts close together leave a sliver of a shot, which is dropped as too short; joined to a neighbour it would put
    a cut inside a clip.
    """
    ratio = adaptive_ratio(content, config.window, config.min_content)
    found = (ratio >= config.adaptive_threshold) & (content >= config.min_content)
    return [int(i) for i in np.flatnonzero(found)]


class SplitStage:
    """Turns the one span of a whole source into shots; the verdicts cover every frame of it exactly once."""

    name = "split"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("mode", "scan_side")
    Config = SplitConfig

    def __init__(self, config: SplitConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        mode = self._mode(source)
        if mode == "transnet":
            from worldloom_curation.stages.shots import ShotProbabilities

            return ShotProbabilities()
        return ContentScores(self.config.scan_side) if mode == "shots" else None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for span in spans:
            if self._mode(span.source) not in ("shots", "transnet"):
                verdicts += self._pieces(span, span.start, span.end, "")
                continue
            at, begun = span.start, "from the first frame"
            for end, start, found in [*self._transitions(span, signals[span.source.key]), (span.end, span.end, "")]:
                verdicts += self._shot(span, at, end, begun, cut=bool(found))
                verdicts += self._between(span, end, start)
                at, begun = start, found
        return verdicts

    def _transitions(self, span: Span, signals: Signals) -> list[tuple[int, int, str]]:
        """(end of a shot, start of the next, how it was found) within a span."""
        if self._mode(span.source) == "shots":
            content = signals["content"]
            cuts = [cut for cut in find_cuts(content, self.config) if span.start < cut < span.end]
            return [(cut, cut, f"from a cut (change {content[cut]:.1f})") for cut in cuts]
        from worldloom_curation.stages.shots import transitions

        probabilities = signals["shots"]
        found: list[tuple[int, int, str]] = []
        for end, start in transitions(probabilities, self.config.transition):
            highest = float(probabilities[end - 1 : start].max())
            how = "a cut" if start == end else f"a transition of {start - end + 1} frames"
            if span.start < end < span.end:
                found.append((end, min(start, span.end), f"from {how} (probability {highest:.2f})"))
        return found

    def _shot(self, span: Span, start: int, end: int, begun: str, cut: bool) -> list[Verdict]:
        """The pieces of one shot, less the margins beside its cuts.

        Args:
            begun: how the shot begins; a margin is cut off there unless it is the first of the span.
            cut: whether it ends with a cut.
        """
        margin = round(self.config.margin * span.fps)
        head = min(end, start + (margin if start > span.start else 0))
        tail = max(head, end - (margin if cut else 0))
        verdicts = self._beside(span, start, head)
        if head < tail:
            verdicts += self._pieces(span, head, tail, begun)
        return verdicts + self._beside(span, tail, end)

    def _beside(self, span: Span, start: int, end: int) -> list[Verdict]:
        if start == end:
            return []
        reason = f"within {self.config.margin:g} s of a cut"
        return [Verdict(replace(span, start=start, end=end), False, reason=reason)]

    def _between(self, span: Span, start: int, end: int) -> list[Verdict]:
        if start == end:
            return []
        reason = "a transition between two shots"
        return [Verdict(replace(span, start=start, end=end), False, reason=reason)]

    def _mode(self, source: Source) -> str:
        return self.config.recorded if source.recorded else self.config.mode

    def _pieces(self, span: Span, start: int, end: int, at_cut: str) -> list[Verdict]:
        """Cut ``[start, end)`` into clips of an allowed length; what is left over is a dropped span of its own."""
        mode = self._mode(span.source)
        step = 1 if span.source.recorded or not self.config.fps else max(1, round(span.fps / self.config.fps))
        shortest, longest = self._lengths(span.fps / step, end - start, mode)
        verdicts: list[Verdict] = []
        at = start
        while at < end:
            left = -(-(end - at) // step)
            count = min(left, longest)
            if mode in ("shots", "transnet") and left > longest:
                even = -(-left // -(-left // longest))  # even pieces rather than full ones and a stub
                count = even if self._trim(even) >= shortest else longest
            count = self._trim(count)
            if count < shortest:
                break
            stop = at + (count - 1) * step + 1
            stop = end if end - stop < step else stop  # thinning skips the last few frames: they belong to the clip
            what = "recorded episode" if span.source.recorded else "video" if mode in ("fixed", "whole") else "shot"
            if (at, stop) == (start, end):
                reason = f"{count} frames: {what} {at_cut}" if at_cut else f"{count} frames: the whole {what}"
            else:
                reason = f"{count} frames: part of a {what}"
            kept = replace(span, start=at, end=stop, step=step)
            verdicts.append(Verdict(kept, True, "frames", float(count), float(shortest), reason))
            at = stop
        if at < end:
            rest = replace(span, start=at, end=end, step=step)
            if rest.frames >= shortest:
                reason = (
                    f"{rest.frames} frames cannot be 1 + k * {self.config.frames_multiple} frames, at least {shortest}"
                )
            elif verdicts:
                reason = f"{rest.frames} frames left over, fewer than {shortest}"
            else:
                reason = f"{rest.frames} frames, fewer than {shortest}"
            verdicts.append(Verdict(rest, False, "frames", float(rest.frames), float(shortest), reason))
        return verdicts

    def _lengths(self, fps: float, frames: int, mode: str) -> tuple[int, int]:
        """Shortest and longest clip in frames; the longest is of the form 1 + k * `frames_multiple`."""
        shortest = max(self.config.min_frames, math.ceil(self.config.min_seconds * fps))
        if mode == "whole":
            return shortest, frames
        longest = self.config.max_frames
        if mode in ("shots", "transnet"):
            longest = min(longest, int(self.config.max_seconds * fps))
        return shortest, max(self._trim(longest), shortest) if longest >= 1 else shortest

    def _trim(self, frames: int) -> int:
        return 1 + (frames - 1) // self.config.frames_multiple * self.config.frames_multiple
