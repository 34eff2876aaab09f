"""Idle: trim the still ends of a robot's episodes, and drop episodes in which nothing is done at all.

A frame is still if in the `gap` seconds that follow it both the actions do next to nothing and next to nothing moves in
the picture. How much an action does is a share of the range of its component over the whole run, so that a joint's
radians and a gripper's per cent compare, and the noise of an episode at rest is not taken for action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.robot import ActionSpace, action_spaces, space_of, span_actions
from worldloom_curation.stage import Observer, Source, Span, Verdict
from worldloom_curation.stages.motion import FrameChanges

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class IdleConfig:
    """Episodes and ends of episodes in which nothing is done."""

    action_threshold: float = 0.02
    """An action under this share of the range of its component does nothing."""
    motion_threshold: float = 0.4
    """Less motion than this, in grey levels (0 to 255) over `gap` seconds, is none."""
    drop_share: float = 0.95
    """A span of which this share of frames is still is dropped whole."""
    trim: bool = True
    """Cut still frames off the ends of the others."""
    trim_seconds: float = 0.5
    """Shorter still ends are left alone; of longer ones, `margin` seconds stay."""
    margin: float = 0.2
    """Seconds of stillness that stay at a trimmed end."""
    gap: float = 0.25
    """Seconds over which motion and actions are looked at."""
    kind: Literal["auto", "absolute", "relative"] = "auto"
    """Actions are targets (absolute) or changes (relative); auto compares them with the state, if there is one."""
    min_frames: int = 17
    """A span that would become shorter by trimming is not trimmed."""
    frames_multiple: int = 1
    """Lengths after trimming are 1 + k * this, by leaving stillness at the end; see split.frames_multiple."""
    side: int = 32
    """Short side of the frames that are compared, in pixels; smaller averages more of a camera's noise away."""

    def __post_init__(self) -> None:
        if not 0 < self.drop_share <= 1 or self.frames_multiple < 1 or self.min_frames < 1 or self.gap <= 0:
            raise WorldloomError(
                "idle: drop_share lies in (0, 1], gap is positive, min_frames and frames_multiple are at least 1",
                got=self,
            )


class IdleStage:
    """Drops idle spans and trims idle ends; what is cut off is a dropped span of its own. Needs actions."""

    name = "idle"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ("gap", "side")
    Config = IdleConfig

    def __init__(self, config: IdleConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return FrameChanges(self.config.side, self._gap(fps)) if source.actions is not None else None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        spaces = action_spaces((span.source for span in spans), self.config.kind)
        verdicts: list[Verdict] = []
        for span in spans:
            actions = span_actions(span)
            if actions is None or span.end - span.start < 2:
                verdicts.append(Verdict(span, True, reason="it has no actions"))
                continue
            still = self._still(span, actions, space_of(span, spaces), signals[span.source.key])
            verdicts += self._verdicts(span, still)
        return verdicts

    def _gap(self, fps: float) -> int:
        return max(1, round(self.config.gap * fps))

    def _still(self, span: Span, actions: np.ndarray, space: ActionSpace, signals: Signals) -> np.ndarray:
        """For every frame but the last of the span, whether nothing is done in the `gap` after it."""
        gap = int(signals["gap"])
        steps = len(actions)
        at = np.arange(span.start, span.start + steps)
        # changes[t] compares frame t with frame t - gap; near the end the last comparison inside the span counts.
        later = np.minimum(at + gap, span.end - 1)
        moved = signals["changes"][later].astype(np.float64)
        moved = np.where(np.isnan(moved), np.inf, moved) if span.end - span.start > gap else np.full(steps, np.inf)
        activity = space.activity(actions, gap)
        return (moved < self.config.motion_threshold) & (activity < self.config.action_threshold)

    def _verdicts(self, span: Span, still: np.ndarray) -> list[Verdict]:
        share, limit = float(still.mean()), self.config.drop_share
        if share >= limit:
            reason = f"nothing is done in {round(100 * share)} % of its frames"
            return [Verdict(span, False, "idle share", share, limit, reason)]
        doing = np.flatnonzero(~still)
        fps = span.fps
        least, margin = round(self.config.trim_seconds * fps), round(self.config.margin * fps)
        head, tail = int(doing[0]), len(still) - 1 - int(doing[-1])
        start = span.start + (head - margin if head >= max(least, margin + 1) else 0)
        end = span.end - (tail - margin if tail >= max(least, margin + 1) else 0)
        longer = -(end - start - 1) % self.config.frames_multiple
        end = min(span.end, end + longer)
        start -= -(end - start - 1) % self.config.frames_multiple
        if not self.config.trim or (start, end) == (span.start, span.end) or end - start < self.config.min_frames:
            return [Verdict(span, True, "idle share", share, limit, "something is done")]
        if start < span.start:  # no length of that form fits
            return [Verdict(span, True, "idle share", share, limit, "something is done; too short to trim")]
        kept = Verdict(
            replace(span, start=start, end=end), True, "idle share", share, limit, "its idle ends are cut off"
        )
        verdicts: list[Verdict] = []
        if start > span.start:
            before = replace(span, end=start)
            verdicts.append(Verdict(before, False, "idle share", 1.0, limit, "nothing is done yet"))
        verdicts.append(kept)
        if end < span.end:
            after = replace(span, start=end)
            verdicts.append(Verdict(after, False, "idle share", 1.0, limit, "nothing is done any more"))
        return verdicts
