"""Nudity, faces and captions: the stages that keep a dataset safe, on what the guards of generation know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene

from worldloom import WorldloomError
from worldloom_curation import Source, Span
from worldloom_curation.stages.safety import SafetyConfig, SafetyStage
from worldloom_curation.stages.text_safety import TextSafetyConfig, TextSafetyStage

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


def test_a_frame_scored_high_drops_its_span_only() -> None:
    pytest.importorskip("nudenet")
    stage = SafetyStage(SafetyConfig(rate=2.0))
    observer = stage.observer(FILE, 20.0)
    assert observer is not None
    for frame in scene(1, 20):
        observer.add(frame)
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
