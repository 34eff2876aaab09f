"""Jerk: drop episodes whose actions are far more jerky than those of the run.

Jerk is the third difference of a position: of absolute actions the third, of relative ones (changes, velocities) the
second. Components are shares of their range over the run; an episode's jerk is the root mean square over steps and
components, per frame cubed, and is compared with the median over the run's spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom_curation.robot import ActionSpace, action_spaces, space_of, span_actions
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class JerkConfig:
    """Episodes with jerky actions."""

    threshold: float = 8.0
    """Most jerk, as a multiple of the median of the run's spans; more drops the span."""
    kind: Literal["auto", "absolute", "relative"] = "auto"
    """Actions are targets (absolute) or changes (relative); auto compares them with the state, if there is one."""


class JerkStage:
    """Keeps spans whose jerk is not far above the run's. The clip's metadata gets ``jerk``."""

    name = "jerk"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ()
    Config = JerkConfig

    def __init__(self, config: JerkConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        spaces = action_spaces((span.source for span in spans), self.config.kind)
        measured: list[float | None] = []
        groups: dict[tuple[str, ...], list[float]] = {}
        for span in spans:
            actions = span_actions(span)
            space = None if actions is None or not len(actions) else space_of(span, spaces)
            value = None if actions is None or space is None else jerk(actions, space)
            measured.append(value)
            if space is not None and value is not None:
                groups.setdefault(space.names, []).append(value)
        usual = {names: float(np.median(values)) for names, values in groups.items()}
        verdicts: list[Verdict] = []
        for span, value in zip(spans, measured, strict=True):
            if value is None:
                verdicts.append(Verdict(span, True, reason="it has no actions that could be jerky"))
                continue
            middle = usual[space_of(span, spaces).names]
            ratio = value / middle if middle > 0 else None
            kept = value == 0 if ratio is None else ratio <= self.config.threshold
            reason = "most spans have no jerk at all" if ratio is None else f"{ratio:.1f} times the usual jerk"
            marked = replace(span, notes={**span.notes, "jerk": round(value, 6)})
            verdicts.append(Verdict(marked, kept, "jerk ratio", ratio, self.config.threshold, reason))
        return verdicts


def jerk(actions: np.ndarray, space: ActionSpace) -> float | None:
    """Root mean square jerk of actions ``(n, a)`` in shares of their range per frame cubed.

    None where it means nothing: for choices, for fewer than 5 steps, and for values that are no numbers.
    """
    changing = space.extent > 0
    if space.kind == "choices" or len(actions) < 5 or not changing.any() or not np.isfinite(actions).all():
        return None
    scaled = actions[:, changing].astype(np.float64) / space.extent[changing]
    order = 3 if space.kind == "absolute" else 2
    return float(np.sqrt(np.mean(np.diff(scaled, n=order, axis=0) ** 2)))
