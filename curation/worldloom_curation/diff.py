"""`curate diff`: which frames of which sources met another fate in one run than in another, and why.

Clips of two runs need not begin and end at the same frames, so fates are compared frame by frame: every frame ends in a
clip that was written, or in a span that a stage dropped or that failed (see `ledger.fates`). Neighbouring frames with
the same two fates make one change.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from worldloom.schema import Decision
from worldloom_curation.ledger import fate_of, fates


@dataclass(frozen=True)
class Change:
    """Frames ``[start, end)`` of a source whose fate changed."""

    source: str
    start: int
    end: int
    before: Decision | None
    """The row that sealed their fate in the first run; None if it did not have them."""
    after: Decision | None
    """The same of the second run."""
    stage: str
    """The stage that explains it; empty where none does (the source is new, or gone)."""
    measure: str
    value: tuple[float | None, float | None]
    """What that stage measured, before and after; None where it was not asked."""
    threshold: tuple[float | None, float | None]
    why: str
    """One sentence."""

    @property
    def fate(self) -> tuple[str, str]:
        """Before and after: kept, dropped, failed or absent."""
        return fate_of(self.before), fate_of(self.after)

    def as_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "source": self.source,
            "start": self.start,
            "end": self.end,
            "fate": list(self.fate),
            "clips": [row.clip_id if row is not None else None for row in (self.before, self.after)],
            "stage": self.stage,
            "measure": self.measure,
            "value": list(self.value),
            "threshold": list(self.threshold),
            "why": self.why,
            "before": asdict(self.before) if self.before is not None else None,
            "after": asdict(self.after) if self.after is not None else None,
        }


def diff(before: Sequence[Decision], after: Sequence[Decision]) -> list[Change]:
    """The changes from one ledger to another, by source and frame; none if every frame met the same fate."""
    sides = (_by_source(before), _by_source(after))
    ran = ({row.stage for row in before}, {row.stage for row in after})
    changes: list[Change] = []
    for source in dict.fromkeys([*sides[0], *sides[1]]):
        rows = (sides[0].get(source, []), sides[1].get(source, []))
        ends = (fates(rows[0]), fates(rows[1]))
        edges = sorted({edge for side in ends for row in side for edge in (row.start, row.end)})
        last: tuple[Decision | None, Decision | None] | None = None
        for start, end in itertools.pairwise(edges):
            pair = (_at(ends[0], start), _at(ends[1], start))
            if not _differ(*pair):
                last = None
            elif pair == last:
                changes[-1] = _explain(source, changes[-1].start, end, pair, rows, ran)
            else:
                changes.append(_explain(source, start, end, pair, rows, ran))
                last = pair
    return changes


def _by_source(rows: Sequence[Decision]) -> dict[str, list[Decision]]:
    found: dict[str, list[Decision]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return found


def _at(rows: Sequence[Decision], frame: int, stage: str = "") -> Decision | None:
    """The last row (of a stage) about a frame."""
    return next(
        (row for row in reversed(rows) if row.start <= frame < row.end and (not stage or row.stage == stage)), None
    )


def _differ(before: Decision | None, after: Decision | None) -> bool:
    if before is None or after is None:
        return before is not after
    if fate_of(before) != "kept":
        return (fate_of(before), before.stage) != (fate_of(after), after.stage)
    return fate_of(after) != "kept" or before.clip_id != after.clip_id


def _explain(
    source: str,
    start: int,
    end: int,
    pair: tuple[Decision | None, Decision | None],
    rows: tuple[Sequence[Decision], Sequence[Decision]],
    ran: tuple[set[str], set[str]],
) -> Change:
    stage, measure, why = "", "", ""
    value: tuple[float | None, float | None] = (None, None)
    threshold: tuple[float | None, float | None] = (None, None)
    before, after = pair
    if not rows[0] or not rows[1]:
        why = "the source is new" if not rows[0] else "the source is gone"
    elif _content(rows[0]) != _content(rows[1]):
        why = "the content of the source changed"
    elif before is None or after is None:
        why = "other frames of the source decode"
    else:
        stage = _decisive(before, after, rows, start)
        one, two = (_at(side, start, stage) for side in rows)
        measure = next((row.measure for row in (two, one) if row is not None and row.measure), "")
        value = (one and one.value, two and two.value)
        threshold = (one and one.threshold, two and two.threshold)
        why = _sentence(stage, one, two, ran)
    return Change(source, start, end, before, after, stage, measure, value, threshold, why)


def _content(rows: Sequence[Decision]) -> str:
    """The id of the whole source: a hash of its bytes and its length."""
    return next((row.clip_id for row in rows if row.stage == "probe" and row.start == 0), "")


def _decisive(
    before: Decision, after: Decision, rows: tuple[Sequence[Decision], Sequence[Decision]], frame: int
) -> str:
    """The stage that one run lost the frames at and the other did not; split, where both keep them in other clips."""
    if fate_of(before) == fate_of(after) == "kept":
        return "split"
    # If the second run lost them at a stage that the first run passed, that is the reason; else it passed one that
    # the first run lost them at.
    if fate_of(after) != "kept":
        passed = _at(rows[0], frame, after.stage)
        if fate_of(before) == "kept" or (passed is not None and passed.kept):
            return after.stage
        if before.stage != after.stage and _at(rows[1], frame, before.stage) is None:
            return after.stage
    return before.stage


def _sentence(stage: str, one: Decision | None, two: Decision | None, ran: tuple[set[str], set[str]]) -> str:
    if stage not in ran[0]:
        return f"{stage} is a new stage: {two.reason}" if two is not None else f"{stage} is a new stage"
    if stage not in ran[1]:
        return f"{stage} is no longer asked"
    if one is None or two is None:
        row = two or one
        return f"{stage}: {row.reason}" if row is not None else stage
    parts: list[str] = []
    if one.threshold != two.threshold:
        parts.append(f"threshold {_number(one.threshold)} -> {_number(two.threshold)}")
    if one.value != two.value:
        parts.append(f"{two.measure or one.measure} {_number(one.value)} -> {_number(two.value)}")
    elif two.value is not None:
        parts.append(f"{two.measure} {_number(two.value)}")
    if (one.start, one.end) != (two.start, two.end):
        parts.append(f"span [{one.start}, {one.end}) -> [{two.start}, {two.end})")
    elif two.failed or (one.threshold == two.threshold and one.value == two.value):
        parts.append(two.reason)
    return f"{stage}: {', '.join(parts)}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def tally(changes: Sequence[Change]) -> dict[str, dict[str, int]]:
    """``"kept -> dropped"`` and so on: how many changes, and how many frames."""
    counts: dict[str, dict[str, int]] = {}
    for change in changes:
        name = " -> ".join(change.fate)
        count = counts.setdefault(name, {"changes": 0, "frames": 0})
        count["changes"] += 1
        count["frames"] += change.end - change.start
    return counts


def report(before: Sequence[Decision], after: Sequence[Decision]) -> Mapping[str, Any]:
    """The whole comparison, JSON-serialisable."""
    changes = diff(before, after)
    return {"tally": tally(changes), "changes": [change.as_json() for change in changes]}
