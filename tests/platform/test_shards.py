"""Datasets: what goes in comes out, byte for byte and in order; what does not belong is refused by name."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldloom.artifacts import Store, file_digest
from worldloom.errors import WorldloomError
from worldloom.schema import Clip
from worldloom.shards import (
    Dataset,
    ShardSample,
    ShardWriter,
    commit_dataset,
    open_dataset,
    pack,
    read_members,
    scan_shard,
)

T, H, W, A = 5, 6, 8, 3


def clip(key: str, frames: int = T, action_dim: int = A, **changes: Any) -> Clip:
    given: dict[str, Any] = {"source": "a.mp4", "source_digest": "d", "start": 2, "end": 2 + frames, "fps": 30.0}
    given |= {"width": W, "height": H, "action_dim": action_dim, "metadata": {"seed": 1}} | changes
    return Clip(id=key, **given)


def sample(number: int, **changes: Any) -> ShardSample:
    rng = np.random.default_rng(number)
    arrays = {
        "actions": rng.standard_normal((T - 1, A)).astype(np.float32),
        "rewards": rng.standard_normal(T - 1).astype(np.float32),
        "depth": rng.integers(0, 60000, (T, H, W), dtype=np.uint16),
        "segmentation": rng.integers(0, 9, (T, H, W), dtype=np.uint8),
    }
    return ShardSample(
        clip(f"clip-{number:04d}", caption=f"über №{number}", **changes), rng.bytes(700 + number), arrays
    )


def assert_same(a: ShardSample, b: ShardSample) -> None:
    assert a.clip == b.clip
    assert a.video == b.video
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def build(root: Path, count: int = 7, per_shard: int = 3) -> Dataset:
    with ShardWriter(root, samples_per_shard=per_shard) as writer:
        for number in range(count):
            writer.write(sample(number))
    commit_dataset(root, writer.shards, inputs=["file:d:a.mp4"], store=Store(root.parent / "store"))
    return open_dataset(root)


def tar_of(path: Path, members: list[tuple[str, bytes]], **info_changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in info_changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_round_trip_in_order_by_number_and_by_key(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data")
    assert [ref.samples for ref in dataset.index.shards] == [3, 3, 1]
    assert len(dataset) == 7
    read = list(dataset)
    assert len(read) == 7
    for number, got in enumerate(read):
        assert_same(got, sample(number))
        assert_same(dataset.load(number), got)
        assert_same(dataset.load(f"clip-{number:04d}"), got)
        assert dataset.clip(number) == got.clip
    assert_same(dataset.load(-1), sample(6))
    assert dataset.keys() == [f"clip-{n:04d}" for n in range(7)]
    assert [c.id for c in dataset.clips()] == dataset.keys()
    for wrong in (7, -8, "clip-0007"):
        with pytest.raises(WorldloomError):
            dataset.load(wrong)


def test_index_says_what_is_in_the_clips(tmp_path: Path) -> None:
    index = build(tmp_path / "data").index
    assert (index.kind, index.samples, index.frames, index.fps) == ("clips", 7, 7 * T, 30.0)
    assert (index.size, index.action_dim, index.tokenizer) == ((H, W), A, None)
    record = Store(tmp_path / "store").get(index.id)
    assert record.kind == "dataset"
    assert record.inputs == ("file:d:a.mp4",)
    assert {f"shards/{name}": entry.sha256 for name, entry in record.files.items()} == {
        ref.path: ref.digest for ref in index.shards
    }
    for ref in index.shards:
        assert ref.digest == file_digest(tmp_path / "data" / ref.path)
        assert ref.bytes == (tmp_path / "data" / ref.path).stat().st_size
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["format"] == 1


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a" / "data"), build(tmp_path / "b" / "data")
    assert first.index == second.index  # ids and digests included
    for ref in first.index.shards:
        assert (first.root / ref.path).read_bytes() == (second.root / ref.path).read_bytes()
    with tarfile.open(first.root / "shards" / "000000.tar") as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (0, 0, 0, "", "", 0o644)
    }
    with zipfile.ZipFile(io.BytesIO(pack(sample(0))["depth.npz"])) as archive:
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)


names = st.text("abcXYZ019_-", min_size=1, max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def samples(draw: st.DrawFn) -> ShardSample:
    frames, action_dim = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays: dict[str, np.ndarray] = {}
    if draw(st.booleans()) and action_dim:
        arrays["actions"] = rng.standard_normal((frames - 1, action_dim)).astype(np.float32)
    if draw(st.booleans()):
        arrays["rewards"] = rng.standard_normal(frames - 1).astype(np.float32)
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([np.uint8, np.uint16]))
        arrays["depth"] = np.asfortranarray(rng.integers(0, 255, (frames, 3, 2)).astype(dtype))
    if draw(st.booleans()):
        arrays["segmentation"] = rng.integers(0, 255, (frames, 3, 2)).astype(np.uint8)[:, ::-1]
    metadata = draw(st.dictionaries(st.text(), json_values, max_size=3))
    caption = draw(st.text(max_size=50))
    return ShardSample(
        clip(draw(names), frames, action_dim, caption=caption, metadata=metadata),
        rng.bytes(draw(st.integers(0, 2000))),
        arrays,
    )


@given(
    st.lists(samples(), min_size=1, max_size=8, unique_by=lambda s: s.clip.id),
    st.integers(1, 4),
    st.integers(1, 20_000),
)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_samples_round_trip(tmp_path_factory, given_samples, per_shard: int, max_bytes: int) -> None:
    root = tmp_path_factory.mktemp("data")
    with ShardWriter(root, samples_per_shard=per_shard, max_bytes=max_bytes) as writer:
        for item in given_samples:
            writer.write(item)
    read = [got for ref in writer.shards for entry_set in [scan_shard(root / ref.path)] for got in entry_set]
    assert [entry.key for entry in read] == [item.clip.id for item in given_samples]
    for ref in writer.shards:
        assert ref.samples <= per_shard
        assert ref.bytes <= max(max_bytes, 0) + 10240 or ref.samples == 1
        with open(root / ref.path, "rb") as file:
            for entry in scan_shard(root / ref.path):
                expected = next(item for item in given_samples if item.clip.id == entry.key)
                assert_same(entry.read(file, "clips"), expected)


def test_latents(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(np.float16)
    tokenizer = {"name": "loom-cv-nano", "fingerprint": "f" * 64}
    with ShardWriter(tmp_path / "z", kind="latents") as writer:
        writer.write(ShardSample(clip("a", action_dim=0), None, {"latents": latents}))
        with pytest.raises(WorldloomError, match="latents"):
            writer.write(ShardSample(clip("b", action_dim=0), b"video", {}))
        with pytest.raises(WorldloomError, match="float16"):
            writer.write(ShardSample(clip("c", action_dim=0), None, {"latents": latents.astype(np.float32)}))
    commit_dataset(tmp_path / "z", writer.shards, kind="latents", tokenizer=tokenizer, store=Store(tmp_path / "store"))
    dataset = open_dataset(tmp_path / "z")
    assert dataset.index.id.startswith("latents-")
    assert dataset.index.tokenizer == tokenizer
    got = dataset.load(0)
    assert got.video is None
    np.testing.assert_array_equal(got.arrays["latents"], latents)
    got.arrays["latents"][:] = 0  # a copy of its own, writable


def test_codes_go_with_the_latents_they_are_of(tmp_path: Path) -> None:
    latents = np.zeros((4, 2, 3, 3), np.float16)
    codes = np.arange(2 * 2 * 3 * 3, dtype=np.int32).reshape(2, 2, 3, 3)
    written = ShardSample(clip("c"), None, {"latents": latents, "codes": codes})
    with ShardWriter(tmp_path, kind="latents") as writer:
        writer.write(written)
    commit_dataset(tmp_path, writer.shards, kind="latents", store=Store(tmp_path / "store"))
    assert_same(open_dataset(tmp_path).load(0), written)
    for wrong in (codes[:, :1], codes.astype(np.int64), codes[0]):
        with pytest.raises(WorldloomError, match="codes"):
            pack(ShardSample(clip("c"), None, {"latents": latents, "codes": wrong}), "latents")
    with pytest.raises(WorldloomError, match="go with latents"):
        pack(ShardSample(clip("c"), b"video", {"codes": codes}), "clips")


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    """In a process of its own, since WDS_SECURE is read when the library is imported."""
    pytest.importorskip("webdataset")
    dataset = build(tmp_path / "data")
    code = """
        import json, sys, warnings
        warnings.simplefilter("ignore")
        import webdataset
        rows = []
        for row in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode():
            rows.append([row["__key__"], len(row["mp4"]), row["json"]["caption"], row["actions.npy"].tolist(),
                         row["depth.npz"]["data"].tolist()])
        print(json.dumps(rows))
    """
    shards = [str(dataset.root / ref.path) for ref in dataset.index.shards]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *shards],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"WDS_SECURE": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for number, (key, size, caption, actions, depth) in enumerate(rows):
        expected = sample(number)
        assert (key, size, caption) == (expected.clip.id, len(expected.video or b""), expected.clip.caption)
        np.testing.assert_array_equal(np.float32(actions), expected.arrays["actions"])
        np.testing.assert_array_equal(depth, expected.arrays["depth"])
    assert len(rows) == 7


def test_a_dataset_crosses_processes(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data")
    dataset.load(0)
    assert_same(pickle.loads(pickle.dumps(dataset)).load(5), sample(5))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, got in enumerate(pool.map(dataset.load, range(7))):
            assert_same(got, sample(number))


def test_members_move_between_tars_unchanged(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data")
    with ShardWriter(tmp_path / "copy", samples_per_shard=3) as writer:
        for ref in dataset.index.shards:
            for key, members in read_members(dataset.root / ref.path):
                writer.write_members(key, members)
    assert tuple(writer.shards) == dataset.index.shards


def test_an_error_leaves_whole_shards_only(tmp_path: Path) -> None:
    def fail_at_the_third() -> None:
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for number in range(3):
                writer.write(sample(number))
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail_at_the_third()
    assert [item.name for item in (tmp_path / "shards").iterdir()] == ["000000.tar"]
    assert len(scan_shard(tmp_path / "shards" / "000000.tar")) == 2


def test_a_refused_sample_leaves_no_trace(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.write(sample(0))
        bad = sample(1)
        bad.arrays["actions"] = bad.arrays["actions"][:-1]
        with pytest.raises(WorldloomError, match="actions must have 4 rows for 5 frames"):
            writer.write(bad)
        writer.write(sample(1))
    assert len(scan_shard(tmp_path / "a" / "shards" / "000000.tar")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": clip("a/b")}, "clip id"),
        ({"clip": clip("a.b")}, "clip id"),
        ({"clip": clip("")}, "clip id"),
        ({"clip": clip("a", metadata={"x": object()})}, "plain JSON"),
        ({"clip": clip("a", metadata={"x": float("nan")})}, "plain JSON"),
        ({"video": None}, "video"),
        ({"arrays": {"latents": np.zeros((1, 1, 1, 1), np.float16)}}, "latents"),
        ({"arrays": {"sound": np.zeros(3, np.float32)}}, "sound"),
        ({"arrays": {"actions": np.zeros((T - 1, A), np.float64)}}, "float32"),
        ({"arrays": {"actions": np.zeros((T - 1, A + 1), np.float32)}}, "action_dim"),
        ({"arrays": {"actions": np.array([[None] * A] * (T - 1))}}, "float32"),
        ({"arrays": {"rewards": np.zeros((T - 1, 1), np.float32)}}, "axes"),
        ({"arrays": {"depth": np.zeros((T + 1, H, W), np.uint8)}}, "rows"),
        ({"arrays": {"segmentation": np.zeros((T, H, W), np.uint16)}}, "uint8"),
    ],
)
def test_what_may_not_be_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldloomError, match=message):
        pack(dataclasses.replace(sample(0), **changes))


def test_keys_are_unique(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        writer.write(sample(0))
        with pytest.raises(WorldloomError, match="already written"):
            writer.write(sample(0))


def test_unfinished_and_damaged_datasets(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(sample(0))
    with pytest.raises(WorldloomError, match="not a finished dataset"):
        open_dataset(tmp_path / "data")
    with pytest.raises(WorldloomError, match="not a finished dataset"):
        open_dataset(tmp_path / "nowhere")
    dataset = build(tmp_path / "whole")
    file = tmp_path / "whole" / "dataset.json"
    good = json.loads(file.read_text())
    for change in (
        {"format": 2},
        {"samples": 99},
        {"kind": "sounds"},
        {"surprise": 1},
        {"shards": [good["shards"][0] | {"path": "../../etc/passwd"}]},
        {"shards": [good["shards"][0] | {"path": "/etc/passwd"}]},
        {"shards": "x"},
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(WorldloomError, match=r"damaged|format"):
            open_dataset(tmp_path / "whole")
    file.write_text("{")
    with pytest.raises(WorldloomError, match="cannot be read"):
        open_dataset(tmp_path / "whole")
    file.write_text(json.dumps(good))
    assert open_dataset(tmp_path / "whole").index == dataset.index
    (tmp_path / "whole" / "shards" / "000001.tar").unlink()
    with pytest.raises(WorldloomError, match=r"missing"):
        open_dataset(tmp_path / "whole")


def test_verify_finds_every_changed_byte(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data")
    assert dataset.verify() == []
    file = dataset.root / "shards" / "000001.tar"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    assert [problem.split()[0] for problem in dataset.verify()] == ["shards/000001.tar"]
    (dataset.root / "shards" / "000000.tar").unlink()
    assert dataset.verify()[0] == "shards/000000.tar is missing"


def test_commit_needs_samples_and_one_action_size(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no sample"):
        commit_dataset(tmp_path, [], store=Store(tmp_path / "store"))
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(sample(0))
        writer.write(ShardSample(clip("other", action_dim=0), b"v", {}))
    with pytest.raises(WorldloomError, match="action size"):
        commit_dataset(tmp_path / "data", writer.shards, store=Store(tmp_path / "store"))
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_commit_clears_what_an_earlier_run_left(tmp_path: Path) -> None:
    build(tmp_path / "data", count=9)
    (tmp_path / "data" / "shards" / "000007.tar.worldloom-tmp").write_bytes(b"half")
    dataset = build(tmp_path / "data", count=2)
    assert [item.name for item in (tmp_path / "data" / "shards").iterdir()] == ["000000.tar"]
    assert len(list(dataset)) == 2


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def members(**changes: bytes) -> list[tuple[str, bytes]]:
    packed = pack(sample(0)) | {key.replace("__", "."): value for key, value in changes.items()}
    return [(f"clip-0000.{extension}", packed[extension]) for extension in sorted(packed)]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    for number, extension in enumerate(("pkl", "pyd", "pickle", "pth", "ten", "json.gz")):
        data = [*members(), (f"clip-0000.{extension}", pickle.dumps(Bomb(mark)))]
        with pytest.raises(WorldloomError, match=rf"clip-0000\.{extension}.*no such member"):
            scan_shard(tar_of(tmp_path / f"{number}.tar", data))
    file = tar_of(tmp_path / "object.tar", members(actions__npy=npy(np.array([[Bomb(mark)] * A] * (T - 1)))))
    (entry,) = scan_shard(file)
    with open(file, "rb") as opened, pytest.raises(WorldloomError, match="never loaded"):
        entry.read(opened, "clips")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, data=np.array([[[Bomb(mark)]]]))
    file = tar_of(tmp_path / "zip.tar", members(depth__npz=buffer.getvalue()))
    with open(file, "rb") as opened, pytest.raises(WorldloomError, match=r"never loaded|data\.npy alone"):
        scan_shard(file)[0].read(opened, "clips")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works, so the test could have failed


@pytest.mark.parametrize(
    "name",
    ["../clip-0000.json", "/etc/clip-0000.json", "a/clip-0000.json", "clip-0000", ".json", "clip 0.json", "__x__"],
)
def test_paths_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="may not"):
        scan_shard(tar_of(tmp_path / "a.tar", [*members(), (name, b"{}")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    file = tar_of(tmp_path / "a.tar", [("clip-0000.json", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(WorldloomError, match="not a regular file"):
        scan_shard(file)


def test_incomplete_and_scrambled_samples(tmp_path: Path) -> None:
    whole = members()
    cases = {
        "missing": [item for item in whole if not item[0].endswith("mp4")],
        "missing ": [item for item in whole if not item[0].endswith("json")],
        "twice": [*whole, whole[-1]],
        "together": [*whole, ("other.json", b"{}"), ("other.mp4", b"v"), ("clip-0000.rewards.npy", b"")],
    }
    for message, data in cases.items():
        with pytest.raises(WorldloomError, match=message.strip()):
            scan_shard(tar_of(tmp_path / "a.tar", data))


def test_a_cut_off_tar_is_refused_at_every_length(tmp_path: Path) -> None:
    data = (build(tmp_path / "data", count=3).root / "shards" / "000000.tar").read_bytes()
    end = data.rstrip(b"\0")
    file = tmp_path / "cut.tar"
    for length in [0, 1, 511, 512, 513, 1024, *range(2048, len(end), 997), len(end)]:
        file.write_bytes(data[:length])
        with pytest.raises(WorldloomError):
            scan_shard(file)
    file.write_bytes(data)
    assert len(scan_shard(file)) == 3


def read_one(tmp_path: Path, **changes: bytes) -> ShardSample:
    file = tar_of(tmp_path / "one.tar", members(**changes))
    with open(file, "rb") as opened:
        return scan_shard(file)[0].read(opened, "clips")


def test_damaged_members(tmp_path: Path) -> None:
    assert_same(read_one(tmp_path), sample(0))
    good = pack(sample(0))
    other = pack(ShardSample(clip("other"), b"", {}))["json"]
    huge = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 3), }".ljust(117)
        + b"\n"
    )
    for changes, message in [
        ({"json": b"{"}, "clip-0000.json"),
        ({"json": b"[]"}, "clip-0000.json"),
        ({"json": b'{"id": "clip-0000"}'}, "clip-0000.json"),
        ({"json": other}, "describes the clip 'other'"),
        ({"actions__npy": good["actions.npy"][:-4]}, "the header says"),
        ({"actions__npy": b"not numpy"}, "actions.npy"),
        ({"actions__npy": huge}, "the header says"),  # claims 12 TB; must not try to allocate them
        ({"actions__npy": npy(np.zeros((T - 1, A), np.float64))}, "float32"),
        ({"actions__npy": npy(np.zeros((T, A), np.float32))}, "rows"),
        ({"actions__npy": npy(np.zeros((T - 1, A), [("x", np.float32)]))}, "plain numbers"),
        ({"depth__npz": b"PK not a zip"}, "depth.npz"),
        ({"depth__npz": good["depth.npz"][:-10]}, "depth.npz"),
    ]:
        with pytest.raises(WorldloomError, match=message):
            read_one(tmp_path, **changes)
