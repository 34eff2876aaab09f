"""Success: drop episodes that failed at their task, by the flag that was recorded with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class SuccessConfig:
    """Episodes that failed at their task."""

    keep: Literal["successes", "failures", "all"] = "successes"
    """Which are kept; all only writes the flag into the ledger."""
    keep_unknown: bool = True
    """Keep episodes without a flag, and videos."""


class SuccessStage:
    """Keeps episodes by their success flag, the fact ``success`` (LeRobot's ``next.success``)."""

    name = "success"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = SuccessConfig

    def __init__(self, config: SuccessConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for span in spans:
            flag = span.source.facts.get("success")
            if flag is None:
                kept = self.config.keep_unknown
                verdicts.append(Verdict(span, kept, reason="nothing says whether it succeeded"))
                continue
            wanted = {"successes": bool(flag), "failures": not flag, "all": True}[self.config.keep]
            reason = "it succeeded" if flag else "it failed at its task"
            verdicts.append(Verdict(span, wanted, "success", float(bool(flag)), None, reason))
        return verdicts
