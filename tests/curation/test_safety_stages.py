"""Nudity, faces and captions: the stages that keep a dataset safe, on what the guards of generation know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write
from faces import passing_by

from worldloom import WorldloomError, media
from worldloom.detectors import FaceGuard
from worldloom.shards import open_dataset
from worldloom_curation import Frame, Source, Span
from worldloom_curation.config import load
from worldloom_curation.ledger import load_ledger
from worldloom_curation.pipeline import run
from worldloom_curation.scan import prepare
from worldloom_curation.stages import write as writing
from worldloom_curation.stages.safety import SafetyConfig, SafetyStage
from worldloom_curation.stages.text_safety import TextSafetyConfig, TextSafetyStage


def face_guard() -> FaceGuard:
    try:
        return FaceGuard()
    except WorldloomError as error:
        pytest.skip(str(error))


FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")
SPAN = Span(FILE, 0, 20, 20.0)


def test_captions_with_blocked_words_are_dropped_and_others_kept(tmp_path: Path) -> None:
    words = tmp_path / "more.txt"
    words.write_text("pine cone\n")
    stage = TextSafetyStage(TextSafetyConfig(blocklist=words, classifiers=False))
    captions = ["a street in the rain", "a nude figure", "a p1ne c0ne falls", ""]
    verdicts = stage.decide([replace(SPAN, caption=caption) for caption in captions], {})
    assert [verdict.kept for verdict in verdicts] == [True, False, False, True]
    assert verdicts[0].reason == "blocklist let it pass"
    assert verdicts[1].reason == "blocklist: it holds 'nude'"
    assert verdicts[3].reason == "there is no caption"


def test_what_a_blocklist_says_is_part_of_the_key(tmp_path: Path) -> None:
    words = tmp_path / "more.txt"
    words.write_text("pine cone\n")
    before = TextSafetyStage(TextSafetyConfig(blocklist=words, classifiers=False)).config
    words.write_text("pine cone\nfir\n")
    after = TextSafetyStage(TextSafetyConfig(blocklist=words, classifiers=False)).config
    assert before != after
    with pytest.raises(WorldloomError, match="cannot be read"):
        TextSafetyStage(TextSafetyConfig(blocklist=tmp_path / "none.txt"))


def test_captions_are_checked_in_a_run_and_a_changed_blocklist_checks_them_again(tmp_path: Path) -> None:
    write(tmp_path / "in" / "one", scene(1, 40))
    words = tmp_path / "more.txt"
    words.write_text("fir\n")
    settings = [
        "stages=['split','caption','text_safety','quality']",
        "caption.video='a pine cone falls'",
        f"text_safety.blocklist='{words}'",
        "text_safety.classifiers=false",
        "quality.threshold=-1000",
    ]
    summary = run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    assert (summary["clips"], summary["dropped"]["text_safety"]) == (1, 0)
    words.write_text("pine cone\n")
    prepare.cache_clear()  # as a new process would
    with pytest.raises(WorldloomError, match="no clip was kept"):
        run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    [row] = [row for row in load_ledger(tmp_path / "out") if row.stage == "text_safety"]
    assert (row.kept, row.reason) == (False, "blocklist: it holds 'pine cone'")


@pytest.mark.parametrize("count", [1, 4, 9, 12])
def test_faces_blurred_a_few_frames_at_a_time_are_those_blurred_at_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = face_guard()
    video = passing_by(count, 64)
    video[5:7] = 90  # nobody is there
    whole = guard.check_video(video).frames
    assert whole is not None
    monkeypatch.setattr(writing, "_FACES_AT_ONCE", 4)
    np.testing.assert_array_equal(np.stack(list(writing.without_faces(iter(video), guard))), whole)
    empty = scene(1, 5)
    np.testing.assert_array_equal(np.stack(list(writing.without_faces(iter(empty), guard))), empty)
    assert list(writing.without_faces(iter(()), guard)) == []


def test_clips_are_written_without_faces_where_asked(tmp_path: Path) -> None:
    guard = face_guard()
    write(tmp_path / "in" / "one", passing_by(20, 96))
    stages = "stages=['split']"
    run(tmp_path / "in", tmp_path / "out", load(overrides=[stages]))
    before = open_dataset(tmp_path / "out").load(0)
    run(tmp_path / "in", tmp_path / "out", load(overrides=[stages, "write.faces='blur'"]))
    after = open_dataset(tmp_path / "out").load(0)
    assert after.clip.metadata["faces"] == f"blurred by {guard.fingerprint}"
    assert "faces" not in before.clip.metadata
    assert before.clip.id == after.clip.id
    assert before.video is not None
    assert after.video is not None
    seen = [guard.check_video(media.read_frames(sample.video)).facts["frames_with_faces"] for sample in (before, after)]
    assert seen[0] >= 18
    assert seen[1] == 0


def test_a_frame_scored_high_drops_its_span_only() -> None:
    pytest.importorskip("nudenet")
    stage = SafetyStage(SafetyConfig(rate=2.0))
    observer = stage.observer(FILE, 20.0)
    assert observer is not None
    for frame in scene(1, 20):
        observer.add(Frame(frame))
    signals = observer.result()
    assert signals["values"].tolist() == [0.0, 0.0]  # NudeNet itself has looked
    scores = {"values": np.array([0.1, 0.1, 0.9, 0.1], np.float32), "every": signals["every"]}
    spans = [Span(FILE, 0, 20, 20.0), Span(FILE, 20, 40, 20.0)]
    first, second = stage.decide(spans, {"a": scores})
    assert (first.kept, second.kept) == (True, False)
    assert second.value == pytest.approx(0.9)
    assert (second.measure, second.threshold, second.reason) == ("nudity score", 0.5, "nudity is seen")
    assert "nudenet" in stage.config.detector


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError):
        SafetyConfig(threshold=0)
