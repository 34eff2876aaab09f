"""The data of a run: splits, windows, batches, several datasets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import RATIO, make_clips, make_latents
from hypothesis import given
from hypothesis import strategies as st

from worldloom.errors import WorldloomError
from worldloom.loader import Loader
from worldloom.order import Plan
from worldloom.shards import open_dataset
from worldloom_finetune import data
from worldloom_finetune.config import DataConfig


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=2, unique=True))
def test_noise_seeds_differ_wherever_step_rank_or_micro_batch_do(places: list[tuple[int, ...]]) -> None:
    seeds = [data.noise_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(
    clips=st.lists(st.text("abcdef0123456789", min_size=4, max_size=8), unique=True, max_size=60),
    more=st.text("xyz", min_size=1),
)
def test_a_clip_keeps_its_side_when_others_join(clips: list[str], more: str) -> None:
    train, val = data.split(clips, 0.3)
    assert sorted(train + val) == list(range(len(clips)))
    if len(clips) > 1:
        assert train
        assert val
    assert all(data.held_out(clip, 0.3) == data.held_out(clip, 0.3) for clip in clips)
    if any(data.held_out(c, 0.3) for c in clips) and not all(data.held_out(c, 0.3) for c in clips):
        again, _ = data.split([*clips, more], 0.3)
        assert [i for i in again if i < len(clips)] == train


def test_windows_of_one_clip_stay_on_one_side() -> None:
    parents = [f"clip{i // 5}" for i in range(100)]
    train, val = data.split(parents, 0.3)
    assert not {parents[i] for i in train} & {parents[i] for i in val}
    assert 0.05 < len(val) / 100 < 0.6
    assert data.split(parents, 0.0) == (list(range(100)), [])


def test_a_window_is_cut_at_its_end_only_and_its_actions_with_it(tmp_path: Path) -> None:
    dataset = open_dataset(make_latents(tmp_path / "latents", samples=3, t=5))
    for hold in (True, False):
        items = data.LatentItems(dataset.load, [2, 0], frames=3, ratio=RATIO, hold=hold)
        batch = items.collate([items.item(0, 0), items.item(9, 1)])
        for row, number in enumerate((2, 0)):
            whole = dataset.load(number).arrays
            assert torch.equal(batch.latents[row], torch.from_numpy(whole["latents"][:, :3]).float())
            assert batch.actions is not None
            # latent frame i >= 1 spans actions[ratio * (i - 1) : ratio * i]; three latent frames span two groups
            assert torch.equal(batch.actions[row], torch.from_numpy(whole["actions"][: 2 * RATIO]))
        assert batch.clip_ids == tuple(dataset.load(n).clip.id for n in (2, 0))


def rows(loader: Loader) -> list[tuple[str, ...]]:
    return [packed.content.clip_ids for packed in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_do_not_depend_on_the_number_of_loader_processes(workers: int, tmp_path: Path) -> None:
    dataset = open_dataset(make_latents(tmp_path / "latents", samples=5))
    items = data.LatentItems(dataset.load, range(5), frames=3, ratio=RATIO, hold=True)
    loader = data.loader(items, DataConfig(batch_size=2, num_workers=workers), 1, batches=9)
    plan = Plan(5, 2, 1)
    assert rows(loader) == [tuple(dataset.keys()[i] for _, i in plan.batch(number)) for number in range(9)]


def test_a_run_goes_on_with_other_processes_and_micro_batches_over_the_same_samples(tmp_path: Path) -> None:
    dataset = open_dataset(make_latents(tmp_path / "latents", samples=5))
    items = data.LatentItems(dataset.load, range(5), frames=3, ratio=RATIO, hold=True)
    config = DataConfig(batch_size=2)
    alone = rows(data.loader(items, config, 3, batches=16))
    ranks = [data.loader(items, config, 3, rank=rank, world=2, batches=4) for rank in range(2)]
    first = [batch for both in zip(*map(rows, ranks), strict=True) for batch in both]
    after = data.loader(items, config, 3, batches=8)
    after.load_state_dict(ranks[0].state_dict())
    assert first + rows(after) == alone


def test_latents_of_two_sizes_train_in_batches_of_one(tmp_path: Path) -> None:
    small, large = (make_latents(tmp_path / name, samples=5, seed=i) for i, name in enumerate(("small", "large")))
    joined, parts = data.open_latents([str(small), str(large)], tmp_path / "absent")
    assert parts == [0] * 5 + [1] * 5
    assert len(joined) == joined.index.samples == 10
    shapes = [(*shape[:2], 4 + 4 * (i > 6), 4) for i, shape in enumerate(joined.shapes())]
    items = data.LatentItems(joined.load, range(1, 10), frames=2, ratio=RATIO, hold=False, shapes=shapes, parts=parts)
    assert items.shapes == [(4, 4)] * 6 + [(8, 4)] * 3
    loader = data.loader(items, DataConfig(batch_size=2), 0)
    for number in range(20):
        assert len({items.shapes[i] for _, i in loader.plan.batch(number)}) == 1
    ids = [key for part in joined.parts for key in part.keys()]  # noqa: SIM118
    batches = data.fixed_batches(items, 4, 9)
    assert [batch.clip_ids for batch in batches] == [tuple(ids[1:5]), tuple(ids[5:7]), tuple(ids[7:10])]
    assert [b.clip_ids for b in data.fixed_batches(items, 4, 2)] == [b.clip_ids for b in batches[:2]]


def test_datasets_are_drawn_from_by_weight(tmp_path: Path) -> None:
    roots = [str(make_latents(tmp_path / str(i), samples=n, seed=i)) for i, n in enumerate((3, 12))]
    joined, parts = data.open_latents(roots, tmp_path / "absent")
    items = data.LatentItems(joined.load, range(15), frames=3, ratio=RATIO, hold=False, parts=parts)
    first = set(joined.parts[0].keys())
    drawn = [
        clip
        for row in rows(data.loader(items, DataConfig(batch_size=4, weights=(3, 1)), 0, batches=40))
        for clip in row
    ]
    assert sum(clip in first for clip in drawn) == 120
    with pytest.raises(WorldloomError, match="one weight for each dataset"):
        data.loader(items, DataConfig(weights=(1,)), 0)


def test_clips_encoded_into_one_dataset_know_where_they_come_from(tmp_path: Path) -> None:
    from worldloom import shards

    roots = [make_clips(tmp_path / str(i), samples=n, seed=i) for i, n in enumerate((2, 3))]
    keys = [key for root in roots for key in open_dataset(root).keys()]  # noqa: SIM118
    latents = open_dataset(make_latents(tmp_path / "made", samples=5, t=5))
    with shards.ShardWriter(tmp_path / "latents", kind="latents") as writer:
        for parent, sample in zip(reversed(keys), latents, strict=True):
            sample.clip = dataclasses.replace(sample.clip, metadata={"parent": parent})
            writer.write(sample)
    shards.commit_dataset(tmp_path / "latents", writer.shards, kind="latents", tokenizer=latents.index.tokenizer)
    joined, parts = data.open_latents([str(root) for root in roots], tmp_path / "latents")
    assert parts == [1, 1, 1, 0, 0]
    assert joined.groups() == keys[::-1]
    assert joined.index == open_dataset(tmp_path / "latents").index
    with pytest.raises(WorldloomError, match="clips and latents"):
        data.open_latents([str(roots[0]), str(tmp_path / "latents")], tmp_path)


def test_latents_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = make_latents(tmp_path / "one", samples=3)
    other = make_latents(tmp_path / "other", samples=3, fingerprint="e" * 64)
    three = make_latents(tmp_path / "three", samples=3, actions=3)
    for root in (other, three):
        with pytest.raises(WorldloomError, match="of one tokenizer, with actions of one size"):
            data.open_latents([str(one), str(root)], tmp_path)


@pytest.mark.parametrize(("frames", "expected"), [(0, 5), (9, 3), (17, 5)])
def test_a_window_is_a_whole_number_of_latent_frames(frames: int, expected: int) -> None:
    assert data.window_length(frames, 4, 5, "a sample") == expected


@pytest.mark.parametrize("frames", [8, 21, -3])
def test_a_window_that_does_not_fit_is_refused(frames: int) -> None:
    with pytest.raises(WorldloomError, match=r"data\.frames"):
        data.window_length(frames, 4, 5, "a sample")


def test_clips_are_decoded_once_and_windows_stay_inside_their_clip(tmp_path: Path) -> None:
    dataset = data.Joined([open_dataset(make_clips(tmp_path / "clips", samples=3, frames=17))])
    calls: list[int] = []
    bank = data.FrameBank.open(dataset, None, tmp_path / "cache", lambda done, total: calls.append(done))
    again = data.FrameBank.open(dataset, None, tmp_path / "cache", lambda done, total: calls.append(done))
    assert calls == [1, 2, 3]
    assert (again.pixels == bank.pixels).all()
    items = data.ClipItems(bank, [0, 2], length=5, seed=0, jitter=True)
    assert len(items) == 6
    starts = set()
    for epoch in range(8):
        for index in range(len(items)):
            window = items.item(epoch, index)
            clip = bank.frames(items.windows[index][0])
            assert len(clip) == 17
            found = [s for s in range(13) if (clip[s : s + 5] == window).all()]
            assert found, "a window that is no part of its clip"
            starts.add(found[0])
    assert len(starts) > 6, "windows do not move between epochs"
    fixed = data.ClipItems(bank, [0], length=5, seed=0, jitter=False)
    assert (fixed.item(0, 1) == fixed.item(5, 1)).all()


def test_clips_of_two_sizes_need_a_size_or_a_crop(tmp_path: Path) -> None:
    from worldloom import media, shards
    from worldloom.schema import Clip, clip_id

    random = np.random.default_rng(0)
    with shards.ShardWriter(tmp_path / "d") as writer:
        for i, size in enumerate((16, 32)):
            pixels = random.integers(0, 256, (3, size, size, 3)).astype(np.uint8)
            video = media.write_video(None, pixels, 10, lossless=True)
            clip = Clip(clip_id(f"{i}", 0, 3), "a", f"{i}", 0, 3, 10.0, size, size)
            writer.write(shards.ShardSample(clip, video))
        refs = writer.close()
    shards.commit_dataset(tmp_path / "d", refs)
    dataset = data.Joined([open_dataset(tmp_path / "d")])

    def bank(size: tuple[int, int] | None) -> data.FrameBank:
        return data.FrameBank.open(dataset, size, tmp_path / "cache", lambda done, total: None)

    own = bank(None)
    with pytest.raises(WorldloomError, match="different sizes"):
        data.ClipItems(own, [0, 1], 3, 0, jitter=True)
    with pytest.raises(WorldloomError, match="larger than a clip"):
        data.ClipItems(own, [0, 1], 3, 0, jitter=True, crop=(24, 24))
    fitted = data.ClipItems(bank((16, 16)), [0, 1], 3, 0, jitter=False)
    assert [fitted.item(0, i).shape for i in (0, 1)] == [(3, 16, 16, 3)] * 2
    cropped = data.ClipItems(own, [0, 1], 3, 0, jitter=True, crop=(8, 12))
    places = set()
    for epoch in range(16):
        small, large = (cropped.item(epoch, i) for i in (0, 1))
        assert small.shape == large.shape == (3, 8, 12, 3)
        whole = own.frames(1)
        found = [(y, x) for y in range(25) for x in range(21) if (whole[:, y : y + 8, x : x + 12] == large).all()]
        assert len(found) == 1, "a crop that is no part of its clip"
        places |= set(found)
    assert len(places) > 8, "crops do not move between epochs"
    centre = data.ClipItems(own, [1], 3, 0, jitter=False, crop=(8, 12))
    assert (centre.item(3, 0) == own.frames(1)[:, 12:20, 10:22]).all()
