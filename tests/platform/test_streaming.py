"""Streaming through webdataset gives what plain reading gives, split and shuffled, and refuses what that refuses.

The same hostile tars go through both readers, and must be refused in the same words.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import pickle
import shutil
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from worldloom.artifacts import Store
from worldloom.errors import WorldloomError
from worldloom.schema import Clip, ShardRef
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset, pack, read_members
from worldloom.streaming import stream

wds = pytest.importorskip("webdataset")

T, A = 4, 2


def sample(number: int, size: int = 300) -> ShardSample:
    rng = np.random.default_rng(number)
    key = f"clip-{number:04d}"
    clip = Clip(id=key, source="a", source_digest="d", start=0, end=T, fps=30.0, width=6, height=5, action_dim=A)
    arrays = {
        "actions": rng.standard_normal((T - 1, A)).astype(np.float32),
        "depth": rng.integers(0, 60000, (T, 5, 6), dtype=np.uint16),
    }
    return ShardSample(clip, rng.bytes(size + number), arrays)


def build(root: Path, count: int = 23, per_shard: int = 3, size: int = 300) -> Dataset:
    with ShardWriter(root, samples_per_shard=per_shard) as writer:
        for number in range(count):
            writer.write(sample(number, size))
    commit_dataset(root, writer.shards, store=Store(root.parent / "store"))
    return open_dataset(root)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tmp_path_factory.mktemp("streaming") / "data")


def keys(*args: Any, **kwargs: Any) -> list[str]:
    return [item.clip.id for item in stream(*args, **kwargs)]


def assert_same(a: ShardSample, b: ShardSample) -> None:
    assert (a.clip, a.video, a.arrays.keys()) == (b.clip, b.video, b.arrays.keys())
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def test_unshuffled_it_is_plain_reading(dataset: Dataset) -> None:
    streamed = list(stream(dataset.root))
    assert len(streamed) == len(dataset)
    for got, expected in zip(streamed, dataset, strict=True):
        assert_same(got, expected)
    streamed[0].arrays["actions"][:] = 0  # a copy of its own, writable
    assert keys(str(dataset.root) + "/", epochs=2) == dataset.keys() * 2


def test_latents(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 1, 3, 3)).astype(np.float16)
    with ShardWriter(tmp_path / "z", kind="latents") as writer:
        writer.write(ShardSample(sample(0).clip, None, {"latents": latents}))
    commit_dataset(tmp_path / "z", writer.shards, kind="latents", store=Store(tmp_path / "store"))
    (got,) = stream(tmp_path / "z")
    assert got.video is None
    np.testing.assert_array_equal(got.arrays["latents"], latents)


def test_from_a_url(dataset: Dataset) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(dataset.root), "/streamed", recursive=True)
    try:
        assert keys("memory://streamed") == dataset.keys()
        fs.rm(f"/streamed/{dataset.index.shards[2].path}")
        with pytest.raises(WorldloomError, match=r"cannot be read[^$]*000002\.tar"):
            keys("memory://streamed")
        fs.rm("/streamed/dataset.json")
        with pytest.raises(WorldloomError, match="not a finished dataset"):
            stream("memory://streamed")
    finally:
        fs.rm("/streamed", recursive=True)
    with pytest.raises(WorldloomError, match="cannot be opened"):
        stream("nosuchprotocol://x")


@given(st.integers(1, 8), st.sampled_from([0, 1, 2, 7, 100]), st.integers(0, 2**40))
def test_ranks_are_disjoint_and_complete(dataset: Dataset, world: int, shuffle: int, seed: int) -> None:
    shard_of = {key: number for number in range(8) for key in [s.clip.id for s in dataset.iter_shard(number)]}
    both = [keys(dataset.root, shuffle=shuffle, seed=seed, epochs=2, rank=r, world=world) for r in range(world)]
    assert sorted(key for part in both for key in part) == sorted(dataset.keys() * 2)
    parts = [keys(dataset.root, shuffle=shuffle, seed=seed, rank=r, world=world) for r in range(world)]
    assert sorted(key for part in parts for key in part) == dataset.keys()
    shards = [shard_of[key] for part in parts for key in dict.fromkeys(part)]
    assert sum(len({shard_of[key] for key in part}) for part in parts) == len(set(shards)) == 8
    for part, first in zip(both, parts, strict=True):
        assert part[: len(first)] == first


def test_shuffling_follows_the_seed(dataset: Dataset) -> None:
    orders = [keys(dataset.root, shuffle=8, seed=seed) for seed in range(5)]
    assert [keys(dataset.root, shuffle=8, seed=seed) for seed in range(5)] == orders
    assert len({tuple(order) for order in [*orders, dataset.keys()]}) == 6
    twice = keys(dataset.root, shuffle=8, seed=0, epochs=2)
    assert twice[:23] == orders[0]
    assert twice[23:] != twice[:23]
    assert sorted(twice[23:]) == dataset.keys()
    # Shards move as wholes where one sample is held,
    alone = keys(dataset.root, shuffle=1, seed=0)
    shards = [[item.clip.id for item in dataset.iter_shard(number)] for number in range(8)]
    assert alone != dataset.keys()
    assert alone == [key for shard in sorted(shards, key=lambda shard: alone.index(shard[0])) for key in shard]
    # and samples move away from the rest of their shard where more are held.
    first = [sorted(order.index(key) for key in dataset.keys()[:3]) for order in orders]
    assert any(places[2] - places[0] > 2 for places in first)
    endless = stream(dataset.root, shuffle=8, seed=0, epochs=None)
    assert [next(endless).clip.id for _ in range(60)] == keys(dataset.root, shuffle=8, seed=0, epochs=3)[:60]


class Streamed(IterableDataset):
    def __init__(self, root: Path) -> None:
        self.root = root

    def __iter__(self):
        return (item.clip.id for item in stream(self.root, shuffle=4, rank=0, world=2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_share_the_shards_of_their_rank(dataset: Dataset) -> None:
    alone = keys(dataset.root, shuffle=4, rank=0, world=2)
    shared = list(DataLoader(Streamed(dataset.root), batch_size=None, num_workers=3))
    assert shared != alone
    assert sorted(shared) == sorted(alone)
    # More workers than shards: some have nothing to do, and nothing is read twice.
    assert sorted(DataLoader(Streamed(dataset.root), batch_size=None, num_workers=5)) == sorted(alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle": -1}, "shuffle must be"),
        ({"epochs": 0}, "epochs 1 or more"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1"),
        ({"world": 9}, "8 shards for 9 ranks"),
    ],
)
def test_wrong_arguments_are_refused_before_reading(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldloomError, match=message):
        stream(dataset.root, **changes)


def test_without_webdataset_plain_reading_works_and_streaming_says_how(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert len(list(dataset)) == 23
    with pytest.raises(WorldloomError, match=r"worldloom\[curation\]"):
        stream(dataset.root)


def test_the_secure_mode_is_on(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wds.utils, "enforce_security", False)
    next(stream(dataset.root))
    assert wds.utils.enforce_security
    with pytest.raises(ValueError, match="Unpickling is not allowed"):
        wds.autodecode.unpickle_loads(pickle.dumps(1))


def test_its_own_writer_gives_our_bytes(dataset: Dataset) -> None:
    for ref in dataset.index.shards:
        buffer = io.BytesIO()
        with wds.TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for key, members in read_members(dataset.root / ref.path):
                writer.write({"__key__": key, **members})
        assert buffer.getvalue() == (dataset.root / ref.path).read_bytes()


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    size = 1 << 18
    root = build(tmp_path / "data", count=64, per_shard=32, size=size).root
    for shuffle, held in ((0, 8), (6, 14)):  # a sample is held as the member's parts, whole, and decoded
        list(stream(root, shuffle=shuffle))  # imports and caches
        tracemalloc.start()
        for _ in stream(root, shuffle=shuffle):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < held * size


# Hostile shards. Each is recorded truthfully in dataset.json, so that what is refused is what it holds.


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


Member = tuple[str, bytes, bytes]  # name, data, tar type


def packed(number: int = 0, **changes: bytes) -> list[Member]:
    members = pack(sample(number)) | {key.replace("__", "."): value for key, value in changes.items()}
    return [(f"clip-{number:04d}.{e}", members[e], tarfile.REGTYPE) for e in sorted(members)]


def tar(members: list[Member], mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **({"format": tarfile.USTAR_FORMAT} | options)) as opened:  # type: ignore[call-overload]
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "" if kind == tarfile.REGTYPE else "/etc/passwd"
            opened.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hostile_dataset(root: Path, data: bytes, samples: int = 2, **ref: Any) -> Dataset:
    shutil.rmtree(root, ignore_errors=True)
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "000000.tar").write_bytes(data)
    recorded: dict[str, Any] = {
        "path": "shards/000000.tar",
        "digest": hashlib.sha256(data).hexdigest(),
        "samples": samples,
    }
    recorded |= {"bytes": len(data)} | ref
    shard = ShardRef(**recorded)
    content = {"format": 1, "kind": "clips", "id": "dataset-0", "samples": shard.samples, "frames": 8, "fps": 30.0}
    content |= {"size": [5, 6], "action_dim": A, "shards": [dataclasses.asdict(shard)]}
    (root / "dataset.json").write_text(json.dumps(content))
    return open_dataset(root)


def refusals(dataset: Dataset) -> tuple[str, str]:
    """What plain reading says, what streaming says; each must refuse."""
    said = []
    reads: list[Callable[[], object]] = [lambda: list(dataset), lambda: list(stream(dataset.root))]
    for read in reads:
        with pytest.raises(WorldloomError) as caught:
            read()
        assert len(caught.value.args) == 1  # webdataset's additions are gone
        said.append(str(caught.value))
    return said[0], said[1]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def hostile_members(mark: Path) -> dict[str, list[Member]]:
    bomb = pickle.dumps(Bomb(mark))
    extra = functools.partial(
        lambda name, data=b"{}", kind=tarfile.REGTYPE: [*packed(0), (name, data, kind), *packed(1)]
    )
    cases = {f"extension {e}": extra(f"clip-0000.{e}", bomb) for e in ("pkl", "pickle", "pyd", "pth", "ten", "json.gz")}
    cases |= {
        f"path {name}": extra(name)
        for name in ("../clip-0000.json", "/etc/clip.json", "a/clip.json", "clip", ".json", "clip 0.json", "__x__")
    }
    cases |= {f"upper case {name}": extra(name) for name in ("clip-0000.JSON", "clip-0000.Rewards.npy")}
    kinds = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "folder": tarfile.DIRTYPE}
    kinds |= {"fifo": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    cases |= {name: extra("clip-0000.rewards.npy", b"", kind) for name, kind in kinds.items()}
    whole = [*packed(0), *packed(1)]
    cases |= {
        "object array": [*packed(0), *packed(1, actions__npy=npy(np.array([[Bomb(mark)] * A] * (T - 1))))],
        "no video": [item for item in whole if not item[0].endswith("mp4")],
        "no json at the end": [item for item in whole if item[0] != "clip-0001.json"],
        "twice": [*whole, whole[-1]],
        "twice in a row": [*packed(0), *packed(0)],
        "apart": [*whole, packed(0)[0]],
        "bad json": [*packed(0), *packed(1, json=b"{")],
        "another clip": [*packed(0), *packed(1, json=pack(sample(5))["json"])],
        "cut array": [*packed(0), *packed(1, actions__npy=pack(sample(1))["actions.npy"][:-4])],
        "bad zip": [*packed(0), *packed(1, depth__npz=b"PK")],
    }
    return cases


@pytest.mark.parametrize("case", hostile_members(Path("unused")))
def test_both_readers_refuse_in_the_same_words(case: str, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    plain, streamed = refusals(hostile_dataset(tmp_path / "data", tar(hostile_members(mark)[case])))
    assert streamed == plain
    assert not mark.exists()


def test_the_same_without_the_hostile_member_is_read(tmp_path: Path) -> None:
    hostile_dataset(tmp_path / "data", tar([*packed(0), *packed(1)]))
    assert keys(tmp_path / "data") == ["clip-0000", "clip-0001"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(mode: str, tmp_path: Path) -> None:
    """webdataset would unpack it, whatever its size."""
    hostile_dataset(tmp_path / "data", tar([*packed(0), *packed(1)], mode))
    with pytest.raises(WorldloomError, match="not a whole tar shard"):
        keys(tmp_path / "data")


def test_extension_headers_are_refused(tmp_path: Path) -> None:
    """PAX and GNU long names: a shard is plain USTAR, and their length would be read unseen."""
    long = [(f"{'x' * 120}.json", b"{}", tarfile.REGTYPE)]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        hostile_dataset(tmp_path / "data", tar([*packed(0), *packed(1), *long], format=form))
        with pytest.raises(WorldloomError, match="not a regular file"):
            keys(tmp_path / "data")


def test_a_cut_off_tar_is_refused_at_every_length(tmp_path: Path) -> None:
    data = tar([*packed(0), *packed(1)])
    end = len(data.rstrip(b"\0"))
    for length in [0, 1, 511, 512, 513, 1024, *range(2048, end, 397), end, -(-end // 512) * 512, len(data) - 512]:
        for ref in ({}, {"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}):
            root = hostile_dataset(tmp_path / "data", data[:length], **ref).root
            if length == len(data) - 512 and not ref:
                continue  # two empty blocks end a tar; fewer than usual of them is no damage unless recorded otherwise
            with pytest.raises(WorldloomError):
                keys(root)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Even one in a video, which plain reading takes as it is; and the last sample is not given before."""
    data = tar([*packed(0), *packed(1)])
    digest = hashlib.sha256(data).hexdigest()
    for place in range(0, len(data), 211):
        changed = bytearray(data)
        changed[place] ^= 0x10
        root = hostile_dataset(tmp_path / "data", bytes(changed), digest=digest).root
        given_first = []
        with pytest.raises(WorldloomError):
            given_first.extend(item.clip.id for item in stream(root))
        assert given_first in ([], ["clip-0000"])


def test_a_shard_of_other_length_or_count_is_refused(tmp_path: Path) -> None:
    data = tar([*packed(0), *packed(1)])
    for changes, message in [
        ({"samples": 3}, "2 instead of 3"),
        ({"samples": 1}, "2 instead of 1"),
        ({"digest": "0" * 64}, "digest"),
        ({"bytes": len(data) + 1}, "digest"),
        ({"bytes": 2000}, "too large"),
    ]:
        hostile_dataset(tmp_path / "data", data, **({"samples": 2} | changes))
        with pytest.raises(WorldloomError, match=message):
            keys(tmp_path / "data")


def test_what_follows_the_end_is_read_no_further_than_recorded(tmp_path: Path) -> None:
    data = tar([*packed(0), *packed(1)])
    root = hostile_dataset(tmp_path / "data", data).root
    with open(root / "shards" / "000000.tar", "ab") as file:
        file.truncate(1 << 40)  # a sparse file; reading it would take minutes
    with pytest.raises(WorldloomError, match="digest"):
        keys(root)
