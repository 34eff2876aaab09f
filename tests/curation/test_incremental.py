"""What a run does again: what depends on what changed (content, settings, code), and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import decoding
from worldloom_curation.config import load
from worldloom_curation.pipeline import run
from worldloom_curation.stages import probe
from worldloom_curation.stages.motion import MotionStage


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three files, four shots of 24 frames."""
    write(tmp_path / "videos" / "a", np.concatenate([scene(1, 24), scene(2, 24)]), "mjpeg")
    write(tmp_path / "videos" / "b", scene(3, 24), "ffv1")
    write(tmp_path / "videos" / "c", scene(4, 24), "ffv1")
    return tmp_path / "videos"


def computed(videos: Path, out: Path, *overrides: str) -> dict[str, int]:
    """How much each step did, without those that did nothing."""
    work: dict[str, dict[str, int]] = run(videos, out, load(overrides=overrides))["work"]
    return {name: count["computed"] for name, count in work.items() if count["computed"]}


class Decoded:
    """Counts the frames that decoders give."""

    count = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = decoding.Reader.frames

        def counted(reader: decoding.Reader) -> Iterator[Any]:
            for frame in whole(reader):
                self.count += 1
                yield frame

        monkeypatch.setattr(decoding.Reader, "frames", counted)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


def test_a_source_is_decoded_once_for_all_stages(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Decoded(monkeypatch)
    looks, scan, encodes = 3, 96, 96  # a frame of each file for the probe; every frame; every frame of a kept clip
    run(videos, tmp_path / "one", load(overrides=["stages=['split']"]))
    assert decoded.taken() <= looks + scan + encodes + 3  # a reader may look one frame ahead of the last clip
    assert computed(videos, tmp_path / "one", "stages=['split']") == {}
    assert decoded.taken() == 0
    stages = "stages=['split','motion','duplicates']"
    run(videos, tmp_path / "three", load(overrides=[stages]))
    assert decoded.taken() <= looks + scan + encodes + 3
    # Two more stages over a run that has been through one: one more pass, and the clips are there.
    run(videos, tmp_path / "one", load(overrides=[stages]))
    assert decoded.taken() == scan


def test_other_settings_of_one_stage_do_that_stage_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert computed(videos, out) == {
        "probe": 3, "scan": 3, "split": 3, "motion": 4, "duplicates": 4, "caption": 4, "write": 4,
    }  # fmt: skip
    assert computed(videos, out) == {}
    assert computed(videos, out, "motion.threshold=0.1") == {"motion": 4}
    assert computed(videos, out, "motion.threshold=0.1", "write.samples_per_shard=2") == {}
    assert computed(videos, out, "motion.threshold=0.1", "write.crf=30") == {"write": 4}


def test_other_code_of_one_stage_does_that_stage_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(videos, out, load())
    monkeypatch.setattr(MotionStage, "version", MotionStage.version + 1)
    assert computed(videos, out) == {"scan": 3, "motion": 4}
    monkeypatch.setattr(probe, "VERSION", probe.VERSION + 1)
    assert computed(videos, out) == {"probe": 3}


def test_other_content_under_the_same_name_is_another_source(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(videos, out, load())
    write(videos / "b", scene(9, 24), "ffv1")
    again = computed(videos, out)
    assert (again["probe"], again["scan"], again["split"], again["write"]) == (1, 1, 1, 1)
    assert again["motion"] == 1
    (videos / "b.mkv").rename(videos / "d.mkv")
    moved = computed(videos, out)  # content has not changed: no pixel is looked at again
    assert {"probe", "scan", "write"} & moved.keys() == set()
