from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from curation_videos import scene, write

from worldloom.schema import Decision
from worldloom_curation.cli import curate
from worldloom_curation.config import load
from worldloom_curation.diff import diff, tally
from worldloom_curation.ledger import Discrepancy, load_ledger, reconcile
from worldloom_curation.pipeline import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots of 24 frames, one of which moves less; curated by default, and with a threshold between the two."""
    root = tmp_path_factory.mktemp("diff")
    write(root / "videos" / "a", np.concatenate([scene(1, 24, speed=1), scene(2, 24, speed=9)]), "ffv1")
    write(root / "videos" / "b", scene(3, 30, speed=9), "ffv1")
    run(root / "videos", root / "one")
    values = sorted(row.value for row in load_ledger(root / "one") if row.stage == "motion" and row.value is not None)
    shutil.copytree(root / "one", root / "two")
    run(root / "videos", root / "two", load(overrides=[f"motion.threshold={(values[0] + values[1]) / 2}"]))
    return root


def test_a_run_does_not_differ_from_itself(runs: Path) -> None:
    rows = load_ledger(runs / "one")
    assert diff(rows, rows) == []


def test_a_threshold_that_drops_a_clip_is_named_with_its_values(runs: Path) -> None:
    before, after = load_ledger(runs / "one"), load_ledger(runs / "two")
    [change] = diff(before, after)
    assert (change.source, change.start, change.end) == ("a.mkv", 0, 24)
    assert change.fate == ("kept", "dropped")
    assert (change.stage, change.measure) == ("motion", "motion")
    assert change.value[0] == change.value[1]
    assert change.threshold[0] == 0.25
    assert change.threshold[1] is not None
    assert change.value[1] is not None
    assert change.threshold[1] > change.value[1]
    assert change.why.startswith("motion: threshold 0.25 -> ")
    [back] = diff(after, before)
    assert back.fate == ("dropped", "kept")
    assert back.threshold == change.threshold[::-1]
    assert tally([change]) == {"kept -> dropped": {"changes": 1, "frames": 24}}


def test_the_command_prints_a_table_or_json(runs: Path) -> None:
    args = ["diff", str(runs / "one"), str(runs / "two")]
    table = CliRunner().invoke(curate, args)
    assert "kept -> dropped: 1 changes, 24 frames" in table.output
    assert "threshold 0.25 -> " in table.output
    found = json.loads(CliRunner().invoke(curate, [*args, "--json"]).output)
    assert found["tally"] == {"kept -> dropped": {"changes": 1, "frames": 24}}
    [change] = found["changes"]
    assert change["stage"] == "motion"
    assert change["before"]["stage"] == "write"
    assert change["after"]["reason"]
    same = CliRunner().invoke(curate, ["diff", str(runs / "one"), str(runs / "one")])
    assert same.output.strip() == "every frame met the same fate in both runs"


def row(source: str, start: int, end: int, stage: str, kept: bool = True, **rest) -> Decision:
    return Decision(f"{source}{start}-{end}", source, start, end, stage, kept, **rest)


def kept(source: str, *spans: tuple[int, int]) -> list[Decision]:
    rows = [row(source, 0, spans[-1][1], "probe")]
    return rows + [row(source, *span, stage) for stage in ("split", "blur", "write") for span in spans]


def lost(source: str, span: tuple[int, int], stage: str, **rest) -> list[Decision]:
    rows = [row(source, *span, "probe")]
    if stage != "split":
        rows.append(row(source, *span, "split"))
    return [*rows, row(source, *span, stage, False, **rest)]


def test_why_fates_change() -> None:
    def why(before: list[Decision], after: list[Decision]) -> list[tuple[int, int, str, str, str]]:
        return [(c.start, c.end, *c.fate, c.why) for c in diff(before, after)]

    assert why([], kept("a", (0, 9))) == [(0, 9, "absent", "kept", "the source is new")]
    assert why(kept("a", (0, 9)), []) == [(0, 9, "kept", "absent", "the source is gone")]
    other = [replace(item, clip_id="x" + item.clip_id) for item in kept("a", (0, 9))]
    assert why(kept("a", (0, 9)), other) == [(0, 9, "kept", "kept", "the content of the source changed")]
    cut = why(kept("a", (0, 9)), kept("a", (0, 4), (4, 9)))
    assert cut == [
        (0, 4, "kept", "kept", "split: span [0, 9) -> [0, 4)"),
        (4, 9, "kept", "kept", "split: span [0, 9) -> [4, 9)"),
    ]
    new = why(kept("a", (0, 9)), lost("a", (0, 9), "ocr", reason="words"))
    assert new == [(0, 9, "kept", "dropped", "ocr is a new stage: words")]
    gone = why(lost("a", (0, 9), "ocr"), kept("a", (0, 9)))
    assert gone == [(0, 9, "dropped", "kept", "ocr is no longer asked")]
    [failed] = why(kept("a", (0, 9)), lost("a", (0, 9), "blur", failed=True, reason="ValueError: no"))
    assert failed == (0, 9, "kept", "failed", "blur: ValueError: no")


def test_a_clip_that_is_dropped_earlier_or_later_is_explained_by_the_stage_that_changed_its_mind() -> None:
    early = lost("a", (0, 9), "split", measure="frames", value=9.0, threshold=17.0)
    late = [*lost("a", (0, 9), "blur", measure="sharpness", value=1.0, threshold=2.0)]
    late[1] = replace(late[1], measure="frames", value=9.0, threshold=5.0)
    [change] = diff(late, early)
    assert (change.stage, change.threshold, change.value) == ("split", (5.0, 17.0), (9.0, 9.0))
    [change] = diff(early, late)
    assert (change.stage, change.threshold) == ("split", (17.0, 5.0))


def test_every_frame_is_held_against_the_ledger_once() -> None:
    rows = [*kept("a", (0, 4), (4, 9)), *lost("b", (0, 5), "blur")]
    assert reconcile(rows) == []
    assert reconcile(rows, {"a": 9, "b": 5}) == []
    assert reconcile(rows, {"a": 10, "b": 5}) == [Discrepancy("a", 9, 10, 0)]
    assert reconcile(rows, {"a": 8, "b": 5}) == [Discrepancy("a", 8, 9, 1)]
    assert reconcile(rows, {"a": 9, "b": 5, "c": 2}) == [Discrepancy("c", 0, 2, 0)]
    # One frame lost and another counted twice: the sums agree, the frames do not.
    shifted = [replace(item, start=3, end=8) if (item.start, item.stage) == (4, "write") else item for item in rows]
    assert reconcile(shifted) == [Discrepancy("a", 3, 4, 2), Discrepancy("a", 8, 9, 0)]
