"""The loader: the same order with any number of processes, from any batch, on any number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldloom import media
from worldloom.artifacts import Store
from worldloom.errors import WorldloomError
from worldloom.loader import Loader, Samples, collate_latents, open_loader
from worldloom.order import Plan
from worldloom.schema import Clip
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset

RATIO, A = 4, 2


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLDLOOM_HOME", str(tmp_path / "home"))


def latents_sample(number: int, t: int = 2, edge: int = 3, name: str = "z", c: int = 4) -> ShardSample:
    rng = np.random.default_rng(number)
    frames = 1 + RATIO * (t - 1)
    clip = Clip(f"{name}-{number:04d}", "a", "d", 0, frames, 10.0, 8 * edge, 24, action_dim=A)
    arrays = {
        "latents": rng.standard_normal((c, t, 3, edge)).astype(np.float16),
        "actions": rng.standard_normal((frames - 1, A)).astype(np.float32),
    }
    return ShardSample(clip, None, arrays)


def build(root: Path, samples: list[ShardSample], per_shard: int = 5) -> Dataset:
    kind = "latents" if samples[0].video is None else "clips"
    with ShardWriter(root, kind=kind, samples_per_shard=per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    tokenizer = {"name": "t", "fingerprint": "f", "temporal_ratio": RATIO} if kind == "latents" else None
    commit_dataset(root, writer.shards, kind=kind, tokenizer=tokenizer, store=Store(root.parent / "store"))
    return open_dataset(root)


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """17 latents of one shape and 6 of another, mixed up in 5 shards."""
    samples = [latents_sample(i, t=3 if i % 4 == 1 else 2) for i in range(23)]
    return build(tmp_path_factory.mktemp("loader") / "latents", samples)


def ids(loader: Loader, count: int) -> list[tuple[str, ...]]:
    batches = iter(loader)
    return [next(batches).clip_ids for _ in range(count)]


def test_samples_by_number_are_what_plain_reading_gives(two_shapes: Dataset, tmp_path: Path) -> None:
    samples = Samples(two_shapes.root)
    assert len(samples) == 23
    assert samples.keys() == two_shapes.keys() == samples.groups()
    assert list(samples.clips()) == list(two_shapes.clips())
    for number in (22, 0, 7):
        got, expected = samples.load(number), two_shapes.load(number)
        assert got.clip == expected.clip == samples.clip(number)
        assert got.arrays.keys() == expected.arrays.keys()
        for name, array in got.arrays.items():
            np.testing.assert_array_equal(array, expected.arrays[name])
            assert array.dtype == expected.arrays[name].dtype
        assert samples.shapes()[number] == (*expected.arrays["latents"].shape, A)


def test_samples_from_a_url_and_a_table_that_is_kept(two_shapes: Dataset) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(two_shapes.root), "/loader", recursive=True)
    try:
        samples = Samples("memory://loader/")
        assert [s.clip for s in map(samples.load, range(23))] == list(two_shapes.clips())
        local = [batch.clip_ids for batch in open_loader(two_shapes.root, 3, seed=4, batches=20)]
        assert [batch.clip_ids for batch in open_loader("memory://loader", 3, seed=4, batches=20)] == local
        for ref in two_shapes.index.shards:
            fs.rm(f"/loader/{ref.path}")
        assert Samples("memory://loader").keys() == samples.keys(), "the table was read from the shards again"
        with pytest.raises(WorldloomError, match=r"cannot be read[^$]*000001\.tar"):
            samples.load(6)
    finally:
        fs.rm("/loader", recursive=True)
    with pytest.raises(WorldloomError, match="not a finished dataset"):
        Samples("memory://loader")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_order_does_not_depend_on_workers_and_resumes_with_another_number(
    two_shapes: Dataset, workers: int
) -> None:
    def make(workers: int) -> Loader:
        return open_loader(two_shapes.root, 3, seed=5, workers=workers, batches=30)

    whole = [batch.clip_ids for batch in make(0)]
    first = make(workers)
    seen = ids(first, 11)  # workers have read ahead of this
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batches"] == 11
    assert len(json.dumps(state)) < 200
    second = make((workers + 1) % 3)
    second.load_state_dict(state)
    second.batches = 19
    assert seen + [batch.clip_ids for batch in second] == whole


def test_a_loader_begins_at_any_batch(two_shapes: Dataset) -> None:
    whole = [batch.clip_ids for batch in open_loader(two_shapes.root, 2, seed=1, batches=40)]
    for start in range(40):
        loader = open_loader(two_shapes.root, 2, seed=1, batches=40 - start)
        loader.load_state_dict(loader.state_dict() | {"batches": start})
        assert [batch.clip_ids for batch in loader] == whole[start:]
    halves = open_loader(two_shapes.root, 2, seed=1, batches=40)
    assert ids(halves, 13) + [batch.clip_ids for batch in halves] == whole, "iterating again goes on"
    assert len(halves) == 0


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2), (4, 4)])
def test_ranks_take_strides_of_one_order_and_their_number_may_change(
    two_shapes: Dataset, before: int, after: int
) -> None:
    def make(rank: int, world: int) -> Loader:
        return open_loader(two_shapes.root, 2, seed=2, rank=rank, world=world)

    whole = ids(make(0, 1), 64)
    ranks = [make(rank, before) for rank in range(before)]
    parts = [ids(rank, 6) for rank in ranks]
    seen = [batch for together in zip(*parts, strict=True) for batch in together]
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    ranks = [make(rank, after) for rank in range(after)]
    for rank in ranks:
        rank.load_state_dict(states[0])
    parts = [ids(rank, 10) for rank in ranks]
    seen += [batch for together in zip(*parts, strict=True) for batch in together]
    assert seen == whole[: len(seen)]


def test_batches_hold_one_shape_and_every_sample_comes(two_shapes: Dataset) -> None:
    loader = open_loader(two_shapes.root, 4, seed=0, batches=69)  # three epochs of 23 samples in batches of 4, and more
    assert loader.plan.counts() == {(4, 2, 3, 3, A): 17, (4, 3, 3, 3, A): 6}
    frames = {clip.id: clip.frames for clip in two_shapes.clips()}
    times: dict[str, int] = dict.fromkeys(frames, 0)
    for batch in loader:
        assert {frames[clip] for clip in batch.clip_ids} == {1 + RATIO * (batch.latents.shape[2] - 1)}
        assert batch.actions is not None
        assert batch.actions.shape[1] == RATIO * (batch.latents.shape[2] - 1)
        for clip in batch.clip_ids:
            times[clip] += 1
    assert sum(times.values()) == 69 * 4
    assert set(times.values()) <= {11, 12, 13}


def test_datasets_are_mixed_by_weight(two_shapes: Dataset, tmp_path: Path) -> None:
    other = build(tmp_path / "other", [latents_sample(i, name="other") for i in range(3)])
    loader = open_loader([two_shapes.root, other.root], 4, seed=0, weights=[1, 1], batches=100)
    drawn = [clip for batch in loader for clip in batch.clip_ids]
    assert sum(clip.startswith("other") for clip in drawn) == pytest.approx(200, abs=4)
    together = open_loader([two_shapes.root, other.root], 4, seed=0, batches=650)
    times = [clip for batch in together for clip in batch.clip_ids]
    assert {times.count(clip) for clip in set(times)} == {100}, "without weights every sample comes equally often"
    with pytest.raises(WorldloomError, match="one weight for each dataset"):
        open_loader([two_shapes.root, other.root], 4, weights=[1])


def test_a_state_of_other_data_is_refused(two_shapes: Dataset, tmp_path: Path) -> None:
    state = open_loader(two_shapes.root, 3, seed=0).state_dict()
    other = build(tmp_path / "other", [latents_sample(i) for i in range(22)])
    for loader in (
        open_loader(two_shapes.root, 3, seed=1),
        open_loader(two_shapes.root, 4, seed=0),
        open_loader(other.root, 3, seed=0),
    ):
        with pytest.raises(WorldloomError, match="belongs to other data"):
            loader.load_state_dict(state)
    with pytest.raises(WorldloomError, match="no state of a loader"):
        open_loader(two_shapes.root, 3).load_state_dict({"step": 3})


def rewrite(dataset: Dataset, change: Any) -> None:
    """Put changed bytes in place of the first shard, recorded truthfully."""
    file = dataset.root / dataset.index.shards[0].path
    data = change(file.read_bytes())
    file.write_bytes(data)
    content = json.loads((dataset.root / "dataset.json").read_text())
    content["shards"][0] |= {"digest": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (dataset.root / "dataset.json").write_text(json.dumps(content))


def test_actions_that_do_not_fit_their_clip_are_found_when_the_data_is_opened(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data", [latents_sample(i) for i in range(7)])
    five = f'"end":{1 + RATIO}'.encode()
    rewrite(dataset, lambda data: data.replace(five, f'"end":{2 + RATIO}'.encode(), 1))
    with pytest.raises(WorldloomError, match=r"T - 1 actions[^$]*z-0000: 6 frames, actions \(4, 2\)"):
        Samples(dataset.root)
    dataset = build(tmp_path / "more", [latents_sample(i) for i in range(7)])
    rewrite(dataset, lambda data: data.replace(b'"action_dim":2', b'"action_dim":0', 1))
    with pytest.raises(WorldloomError, match=r"z-0000: 5 frames, actions \(4, 2\), action_dim 0"):
        open_loader(dataset.root, 2)


def test_a_video_that_lacks_frames_is_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 5, 16, 24, 3)).astype(np.uint8)
    clips = []
    for i, frames in enumerate((pixels[0], pixels[1, :4])):
        video = media.write_video(None, frames, 10, lossless=True)
        clip = Clip(f"clip-{i}", "a", "d", 0, 5, 10.0, 24, 16, action_dim=1)
        clips.append(ShardSample(clip, video, {"actions": np.zeros((4, 1), np.float32)}))
    good = build(tmp_path / "good", clips[:1])
    (batch,) = open_loader(good.root, 1, batches=1)
    np.testing.assert_array_equal(batch.frames[0].numpy(), media.read_frames(clips[0].video or b""))
    assert batch.actions is not None
    assert batch.actions.shape == (1, 4, 1)
    (again,) = open_loader(good.root, 1, batches=1, workers=1)  # decoded here before, and there now
    assert (again.frames == batch.frames).all()
    with pytest.raises(WorldloomError, match=r"clip-1: 4 instead of 5"):
        list(open_loader(build(tmp_path / "bad", clips).root, 1, batches=2))


def test_a_shard_that_changed_under_its_table_is_refused(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data", [latents_sample(i) for i in range(6)])
    samples = Samples(dataset.root)
    first, second = (dataset.root / ref.path for ref in dataset.index.shards)
    shutil.copy(second, first)
    with pytest.raises(WorldloomError, match="holds what a dataset may not"):
        Samples(dataset.root).load(0)
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(WorldloomError, match="holds what a dataset may not"):
        samples.load(3)


def test_hostile_shards_are_refused_when_the_data_is_opened(tmp_path: Path) -> None:
    for number, change in enumerate(
        [
            lambda data: data.replace(b"z-0001.actions.npy", b"z-0001.actions.pkl"),
            lambda data: data.replace(b"z-0001.json", b"../001.json"),
            lambda data: data[:-1024],
            lambda data: data[:3000],
            lambda data: b"\x1f\x8b" + data[2:],
            lambda data: data.replace(b"'shape': (4, 2, 3, 3)", b"'shape': ('a', 2, 3)"),
        ]
    ):
        dataset = build(tmp_path / str(number), [latents_sample(i) for i in range(3)])
        rewrite(dataset, change)
        with pytest.raises(WorldloomError):
            Samples(dataset.root)


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    size = 4 * 2 * 3 * 3 * 256 * 2  # bytes of latents
    big = [latents_sample(i, c=1024) for i in range(60)]
    loader = open_loader(build(tmp_path / "data", big, 7).root, 2, batches=200)
    batches = iter(loader)
    next(batches)
    tracemalloc.start()
    for batch in batches:
        del batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * size < 60 * size


def test_a_plan_and_a_loader_work_on_anything() -> None:
    loader = Loader(lambda epoch, index: (epoch, index), Plan(5, 2, 0), batches=5)
    seen = [row for batch in loader for row in batch]
    assert sorted(seen) == [(epoch, i) for epoch in range(2) for i in range(5)]
    with pytest.raises(WorldloomError, match="below world"):
        Loader(lambda epoch, index: index, Plan(5, 2, 0), rank=1, world=1)
    with pytest.raises(TypeError, match="no end"):
        len(Loader(lambda epoch, index: index, Plan(5, 2, 0)))


def test_latents_keep_their_bits(two_shapes: Dataset) -> None:
    samples = [two_shapes.load(0), two_shapes.load(2)]
    batch = collate_latents(samples)
    assert (batch.latents.numpy() == np.stack([s.arrays["latents"] for s in samples]).astype(np.float32)).all()
    assert batch.text is None
    plain = [dataclasses.replace(s, arrays={"latents": s.arrays["latents"]}) for s in samples]
    assert collate_latents([samples[0], plain[1]]).actions is None
