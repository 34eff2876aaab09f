from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from curation_videos import scene
from hypothesis import given
from hypothesis import strategies as st

from worldloom import Clip, WorldloomError, media
from worldloom.cli import main
from worldloom.schema import clip_id
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_curation.export import FORMATS, ExportOptions, export
from worldloom_curation.formats.bins import COSMOS_RESOLUTIONS, bin_of, sort_clips, tars
from worldloom_curation.formats.cosmos import meta, span_uuid, windows

SHAPES = [(48, 64, 20, 10.0), (64, 48, 40, 10.0), (48, 48, 60, 10.0), (32, 80, 25, 5.0), (48, 64, 21, 10.0)]
"""(height, width, frames, fps) of the clips."""


def clip(height: int, width: int, frames: int, fps: float, seed: int = 0, caption: str = "") -> Clip:
    digest = f"{seed:064x}"
    facts = {"source_size": [height * 2, width * 2]}
    span = (clip_id(digest, 5, 5 + frames), "videos/a.mp4", digest, 5, 5 + frames)
    return Clip(*span, fps, width, height, caption=caption, metadata=facts)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("clips")
    with ShardWriter(root, samples_per_shard=3) as writer:
        for seed, (height, width, frames, fps) in enumerate(SHAPES):
            made = clip(height, width, frames, fps, seed, f"Scene {seed}." if seed % 2 == 0 else "")
            writer.write(ShardSample(made, media.write_video(None, scene(seed, frames, height, width), fps)))
    commit_dataset(root, writer.shards)
    return open_dataset(root)


def test_scores_are_exported_where_they_were_measured() -> None:
    plain = clip(48, 64, 20, 10.0)
    motion = {"global_mean": 0.002, "per_patch_min_256": 0.001}
    scored = replace(plain, metadata={**plain.metadata, "motion_score": motion, "aesthetic_score": 4.5})
    assert "motion_score" not in meta(plain, "a.mp4", 5, "model")
    assert meta(scored, "a.mp4", 5, "model")["motion_score"] == motion
    assert meta(scored, "a.mp4", 5, "model")["aesthetic_score"] == 4.5


# --- bins -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 200_000), st.floats(0.1, 240), st.booleans())
def test_every_clip_there_can_be_has_one_bin(width: int, height: int, frames: int, fps: float, cosmos: bool) -> None:
    found = bin_of(clip(height, width, frames, fps), COSMOS_RESOLUTIONS if cosmos else (256, 480, 720, 1080))
    low, high = found.duration.split("_")
    assert float(low) <= frames / fps < float(high)
    side = min(width, height)
    if found.resolution.startswith("lt_"):
        assert side < int(found.resolution[3:])
    else:
        assert side >= int(found.resolution)


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        ((720, 1280, 30, 10.0), "resolution_720/aspect_ratio_16_9/duration_2_5"),  # no hole from 2 to 5 s
        ((720, 1280, 50, 10.0), "resolution_720/aspect_ratio_16_9/duration_5_10"),
        ((1080, 1920, 100, 10.0), "resolution_1080/aspect_ratio_16_9/duration_10_30"),
        ((1919, 1080, 301, 10.0), "resolution_1080/aspect_ratio_9_16/duration_30_inf"),
        ((100, 2000, 1, 10.0), "resolution_lt_720/aspect_ratio_16_9/duration_0_2"),  # nor over 10:1
        ((719, 719, 19, 10.0), "resolution_lt_720/aspect_ratio_1_1/duration_0_2"),
        ((480, 640, 20, 10.0), "resolution_lt_720/aspect_ratio_4_3/duration_2_5"),
        ((640, 480, 20, 10.0), "resolution_lt_720/aspect_ratio_3_4/duration_2_5"),
    ],
)
def test_bins_are_where_they_are_said_to_be(shape: tuple[int, int, int, float], path: str) -> None:
    assert bin_of(clip(*shape), COSMOS_RESOLUTIONS).path == path


def test_tars_hold_all_clips_within_their_limits() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 57).tolist()
    parts = list(tars(sizes, 10, 250))
    assert [i for start, end in parts for i in range(start, end)] == list(range(57))
    assert all(end - start <= 10 and (sum(sizes[start:end]) <= 250 or end - start == 1) for start, end in parts)
    assert list(tars([500, 1], 10, 250)) == [(0, 1), (1, 2)]
    assert list(tars([], 10, 250)) == []


def test_binned_shards_are_datasets_and_their_counts_reconcile(dataset: Dataset, tmp_path: Path) -> None:
    counts = export(dataset, tmp_path / "bins", "webdataset", ExportOptions(clips_per_tar=1))
    assert counts["clips"] == sum(counts["bins"].values()) == len(SHAPES)
    assert json.loads((tmp_path / "bins/bins.json").read_text()) == counts["bins"]
    found = {}
    for place in counts["bins"]:
        part = open_dataset(tmp_path / "bins" / place)
        assert not part.verify()
        assert len(part.index.shards) == len(part)
        for sample in part:
            assert bin_of(sample.clip).path == place
            found[sample.clip.id] = sample.video
    assert found == {sample.clip.id: sample.video for sample in dataset}
    assert counts["bins"]["resolution_lt_256/aspect_ratio_4_3/duration_2_5"] == 2


def test_an_interrupted_export_leaves_what_is_done_alone(dataset: Dataset, tmp_path: Path) -> None:
    options = ExportOptions(clips_per_tar=1)
    for form in ("webdataset", "cosmos-shards", "cosmos-curate", "cosmos3", "cosmos-predict2.5", "plain"):
        out = tmp_path / form
        export(dataset, out, form, options)
        files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        data = sorted(path for path in files if path.suffix in (".tar", ".mp4"))
        kept, lost = data[0], data[-1]
        stamp = kept.stat().st_mtime_ns
        lost.unlink()
        (out / f"{lost.name}.worldloom-tmp").write_bytes(b"torn")
        export(dataset, out, form, options)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
        assert kept.stat().st_mtime_ns == stamp


# --- Cosmos -----------------------------------------------------------------------------------------------------------


def test_windows_are_cosmos_curates() -> None:
    assert windows(1) == [(0, 0)]
    assert windows(256) == [(0, 255)]
    assert windows(256 + 127) == [(0, 382)]
    assert windows(256 + 128) == [(0, 255), (256, 383)]
    assert windows(600) == [(0, 255), (256, 599)]
    assert windows(640) == [(0, 255), (256, 511), (512, 639)]


FIELDS = {
    *("span_uuid", "source_video", "duration_span", "width_source", "height_source", "framerate_source"),
    *("clip_location", "width", "height", "framerate", "num_frames", "video_codec", "num_bytes"),
    *("windows", "filtered_windows", "valid", "has_caption"),
}


def test_cosmos_curates_folders_and_field_names(dataset: Dataset, tmp_path: Path) -> None:
    counts = export(dataset, tmp_path / "out", "cosmos-curate", ExportOptions(caption_model="qwen"))
    assert counts == {"clips": 5, "captioned": 3}
    for sample in dataset:
        name = span_uuid(sample.clip)
        content = json.loads((tmp_path / f"out/metas/v0/{name}.json").read_text())
        assert set(content) == FIELDS | {"worldloom_clip_id"}
        assert Path(content["clip_location"]).read_bytes() == sample.video
        assert content["num_bytes"] == len(sample.video or b"")
        info = media.probe(content["clip_location"], count=True)
        assert (content["width"], content["height"]) == (info.width, info.height)
        assert (content["num_frames"], content["framerate"]) == (info.frames, info.fps)
        assert content["duration_span"] == [5 / sample.clip.fps, (5 + sample.clip.frames) / sample.clip.fps]
        assert (content["width_source"], content["height_source"]) == (info.width * 2, info.height * 2)
        assert content["has_caption"] == bool(sample.clip.caption)
        [window] = content["windows"]
        assert (window["start_frame"], window["end_frame"]) == (0, sample.clip.frames - 1)
        assert window.get("qwen_caption", "") == sample.clip.caption


def test_cosmos_curates_shards_hold_every_clip(dataset: Dataset, tmp_path: Path) -> None:
    counts = export(dataset, tmp_path / "out", "cosmos-shards", ExportOptions(clips_per_tar=1))
    assert sum(counts["bins"].values()) == counts["clips"] == 5
    listed = (tmp_path / "out/v0/wdinfo_list.csv").read_text().split()
    assert len(listed) == len(counts["bins"])
    keys = []
    for place in listed:
        info = json.loads(Path(place).read_text())
        assert info["data_keys"] == ["video", "metas"]
        root = Path(info["root"])
        for name in info["data_list"]:
            assert name.startswith("part_000000/")
            with tarfile.open(root / "video" / name) as videos, tarfile.open(root / "metas" / name) as metas:
                pairs = [(v.name, m.name) for v, m in zip(videos, metas, strict=True)]
                assert all(v.removesuffix(".mp4") == m.removesuffix(".json") for v, m in pairs)
                keys += [v.removesuffix(".mp4") for v, _ in pairs]
        assert info["total_key_count"] == len(info["data_list"])
    assert sorted(keys) == sorted(span_uuid(clip) for clip in dataset.clips())
    assert len(sort_clips(dataset, COSMOS_RESOLUTIONS)) == len(listed)


def test_cosmos_3_rows_point_to_their_videos(dataset: Dataset, tmp_path: Path) -> None:
    counts = export(dataset, tmp_path / "out", "cosmos3")
    assert counts == {"clips": 5, "captioned": 3, "long enough and captioned": 0}
    rows = [json.loads(line) for line in (tmp_path / "out/cosmos3_sft.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, dataset, strict=True):
        assert set(row) == {
            *("uuid", "duration", "width", "height", "nb_frames", "framerate", "vision_path", "t2w_windows")
        }
        assert (tmp_path / "out" / row["vision_path"]).read_bytes() == sample.video
        [window] = row["t2w_windows"]
        last = sample.clip.frames - 1
        assert window == {"start_frame": 0, "end_frame": last, "temporal_interval": 1, "caption": sample.clip.caption}


def test_predict_folders_pair_videos_with_captions(dataset: Dataset, tmp_path: Path) -> None:
    counts = export(dataset, tmp_path / "out", "cosmos-predict2.5")
    assert counts == {"clips": 5, "captioned": 3}
    videos = {path.stem for path in (tmp_path / "out/videos").iterdir()}
    assert videos == {path.stem for path in (tmp_path / "out/metas").iterdir()} == set(dataset.keys())
    for made in dataset.clips():
        assert (tmp_path / f"out/metas/{made.id}.txt").read_text() == made.caption


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_counted(dataset: Dataset, tmp_path: Path) -> None:
    arguments = ["curate", "export", str(dataset.root), "--out", str(tmp_path / "out"), "--format", "webdataset"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "     2 resolution_lt_256/aspect_ratio_4_3/duration_2_5" in result.stdout
    assert f"5 of 5 clips in {tmp_path / 'out'}" in result.stdout
    help_text = CliRunner().invoke(main, ["curate", "export", "--help"]).output
    for name in FORMATS:
        assert f"  {name} " in help_text
    wrong = CliRunner().invoke(main, [*arguments[:5], "--format", "tfrecord"])
    assert "there is no such export format" in wrong.stderr


def test_a_dataset_is_not_exported_into_itself(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="the output folder is the dataset"):
        export(dataset, dataset.root)
