"""Outliers: drop episodes with actions that are not numbers, or far from all the others.

A value's distance is its robust z-score: from the median of its component over the run, in units of 1.4826 times the
median absolute deviation (Iglewicz and Hoaglin 1993). Choices (zeros and ones) have no outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom_curation.robot import ActionSpace, action_spaces, space_of, span_actions
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class OutliersConfig:
    """Actions far from all the others."""

    threshold: float = 12.0
    """Largest robust z-score of any component of any action; more drops the span. Infinite values always do."""
    max_steps: int = 0
    """How many steps over the threshold are let pass."""


class OutliersStage:
    """Keeps spans without outlying actions. Sees the whole run, whose actions are what a value is compared with."""

    name = "outliers"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ()
    Config = OutliersConfig

    def __init__(self, config: OutliersConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        spaces = action_spaces(span.source for span in spans)
        return [self._verdict(span, spaces) for span in spans]

    def _verdict(self, span: Span, spaces: Mapping[tuple[str, ...], ActionSpace]) -> Verdict:
        actions = span_actions(span)
        if actions is None or not len(actions):
            return Verdict(span, True, reason="it has no actions")
        space = space_of(span, spaces)
        wrong = np.argwhere(~np.isfinite(actions))
        if len(wrong):
            step, component = wrong[0]
            where = f"{space.names[component]} at frame {span.start + step}"
            return Verdict(span, False, "robust z", None, self.config.threshold, f"{where} is no finite number")
        if space.kind == "choices":
            return Verdict(span, True, reason="its actions are choices")
        z = scores(actions, space)
        step, component = np.unravel_index(int(z.argmax()), z.shape)
        value, over = float(z.max()), int((z.max(axis=1) > self.config.threshold).sum())
        reason = f"{space.names[component]} at frame {span.start + step} is {actions[step, component]:.4g}"
        reason += f" (median {space.median[component]:.4g})" + (f", {over} steps over" if over else "")
        return Verdict(span, over <= self.config.max_steps, "robust z", value, self.config.threshold, reason)


def scores(actions: np.ndarray, space: ActionSpace) -> np.ndarray:
    """Robust z-scores ``(n, a)`` of actions ``(n, a)``; 0 for components that never change."""
    spread = np.where(space.deviation > 0, space.deviation, 1.0)
    return np.where(space.deviation > 0, np.abs(actions.astype(np.float64) - space.median) / spread, 0.0)
