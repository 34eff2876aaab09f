"""Text safety: drop spans whose caption the guards of prompts refuse: the blocklist, and every registered classifier.

They are the same guards that prompts go through before generation (`worldloom.guardrails`), so that nothing is trained
on what could not be asked for. Comes after the stages that write captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from worldloom.guardrails import Blocked, GuardrailConfig, Guardrails
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals

_PICTURES = ("nudity", "faces")  # guards of videos, which captions do not need


@dataclass(frozen=True)
class TextSafetyConfig:
    """What captions are checked for."""

    blocklist: Path | None = None
    """A file of more blocked words and phrases, one a line; see `worldloom.blocklist`."""
    classifiers: bool = True
    """Ask the registered classifiers too, not only the blocklist."""
    require: bool = False
    """Refuse to run where a registered classifier cannot; else the verdicts' reasons say that it did not."""


@dataclass(frozen=True)
class _Known:
    """What the results depend on: name and fingerprint of each guard, or why it does not run."""

    guards: tuple[tuple[str, str], ...]


class TextSafetyStage:
    """Keeps spans whose caption passes; one without a caption passes.

    Raises:
        WorldloomError: a blocklist that cannot be read, or a classifier that is required and cannot run.
    """

    name = "text_safety"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = TextSafetyConfig

    def __init__(self, config: TextSafetyConfig) -> None:
        from worldloom import registry
        from worldloom.errors import WorldloomError

        others = tuple(name for name in registry.names("guards") if name not in _PICTURES)
        skip = (*_PICTURES, *(() if config.classifiers else others))
        self._guards = Guardrails(GuardrailConfig(blocklist=config.blocklist, skip=skip))
        checked = {name: what for name, what in self._guards.identity().items() if name not in skip}
        # A guard that runs gives a fingerprint; the record of a text says which did not.
        self._silent = [
            f"{finding.guard}: {finding.detail}"
            for finding in self._guards.before("a street in the rain")
            if finding.outcome == "skipped" and finding.guard not in skip
        ]
        if config.require and self._silent:
            raise WorldloomError("a guard of captions cannot run", got="; ".join(self._silent), do="install it")
        self.config = _Known(tuple(sorted(checked.items())))

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span) for span in spans]

    def _verdict(self, span: Span) -> Verdict:
        if not span.caption.strip():
            return Verdict(span, True, reason="there is no caption")
        try:
            passed = [finding.guard for finding in self._guards.before(span.caption) if finding.outcome == "passed"]
        except Blocked as blocked:
            last = blocked.findings[-1]
            return Verdict(span, False, "refusals", 1.0, 1.0, f"{last.guard}: {last.detail}")
        reason = f"{', '.join(passed)} let it pass"
        reason += f"; did not run: {'; '.join(self._silent)}" if self._silent else ""
        return Verdict(span, True, "refusals", 0.0, 1.0, reason)
