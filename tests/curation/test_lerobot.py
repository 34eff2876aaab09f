from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from robot_episodes import FPS, NAMES, delayed, encode, episode, write_lerobot_dataset

from worldloom import WorldloomError, media
from worldloom.config import load
from worldloom.shards import Dataset, open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.episodes import EpisodeConfig
from worldloom_curation.export import ExportOptions, export
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.lerobot import layout
from worldloom_curation.lerobot.write import WriteOptions, write_lerobot
from worldloom_curation.pipeline import run
from worldloom_curation.sources import discover

TOP, SIDE = "observation.images.top", "observation.images.side"
LENGTHS = (40, 55, 33)


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=["stages=['split','caption']", *overrides])


def made(count: int = 3) -> list:
    rng = np.random.default_rng(0)
    episodes = []
    for i, length in enumerate(LENGTHS[:count]):
        one = episode(i, length)
        one = replace(one, task=f"Task {i % 2}.", success=i != 1, rewards=rng.normal(size=length).astype(np.float32))
        episodes.append(one)
    return episodes


@pytest.mark.parametrize("version", ["v3.0", "v2.1", "v2.0"])
def test_episodes_are_read_with_their_actions_state_task_and_success(tmp_path: Path, version: str) -> None:
    episodes = made()
    write_lerobot_dataset(tmp_path / "robot", episodes, version)
    run(tmp_path / "robot", tmp_path / "out", settings())
    samples = list(open_dataset(tmp_path / "out"))
    assert [sample.clip.frames for sample in samples] == list(LENGTHS)
    for i, (sample, one) in enumerate(zip(samples, episodes, strict=True)):
        clip = sample.clip
        # A row for every frame there, one for every step here: the last action and reward lead nowhere.
        np.testing.assert_array_equal(sample.arrays["actions"], one.actions[:-1])
        np.testing.assert_array_equal(sample.arrays["state"], one.state)
        assert one.rewards is not None
        np.testing.assert_array_equal(sample.arrays["rewards"], one.rewards[:-1])
        assert (clip.source, clip.caption, clip.fps, clip.action_dim) == (f"robot#{i:06d}", one.task, FPS, 2)
        facts = {key: clip.metadata[key] for key in ("action_names", "state_names", "success", "camera", "robot_type")}
        assert list(facts.values()) == [NAMES, NAMES, one.success, TOP, "toy"]
        assert sample.video is not None
        # Twice encoded with loss, and still each frame is nearest to its own original, not to the one before or after.
        pixels, originals = media.read_frames(sample.video).astype(float)[1:-1], one.frames.astype(float)
        away = [np.abs(pixels - originals[1 + by : len(originals) - 1 + by]).mean() for by in (-1, 0, 1)]
        assert away[1] < min(away[0], away[2])
    assert all(account.balanced for account in accounts(load_ledger(tmp_path / "out")).values())


def test_the_episodes_of_one_file_are_told_apart_by_their_frames(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", made(), per_file=3)
    sources, inputs = discover(tmp_path / "robot")
    assert [source.window for source in sources] == [(0, 40), (40, 95), (95, 128)]
    assert len({source.path for source in sources}) == 1
    assert len({source.digest for source in sources}) == 1
    assert [name.rpartition(":")[2] for name in inputs] == [
        "robot/data/chunk-000/file-000.parquet",
        f"robot/videos/{TOP}/chunk-000/file-000.mp4",
    ]
    run(tmp_path / "robot", tmp_path / "out", settings("split.recorded=fixed", "split.max_frames=17"))
    clips = list(open_dataset(tmp_path / "out").clips())
    # A clip's identity is its place in the file, whichever episode that is part of.
    assert [(clip.start, clip.end) for clip in clips[:4]] == [(0, 17), (17, 34), (40, 57), (57, 74)]
    assert len({clip.id for clip in clips}) == len(clips)


def test_cameras_are_clips_of_their_own_and_can_be_chosen(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", made(2), cameras=(TOP, SIDE))
    run(tmp_path / "robot", tmp_path / "both", settings())
    clips = list(open_dataset(tmp_path / "both").clips())
    assert [clip.source for clip in clips] == [f"robot#{i:06d}/{camera}" for i in (0, 1) for camera in (TOP, SIDE)]
    run(tmp_path / "robot", tmp_path / "one", settings('sources.cameras=["side"]'))
    assert {clip.metadata["camera"] for clip in open_dataset(tmp_path / "one").clips()} == {SIDE}
    with pytest.raises(WorldloomError, match="no such camera"):
        discover(tmp_path / "robot", config=EpisodeConfig(cameras=("wrist",)))


def test_a_dataset_among_other_files_is_one_source_per_episode(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "all" / "robot", made(2))
    write_lerobot_dataset(tmp_path / "all" / "older", made(2), "v2.1")
    (tmp_path / "all" / "newer" / "meta").mkdir(parents=True)
    (tmp_path / "all" / "newer" / "meta" / "info.json").write_text('{"codebase_version": "v4.0"}')
    sources, _ = discover(tmp_path / "all")
    assert [source.name for source in sources] == [
        "newer",
        *("older#000000", "older#000001"),
        *("robot#000000", "robot#000001"),
    ]
    assert "version of the LeRobot format is not read" in sources[0].error


def test_a_damaged_episode_fails_alone(tmp_path: Path) -> None:
    root = write_lerobot_dataset(tmp_path / "robot", made(), "v2.1")
    (root / f"videos/chunk-000/{TOP}/episode_000001.mp4").write_bytes(b"no video")
    (root / "data/chunk-000/episode_000002.parquet").write_bytes(b"no table")
    summary = run(root, tmp_path / "out", settings())
    assert (summary["clips"], summary["failed"]) == (1, 2)
    reasons = {row.source[-1]: row.reason for row in load_ledger(tmp_path / "out") if row.failed}
    assert "not a video" in reasons["1"]
    assert "a data file cannot be read" in reasons["2"]


def test_rows_that_do_not_fit_the_video_are_a_failure(tmp_path: Path) -> None:
    root = write_lerobot_dataset(tmp_path / "robot", made(1), "v2.1")
    encode(root / f"videos/chunk-000/{TOP}/episode_000000.mp4", [made(1)[0].frames[:-3]])
    with pytest.raises(WorldloomError, match="no clip was kept"):
        run(root, tmp_path / "out", settings())
    [row] = [row for row in load_ledger(tmp_path / "out") if row.failed]
    assert "do not fit its video" in row.reason


def test_a_dataset_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    root = write_lerobot_dataset(tmp_path / "robot", made(1))
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    info = json.loads((root / "meta/info.json").read_text())
    info["video_path"] = "../secret.mp4"
    (root / "meta/info.json").write_text(json.dumps(info))
    [source], _ = discover(root)
    assert "leads out of the dataset" in source.error
    with pytest.raises(WorldloomError, match="field that is not known"):
        layout.fill("{video_key.__class__}{video_key}{index}", video_key="a")


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Clips of two cameras, one of them cut from an episode."""
    root = tmp_path_factory.mktemp("lerobot")
    write_lerobot_dataset(root / "robot", made(), cameras=(TOP, SIDE))
    run(root / "robot", root / "out", settings())
    return open_dataset(root / "out")


@pytest.fixture(scope="module")
def written(curated: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written") / "robot"
    counts = export(curated, root, "lerobot")
    assert (counts["clips"], counts["episodes"], counts["frames"]) == (6, 3, sum(LENGTHS))
    return root


def test_what_was_written_is_read_back_equal(curated: Dataset, written: Path) -> None:
    sources, _ = discover(written)
    by_name = {source.name: source for source in sources}
    assert len(by_name) == len(curated) == 6
    for sample in curated:
        clip = sample.clip
        source = by_name[clip.source]
        assert not source.error
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(source.arrays[name], array)
            assert source.arrays[name].dtype == array.dtype
        assert (source.facts["task"], source.rate) == (clip.caption, clip.fps)
        for fact in ("action_names", "state_names", "success", "camera", "robot_type", "episode"):
            assert source.facts[fact] == clip.metadata[fact]
        assert source.window is not None
        assert sample.video is not None
        # The same frames, to the bit: nothing was encoded again.
        packed = np.stack(list(media.iter_frames(source.path, *source.window)))
        np.testing.assert_array_equal(packed, media.read_frames(sample.video))


def test_the_layout_is_that_of_the_public_format(written: Path) -> None:
    info = json.loads((written / "meta/info.json").read_text())
    assert set(info) == {
        *("codebase_version", "robot_type", "total_episodes", "total_frames", "total_tasks", "chunks_size"),
        *("data_files_size_in_mb", "video_files_size_in_mb", "fps", "splits", "data_path", "video_path", "features"),
    }
    assert info["codebase_version"] == "v3.0"
    assert info["splits"] == {"train": "0:3"}
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    features = info["features"]
    assert set(features) == {
        *("action", "observation.state", TOP, SIDE, "next.reward", "next.done", "next.success"),
        *("timestamp", "frame_index", "episode_index", "index", "task_index"),
    }
    assert features["action"] == {"dtype": "float32", "shape": [2], "names": NAMES}
    assert features[TOP]["shape"] == [48, 64, 3]
    assert set(features[TOP]["info"]) == {
        *("video.height", "video.width", "video.codec", "video.pix_fmt", "video.is_depth_map", "video.fps"),
        *("video.channels", "has_audio"),
    }
    assert (features[TOP]["info"]["video.codec"], features[TOP]["info"]["video.height"]) == ("h264", 48)
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    assert files == [
        ".worldloom-export.json",
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        *("meta/info.json", "meta/stats.json", "meta/tasks.parquet"),
        f"videos/{SIDE}/chunk-000/file-000.mp4",
        f"videos/{TOP}/chunk-000/file-000.mp4",
    ]
    episodes = parquet.read_table(written / "meta/episodes/chunk-000/file-000.parquet")
    statistics = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
    expected = {"episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"}
    expected |= {f"{part}/{which}_index" for part in ("data", "meta/episodes") for which in ("chunk", "file")}
    for camera in (TOP, SIDE):
        expected |= {f"videos/{camera}/{what}_index" for what in ("chunk", "file")}
        expected |= {f"videos/{camera}/{what}_timestamp" for what in ("from", "to")}
    expected |= {f"stats/{feature}/{name}" for feature in features for name in statistics}
    assert set(episodes.column_names) == expected
    rows = parquet.read_table(written / "data/chunk-000/file-000.parquet")
    assert set(rows.column_names) == set(features) - {TOP, SIDE}
    assert parquet.ParquetFile(written / "data/chunk-000/file-000.parquet").num_row_groups == 3
    assert rows["index"].to_pylist() == list(range(sum(LENGTHS)))
    assert rows["timestamp"].to_pylist()[40:42] == pytest.approx([0, 1 / FPS])
    last = rows.slice(39, 1).to_pylist()[0]
    assert (last["next.done"], last["next.success"]) == (True, True)
    assert last["action"] == rows.slice(38, 1).to_pylist()[0]["action"]


def test_statistics_are_those_of_the_rows_and_pixels(written: Path, curated: Dataset) -> None:
    stats = json.loads((written / "meta/stats.json").read_text())
    rows = parquet.read_table(written / "data/chunk-000/file-000.parquet")
    actions = np.array(rows["action"].to_pylist())
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["q90"], np.quantile(actions, 0.9, axis=0), atol=1e-6)
    assert stats["action"]["count"] == [sum(LENGTHS)]
    pixels = np.concatenate(
        [media.read_frames(s.video) for s in curated if s.video and s.clip.metadata["camera"] == TOP]
    )
    assert np.shape(stats[TOP]["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(stats[TOP]["mean"]), pixels.mean(axis=(0, 1, 2)) / 255, atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats[TOP]["std"]), pixels.std(axis=(0, 1, 2)) / 255, atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats[TOP]["max"]), pixels.max(axis=(0, 1, 2)) / 255, atol=1e-6)


def test_large_datasets_are_spread_over_files_and_read_back(curated: Dataset, tmp_path: Path) -> None:
    options = WriteOptions("top", chunk_files=2, data_mb=0.001, video_mb=0.001)
    counts = write_lerobot(curated, tmp_path / "robot", options)
    assert (counts["clips"], counts["data_files"], counts["video_files"]) == (3, 3, 3)
    assert (tmp_path / "robot/data/chunk-001/file-000.parquet").is_file()
    sources, _ = discover(tmp_path / "robot")
    clips = [clip for clip in curated.clips() if clip.metadata["camera"] == TOP]
    for source, clip in zip(sources, clips, strict=True):
        assert source.window == (0, clip.frames)
        np.testing.assert_array_equal(source.arrays["actions"], curated.load(clip.id).arrays["actions"])


def test_our_own_recordings_become_a_dataset_too(tmp_path: Path) -> None:
    from worldloom.schema import Clip, clip_id
    from worldloom.shards import ShardSample, ShardWriter, commit_dataset

    with ShardWriter(tmp_path / "rec") as writer:
        for seed in range(2):
            one = episode(seed, 20)
            clip = Clip(clip_id(f"{seed:064x}", 0, 20), "env:x", f"{seed:064x}", 0, 20, 12.5, 64, 48, action_dim=1)
            video = media.write_video(None, one.frames, 12.5, lossless=True)
            writer.write(ShardSample(clip, video, {"actions": one.actions[:-1, :1].copy()}))
    commit_dataset(tmp_path / "rec", writer.shards)
    dataset = open_dataset(tmp_path / "rec")
    export(dataset, tmp_path / "robot", "lerobot")
    sources, _ = discover(tmp_path / "robot")
    assert [source.rate for source in sources] == [12.5, 12.5]
    for source, sample in zip(sources, dataset, strict=True):
        np.testing.assert_array_equal(source.arrays["actions"], sample.arrays["actions"])
        assert source.window is not None
        assert sample.video is not None
        packed = np.stack(list(media.iter_frames(source.path, *source.window)))
        np.testing.assert_array_equal(packed, media.read_frames(sample.video))


def test_an_export_goes_on_and_refuses_another(curated: Dataset, written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "robot"
    shutil.copytree(written, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / "meta/info.json").unlink()
    (copy / "data/chunk-000/file-000.parquet").unlink()
    (copy / "data/chunk-000/.file-000.parquet.abc.worldloom-tmp").mkdir()
    assert not layout.is_lerobot(copy)
    export(curated, copy, "lerobot")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    with pytest.raises(WorldloomError, match="another format"):
        export(curated, copy, "plain")
    with pytest.raises(WorldloomError, match="another options"):
        export(curated, copy, "lerobot", ExportOptions(camera="top"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(WorldloomError, match="holds something else"):
        export(curated, tmp_path / "other", "lerobot")


def test_what_a_lerobot_dataset_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", made(2), cameras=(TOP, SIDE))
    late = [delayed(one, 6) for one in made(2)]
    write_lerobot_dataset(tmp_path / "all" / "a", late, cameras=(TOP, SIDE))
    write_lerobot_dataset(tmp_path / "all" / "b", made(1))
    run(tmp_path / "all", tmp_path / "out", settings())
    dataset = open_dataset(tmp_path / "out")
    with pytest.raises(WorldloomError, match="every camera"):
        export(dataset, tmp_path / "x", "lerobot")
    assert export(dataset, tmp_path / "y", "lerobot", ExportOptions(camera="top"))["clips"] == 3
    with pytest.raises(WorldloomError, match="no clip of this camera"):
        export(dataset, tmp_path / "z", "lerobot", ExportOptions(camera="wrist"))
