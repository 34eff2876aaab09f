"""The order of the data: each epoch whole, every start reachable, nothing cut at the front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import RATIO, make_clips, make_latents
from hypothesis import given
from hypothesis import strategies as st

from worldloom.errors import WorldloomError
from worldloom.shards import open_dataset
from worldloom_finetune import data

small = st.integers(1, 7)


@given(samples=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_a_pure_function(samples: int, seed: int, epoch: int) -> None:
    first = data.order(samples, seed, epoch)
    data.order.cache_clear()
    np.random.seed(0)  # noqa: NPY002  (global state must not matter)
    assert sorted(first) == list(range(samples))
    assert (data.order(samples, seed, epoch) == first).all()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(data.order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(
    samples=st.integers(1, 30),
    batch=small,
    accumulate=st.integers(1, 3),
    world=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_ranks_and_micro_batches_together_see_each_epoch_exactly_once(
    samples: int, batch: int, accumulate: int, world: int, epochs: int
) -> None:
    steps = -(-samples * epochs // (batch * accumulate * world))
    ranks = [list(data.Stream(samples, 7, batch, 0, steps, accumulate, rank, world)) for rank in range(world)]
    seen = [key for micro in zip(*ranks, strict=True) for rows in micro for key in rows]
    for epoch in range(epochs):
        assert sorted(row for e, row in seen if e == epoch) == list(range(samples))


@given(
    samples=st.integers(1, 30),
    batch=small,
    accumulate=st.integers(1, 3),
    start=st.integers(0, 20),
    rank=st.integers(0, 1),
)
def test_a_run_can_begin_at_any_step(samples: int, batch: int, accumulate: int, start: int, rank: int) -> None:
    whole = list(data.Stream(samples, 3, batch, 0, 20, accumulate, rank, 2))
    rest = data.Stream(samples, 3, batch, start, 20, accumulate, rank, 2)
    assert list(rest) == whole[start * accumulate :]
    assert len(rest) == len(whole) - start * accumulate


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


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_do_not_depend_on_the_number_of_loader_processes(workers: int, tmp_path: Path) -> None:
    dataset = open_dataset(make_latents(tmp_path / "latents", samples=5))
    items = data.LatentItems(dataset.load, range(5), frames=3, ratio=RATIO, hold=True)
    stream = data.Stream(5, seed=1, batch=2, start=3, stop=9)
    batches = [packed.content for packed in data.loader(items, stream, workers)]
    clips = [dataset.clip(i).id for i in range(5)]
    assert [batch.clip_ids for batch in batches] == [tuple(clips[row] for _, row in rows) for rows in stream]


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
