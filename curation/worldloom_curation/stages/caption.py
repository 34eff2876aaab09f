"""Caption: words for an episode: the task it was recorded for, else what the recorder knows. Videos get none here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals

_FIELDS = ("view", "env", "actions")

_VIEWS = {"vizdoom": "first-person view", "ale/": "video game screen", "minigrid": "map view from above"}
"""How a family of environments shows its world, by the beginning of the environment id."""


@dataclass(frozen=True)
class CaptionConfig:
    """The caption of recorded episodes."""

    template: str = "{view}, {env}, actions: {actions}"
    """Text with {view}, {env} and {actions}; a part between commas whose field is empty is left out."""
    most_actions: int = 3
    """How many actions are named, the most frequent first."""
    video: str = ""
    """The caption of every clip that was not recorded; empty for none."""

    def __post_init__(self) -> None:
        try:
            self.template.format(**dict.fromkeys(_FIELDS, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise WorldloomError(
                f"caption.template has a field that is not known: {error}",
                got=self.template,
                do=f"use {', '.join('{' + name + '}' for name in _FIELDS)}",
            ) from error


def frequent_actions(actions: np.ndarray, names: Sequence[str], start: int, end: int) -> list[str]:
    """Names of the actions taken in frames ``[start, end)``, the most frequent first.

    ``(T-1, a)`` with one name per column: an action counts where its column is at least half on. Columns of another
    kind (continuous controls) have no names that a sentence could use, and give nothing. Doing nothing is no action.
    """
    taken = actions[start : max(start, end - 1)]
    if len(names) != taken.shape[-1] or not len(taken) or not np.isin(taken, (0.0, 1.0)).all():
        return []
    counts = (taken > 0.5).sum(axis=0)
    order = sorted(range(len(names)), key=lambda i: (-int(counts[i]), i))
    return [str(names[i]) for i in order if counts[i] and names[i].lower() != "noop"]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Fill a template part by part, leaving out the parts that hold an empty field."""
    parts = []
    for part in template.split(", "):
        fields = [name for name in _FIELDS if "{" + name + "}" in part]
        if all(values.get(name) for name in fields):
            parts.append(part.format(**{name: values.get(name, "") for name in _FIELDS}))
    return ", ".join(parts)


def words(name: str) -> str:
    """An action's name as words: ``MOVE_FORWARD+TURN_LEFT`` -> ``move forward and turn left``."""
    return " ".join(name.replace("_", " ").replace("+", " and ").lower().split())


class CaptionStage:
    """Gives every span its caption; drops nothing."""

    name = "caption"
    version = 2
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = CaptionConfig

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for span in spans:
            text = self._caption(span) if span.source.recorded else self.config.video
            reason = text or "nothing to write a caption from"
            verdicts.append(Verdict(replace(span, caption=text), True, reason=reason))
        return verdicts

    def _caption(self, span: Span) -> str:
        facts: Mapping[str, Any] = span.source.facts
        if facts.get("task"):
            return str(facts["task"])
        names = [words(str(name)) for name in facts.get("action_names") or ()]
        env, actions = str(facts.get("env_id", "")), span.source.actions
        taken = [] if actions is None else frequent_actions(actions, names, span.start, span.end)
        values = {
            "view": next((view for begin, view in _VIEWS.items() if env.lower().startswith(begin)), ""),
            "env": re.sub(r"-v\d+$", "", env).rpartition("/")[2],
            "actions": ", ".join(taken[: self.config.most_actions]),
        }
        known = values["env"] or values["actions"]
        return fill(self.config.template, values) if known else str(facts.get("caption", ""))
