"""The train/test split: nothing is in both parts, and nothing of a source that is whole on one side leaks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom import Clip, WorldloomError, media, shards
from worldloom.schema import clip_id
from worldloom_finetune.split import held_out, split_dataset


def clip(source: int, start: int, frames: int = 17) -> Clip:
    digest = f"{source:064x}"
    return Clip(clip_id(digest, start, start + frames), f"{source}.mp4", digest, start, start + frames, 8.0, 16, 16)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40, unique=True))
def test_parts_are_disjoint_and_sources_or_stretches_stay_whole(spans: list[tuple[int, int]]) -> None:
    clips = [clip(source, 17 * place) for source, place in spans]
    chosen = held_out(clips)
    assert chosen <= {c.id for c in clips}
    test = [c for c in clips if c.id in chosen]
    train = [c for c in clips if c.id not in chosen]
    sources = {c.source for c in clips}
    if len(sources) >= 4:
        assert test
        assert train
        assert not {c.source for c in test} & {c.source for c in train}
    for source in sources:
        ends = [c.end for c in train if c.source == source]
        starts = [c.start for c in test if c.source == source]
        assert not ends or not starts or max(ends) <= min(starts)


def test_split_writes_two_datasets_and_leaves_a_finished_split_alone(tmp_path: Path) -> None:
    clips = [clip(source, 0, frames) for source, frames in ((1, 17), (2, 17), (3, 17), (4, 17), (5, 9))]
    with shards.ShardWriter(tmp_path / "all") as writer:
        for index, one in enumerate(clips):
            frames = np.full((one.frames, 16, 16, 3), index, np.uint8)
            writer.write(shards.ShardSample(one, media.write_video(None, frames, 8, lossless=True)))
    shards.commit_dataset(tmp_path / "all", writer.shards)
    train, test = split_dataset(tmp_path / "all", tmp_path / "train", tmp_path / "test", 17)
    ids = [set(shards.open_dataset(part).keys()) for part in (train, test)]
    assert ids[0] | ids[1] == {c.id for c in clips[:4]}  # the short clip is in neither
    assert not ids[0] & ids[1]
    before = (train / "dataset.json").stat().st_mtime_ns
    split_dataset(tmp_path / "all", train, test, 17)
    assert (train / "dataset.json").stat().st_mtime_ns == before


def test_one_clip_cannot_be_split(tmp_path: Path) -> None:
    one = clip(1, 0)
    with shards.ShardWriter(tmp_path / "all") as writer:
        frames = np.zeros((17, 16, 16, 3), np.uint8)
        writer.write(shards.ShardSample(one, media.write_video(None, frames, 8, lossless=True)))
    shards.commit_dataset(tmp_path / "all", writer.shards)
    with pytest.raises(WorldloomError, match="too few clips"):
        split_dataset(tmp_path / "all", tmp_path / "train", tmp_path / "test", 17)
