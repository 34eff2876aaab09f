from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import Clip, WorldloomError, media
from worldloom.config import load
from worldloom.schema import clip_id
from worldloom.shards import ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.pipeline import run

FRAMES = (50, 70)


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=overrides)


def episode(seed: int, frames: int) -> ShardSample:
    rng = np.random.default_rng(seed)
    pixels = scene(seed, frames, 48, 64)
    digest = f"{seed:064x}"
    clip = Clip(
        clip_id(digest, 0, frames),
        f"env:VizdoomBasic-v1#seed={seed}",
        digest,
        0,
        frames,
        10.0,
        64,
        48,
        action_dim=3,
        metadata={"env_id": "VizdoomBasic-v1", "seed": seed, "action_names": ["MOVE_LEFT", "MOVE_RIGHT", "ATTACK"]},
    )
    arrays = {
        "actions": np.eye(3, dtype=np.float32)[rng.integers(0, 3, frames - 1)],
        "rewards": rng.normal(size=frames - 1).astype(np.float32),
        "depth": rng.integers(0, 255, (frames, 48, 64)).astype(np.uint8),
        "segmentation": rng.integers(0, 5, (frames, 48, 64)).astype(np.uint8),
    }
    return ShardSample(clip, media.write_video(None, pixels, 10.0, lossless=True), arrays)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    with ShardWriter(root) as writer:
        for seed, frames in enumerate(FRAMES):
            writer.write(episode(seed, frames))
    commit_dataset(root, writer.shards)
    return root


def test_a_whole_episode_passes_unchanged(recorded: Path, tmp_path: Path) -> None:
    summary = run(recorded, tmp_path)
    assert summary["work"]["write"] == {"cached": 0, "computed": 0, "copied": 2}
    before, after = list(open_dataset(recorded)), list(open_dataset(tmp_path))
    for old, new in zip(before, after, strict=True):
        assert new.clip.id == old.clip.id
        assert new.video == old.video
        assert new.arrays.keys() == old.arrays.keys()
        for name, array in old.arrays.items():
            np.testing.assert_array_equal(new.arrays[name], array)
        assert new.clip.action_dim == 3
        assert new.clip.metadata == old.clip.metadata
        assert new.clip.caption.startswith("first-person view, VizdoomBasic, actions: ")


def test_a_cut_episode_keeps_its_pixels_and_cuts_its_arrays(recorded: Path, tmp_path: Path) -> None:
    run(recorded, tmp_path, settings("split.recorded=fixed", "split.max_frames=21", "split.frames_multiple=4"))
    episodes = {sample.clip.source_digest: sample for sample in open_dataset(recorded)}
    spans = []
    for sample in open_dataset(tmp_path):
        clip, whole = sample.clip, episodes[sample.clip.source_digest]
        assert sample.video is not None
        assert whole.video is not None
        spans.append((clip.start, clip.end))
        assert clip.id == clip_id(clip.source_digest, clip.start, clip.end)
        frames = media.read_frames(sample.video)
        np.testing.assert_array_equal(frames, media.read_frames(whole.video)[clip.start : clip.end])
        assert len(frames) == clip.frames == 21
        for name in ("actions", "rewards"):
            np.testing.assert_array_equal(sample.arrays[name], whole.arrays[name][clip.start : clip.end - 1])
        for name in ("depth", "segmentation"):
            np.testing.assert_array_equal(sample.arrays[name], whole.arrays[name][clip.start : clip.end])
    assert spans == [(0, 21), (21, 42), (0, 21), (21, 42), (42, 63)]
    assert all(account.balanced for account in accounts(load_ledger(tmp_path)).values())


def test_workers_give_the_same_cut_episodes(recorded: Path, tmp_path: Path) -> None:
    ids = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        ids.append(run(recorded, out, settings("split.recorded=fixed", "split.max_frames=20", f"workers={workers}")))
    assert ids[0]["dataset"] == ids[1]["dataset"]


def test_a_curated_dataset_can_be_curated_again(recorded: Path, tmp_path: Path) -> None:
    run(recorded, tmp_path / "one", settings("split.recorded=fixed", "split.max_frames=40"))
    run(tmp_path / "one", tmp_path / "two", settings("split.recorded=fixed", "split.max_frames=20"))
    spans = [(clip.start, clip.end) for clip in open_dataset(tmp_path / "two").clips()]
    # Still in frames of the original episode, so that a clip can be followed back to it.
    assert spans == [(0, 20), (20, 40), (0, 20), (20, 40), (40, 60)]


def test_the_lineage_starts_at_the_recording(recorded: Path, tmp_path: Path) -> None:
    from worldloom.artifacts import Store

    store = Store(tmp_path / "store")
    summary = run(recorded, tmp_path / "out", store=store)
    assert store.get(summary["dataset"]).inputs == (open_dataset(recorded).index.id,)


def test_a_folder_of_datasets_and_a_damaged_one(recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "dataset.json").write_bytes((recorded / "dataset.json").read_bytes())
    (root / "a" / "shards").symlink_to(recorded / "shards")
    summary = run(root, tmp_path / "out")
    assert (summary["sources"], summary["clips"], summary["failed"]) == (3, 2, 1)
    [failed] = [row for row in load_ledger(tmp_path / "out") if row.failed]
    assert failed.source == "b"
    assert "a shard of the dataset is missing" in failed.reason


def test_videos_and_episodes_do_not_mix(recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    write(root / "video", scene(1, 40))
    (root / "recorded").symlink_to(recorded)
    (root / "set").mkdir()
    (root / "set" / "dataset.json").write_bytes((recorded / "dataset.json").read_bytes())
    (root / "set" / "shards").symlink_to(recorded / "shards")
    with pytest.raises(WorldloomError, match="must have one action size"):
        run(root, tmp_path / "out")


def test_thinned_clips_that_are_curated_again_keep_their_place_in_the_source(tmp_path: Path) -> None:
    write(tmp_path / "videos" / "a", scene(1, 100), fps=30)
    run(tmp_path / "videos", tmp_path / "one", settings("split.fps=10"))
    run(tmp_path / "one", tmp_path / "whole")
    [before], [after] = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "whole")
    assert (after.clip.id, after.video) == (before.clip.id, before.video)
    assert (after.clip.start, after.clip.end, after.clip.step) == (0, 100, 3)
    run(tmp_path / "one", tmp_path / "cut", settings("split.recorded=fixed", "split.max_frames=17"))
    clips = list(open_dataset(tmp_path / "cut").clips())
    assert [(clip.start, clip.end, clip.step, clip.frames) for clip in clips] == [(0, 51, 3, 17), (51, 100, 3, 17)]
