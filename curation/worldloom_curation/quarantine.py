"""Quarantine: what a stage raises on one clip costs that clip, and the ledger holds the traceback.

Not every exception: a package that is not installed (`MissingPackage`) would fail on all clips alike and ends the run.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worldloom.errors import MissingPackage, WorldloomError
from worldloom_curation.stage import Source, Span, Stage, Verdict
from worldloom_curation.stages.probe import sentence

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
"""Of an object in memory: another one in every process."""


@dataclass(frozen=True)
class Failure:
    """Why something could not be done."""

    reason: str
    """One line for a person."""
    traceback: str = ""
    """Empty where the reason says all there is to know: a damaged file, a limit."""


def failure(error: Exception, source: Source, *, expected: bool = False) -> Failure:
    """An exception as the ledger holds it: equal for equal runs, wherever the files and the objects lie.

    Args:
        expected: the reason is enough, without a traceback.
    """
    reason = _ADDRESS.sub("0x...", sentence(error, source.path, "the file"))
    if expected:
        return Failure(reason)
    if not isinstance(error, WorldloomError):
        kind = type(error).__name__
        reason = kind if reason == kind else f"{kind}: {reason}"
    text = "".join(traceback.format_exception(error)).replace(source.path, source.name)
    return Failure(reason, _ADDRESS.sub("0x...", text))


def decide(
    stage: Stage, spans: Sequence[Span], signals: Mapping[str, Signals], broken: Mapping[str, Failure]
) -> list[Verdict]:
    """`stage.decide`, whatever it raises: verdicts in order, and failed ones for the spans that it raises on.

    A stage that raises on all spans together is asked about each alone, and then about all those that went well. If
    that raises too, there is no telling which span is to blame, and all of them fail.

    Args:
        broken: source key -> why the stage's observer has collected nothing there.

    Raises:
        MissingPackage: what the stage needs is not installed.
    """
    failed = {number: broken[span.source.key] for number, span in enumerate(spans) if span.source.key in broken}
    good = [number for number in range(len(spans)) if number not in failed]
    verdicts, error = _attempt(stage, [spans[number] for number in good], signals)
    if error is not None and len(good) > 1:
        for number in good:
            _, alone = _attempt(stage, [spans[number]], signals)
            if alone is not None:
                failed[number] = failure(alone, spans[number].source)
        good = [number for number in good if number not in failed]
        verdicts, error = _attempt(stage, [spans[number] for number in good], signals)
    if error is not None:
        failed.update((number, failure(error, spans[number].source)) for number in good)
    if not failed:
        return verdicts
    verdicts += [
        Verdict(spans[number], False, reason=why.reason, failed=True, traceback=why.traceback)
        for number, why in failed.items()
    ]
    rank = {name: number for number, name in enumerate(dict.fromkeys(span.source.name for span in spans))}
    return sorted(verdicts, key=lambda verdict: (rank[verdict.span.source.name], verdict.span.start))


def _attempt(
    stage: Stage, spans: Sequence[Span], signals: Mapping[str, Signals]
) -> tuple[list[Verdict], Exception | None]:
    """The verdicts, or none and what was raised; verdicts that do not account for every frame count as raised."""
    if not spans:
        return [], None
    try:
        verdicts = list(stage.decide(spans, signals))
        given, got = (_frames(part) for part in (spans, [verdict.span for verdict in verdicts]))
        if given != got:
            lost = sorted(name for name in given | got if given.get(name) != got.get(name))
            raise WorldloomError(f"the verdicts of {stage.name} do not cover the frames that it was given", got=lost)
    except MissingPackage:
        raise
    except Exception as error:
        return [], error
    return verdicts, None


def _frames(spans: Sequence[Span]) -> dict[str, int]:
    """Frames in spans, by source."""
    count: dict[str, int] = {}
    for span in spans:
        count[span.source.name] = count.get(span.source.name, 0) + span.end - span.start
    return count
