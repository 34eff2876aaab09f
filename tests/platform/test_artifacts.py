from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom import WorldloomError, artifacts
from worldloom.artifacts import Store, atomic_dir, atomic_write, file_digest, tree_digest

SOURCE = "file:" + "a" * 64 + ":videos/a.mp4"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "shards").mkdir(parents=True)
    (folder / "dataset.json").write_text('{"format": 1}')
    (folder / "shards" / "000000.tar").write_bytes(bytes(range(256)) * 40)
    return folder


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "store" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/store")


def test_put_get_find(store: Store, dataset: Path) -> None:
    made = store.put(
        dataset, kind="dataset", name="mine", inputs=[SOURCE], config={"fps": 10}, seed=3, metadata={"clips": 4}
    )
    assert re.fullmatch(r"dataset-[0-9a-f]{16}", made.id)
    assert store.get(made.id) == made
    assert store.find() == store.find("dataset") == [made]
    assert store.find("model") == []
    assert made.id in store
    assert made.id[:-1] not in store
    assert f"../records/{made.id}" not in store
    assert made.inputs == (SOURCE,)
    assert (made.config, made.seed, made.metadata, made.size) == ({"fps": 10}, 3, {"clips": 4}, 10240 + 13)
    assert made.digest == tree_digest(dataset)
    assert made.files["shards/000000.tar"].sha256 == file_digest(dataset / "shards" / "000000.tar")


def test_the_id_depends_on_content_inputs_config_and_seed_alone(store: Store, dataset: Path, tmp_path: Path) -> None:
    first = store.put(dataset, kind="dataset", config={"a": 1, "b": 2}, seed=0)
    copy = tmp_path / "elsewhere"
    dataset.rename(copy)
    again = store.put(copy, kind="dataset", name="other", config={"b": 2, "a": 1}, seed=0, metadata={"x": 1})
    assert again.id == first.id
    assert store.get(first.id).location == str(copy)
    others = [
        store.put(copy, kind="latents", config={"a": 1, "b": 2}, seed=0),
        store.put(copy, kind="dataset", config={"a": 1, "b": 3}, seed=0),
        store.put(copy, kind="dataset", config={"a": 1, "b": 2}, seed=1),
        store.put(copy, kind="dataset", config={"a": 1, "b": 2}, seed=0, inputs=[SOURCE]),
    ]
    (copy / "dataset.json").write_text('{"format": 2}')
    others.append(store.put(copy, kind="dataset", config={"a": 1, "b": 2}, seed=0))
    assert len({first.id, *(other.id for other in others)}) == 6


def test_storing_again_keeps_the_first_date(dataset: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = tmp_path / "store" / "records" / f"{store.put(dataset, kind='dataset').id}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"created": "2001-01-01T00:00:00+00:00"}))
    assert store.put(dataset, kind="dataset").created == "2001-01-01T00:00:00+00:00"


def test_the_record_says_what_the_documentation_says(dataset: Path, tmp_path: Path) -> None:
    made = Store(tmp_path / "store").put(dataset, kind="dataset")
    lines = [(name, file_digest(dataset / name)) for name in ("dataset.json", "shards/000000.tar")]
    identity = json.dumps(["dataset", lines, [], {}, None], separators=(",", ":"))
    assert made.id == "dataset-" + hashlib.sha256(identity.encode()).hexdigest()[:16]
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == [f"{made.id}.json"]


def test_a_single_file(store: Store, tmp_path: Path) -> None:
    video = tmp_path / "out.mp4"
    video.write_bytes(b"frames")
    made = store.put(video, kind="sample", copy=True)
    assert made.digest == file_digest(video)
    assert made.path("out.mp4") == video
    assert (store.fetch(made.id, tmp_path / "back") / "out.mp4").read_bytes() == b"frames"


def test_prefixes(store: Store, tmp_path: Path) -> None:
    ids = []
    for i in range(40):
        (tmp_path / "one").write_text(str(i))
        ids.append(store.put(tmp_path / "one", kind="sample").id)
    assert store.get(ids[7][:-4]).id == ids[7]
    assert store.get(ids[7].partition("-")[2]).id == ids[7]
    with pytest.raises(WorldloomError, match="40 artifacts begin like that") as error:
        store.get("sample-")
    assert sum(one in error.value.do for one in ids) == 5
    with pytest.raises(WorldloomError, match="no artifact of that id") as error:
        store.get(ids[7][:-1] + "z")
    assert ids[7] in error.value.do
    with pytest.raises(WorldloomError):
        store.get("")


def test_fetch_restores_what_was_copied(store: Store, dataset: Path, tmp_path: Path) -> None:
    made = store.put(dataset, kind="dataset", copy=True)
    digest = tree_digest(dataset)
    for file in dataset.rglob("*.*"):
        file.unlink()
    back = store.fetch(made.id, tmp_path / "back")
    assert tree_digest(back) == digest
    assert store.verify(made.id) == []  # gone from its place, but the store has the bytes
    # A second fetch mends a damaged file and leaves nothing else behind.
    (back / "dataset.json").write_text("damaged")
    assert tree_digest(store.fetch(made.id, back)) == digest
    assert sorted(path.name for path in back.rglob("*")) == ["000000.tar", "dataset.json", "shards"]


def test_fetch_without_a_copy_needs_the_bytes_unchanged(store: Store, dataset: Path, tmp_path: Path) -> None:
    made = store.put(dataset, kind="dataset")
    assert tree_digest(store.fetch(made.id, tmp_path / "a")) == made.digest
    (dataset / "dataset.json").write_text("{}")
    with pytest.raises(WorldloomError, match=r"dataset\.json are gone or have changed"):
        store.fetch(made.id, tmp_path / "b")
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]


def test_verify_notices_tampering_at_the_location(store: Store, dataset: Path) -> None:
    made = store.put(dataset, kind="dataset")
    assert store.verify(made.id) == []
    shard = dataset / "shards" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert store.verify(made.id) == ["shards/000000.tar"]
    (dataset / "dataset.json").unlink()
    assert store.verify(made.id) == ["dataset.json", "shards/000000.tar"]


def test_verify_and_fetch_notice_tampering_in_the_store(dataset: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = store.put(dataset, kind="dataset", copy=True)
    digest = made.files["dataset.json"].sha256
    (tmp_path / "store" / "objects" / digest[:2] / digest[2:]).write_text('{"format": 9}')
    assert store.verify(made.id) == ["dataset.json"]
    with pytest.raises(WorldloomError, match=r"dataset\.json"):
        store.fetch(made.id, tmp_path / "back")
    assert not (tmp_path / "back" / "dataset.json").exists()
    store.put(dataset, kind="dataset", copy=True)  # storing it again mends the store
    assert store.verify(made.id) == []


def test_a_record_cannot_write_outside_the_folder(dataset: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = store.put(dataset, kind="dataset", copy=True)
    record = tmp_path / "store" / "records" / f"{made.id}.json"
    for name in ("../escaped", "/tmp/escaped", "a/../../escaped"):
        fields = json.loads(record.read_text())
        fields["files"] = {name: next(iter(fields["files"].values()))}
        record.write_text(json.dumps(fields))
        with pytest.raises(WorldloomError, match="outside its folder"):
            store.fetch(made.id, tmp_path / "back" / "deep")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "sample-0000000000000000.json").write_text(text)
    with pytest.raises(WorldloomError, match="record of sample-0000000000000000 is damaged"):
        Store(tmp_path).get("sample-0")


def test_what_cannot_be_stored_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorldloomError, match="folder is empty"):
        store.put(tmp_path / "empty", kind="dataset")
    with pytest.raises(WorldloomError, match="nothing at this path"):
        store.put(tmp_path / "absent", kind="dataset")
    (tmp_path / "file").write_text("x")
    for kind in ("", "../x", "A", "a b"):
        with pytest.raises(WorldloomError, match="one lower-case word"):
            store.put(tmp_path / "file", kind=kind)
    with pytest.raises(WorldloomError, match="store cannot be opened"):
        Store("nosuchprotocol://x")


def test_the_default_store_is_in_the_home(worldloom_home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    made = Store().put(tmp_path / "file", kind="sample")
    assert (worldloom_home / "store" / "records" / f"{made.id}.json").is_file()


# The process is killed when it is about to open or rename a file whose path contains a word; no code is replaced.
KILLED = """
import os, signal, sys
from worldloom.artifacts import Store, atomic_dir, atomic_write
event, word, action = sys.argv[1], sys.argv[2], sys.argv[3]
def hook(name, arguments):
    if name == event and any(word in os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))):
        os.kill(os.getpid(), signal.SIGKILL)
import fsspec, shutil
fsspec.url_to_fs("/")
sys.addaudithook(hook)
exec(action)
"""


def _killed(event: str, word: str, action: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, event, word, action], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("event", "word"),
    [("open", "/objects/"), ("os.rename", "/objects/"), ("open", "/records/"), ("os.rename", "/records/")],
)
def test_killed_while_storing_nothing_is_torn(dataset: Path, tmp_path: Path, event: str, word: str) -> None:
    root = tmp_path / "store"
    _killed(event, word, f"Store({str(root)!r}).put({str(dataset)!r}, kind='dataset', copy=True)")
    store = Store(root)
    assert store.find() == []  # the record comes last
    for path in (root / "objects").rglob("*"):
        if path.is_file() and artifacts._TEMPORARY not in path.name:
            assert file_digest(path) == path.parent.name + path.name
    made = store.put(dataset, kind="dataset", copy=True)
    assert store.verify(made.id) == []
    assert tree_digest(store.fetch(made.id, tmp_path / "back")) == tree_digest(dataset)


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_killed_while_writing_the_old_file_stays(tmp_path: Path, event: str) -> None:
    path = tmp_path / "folder" / "summary.json"
    atomic_write(path, "old")
    _killed(event, "summary.json", f"atomic_write({str(path)!r}, 'new')")
    assert path.read_text() == "old"
    # What the killed process left behind is not content.
    assert tree_digest(tmp_path / "folder") == tree_digest_of({"summary.json": b"old"})


def tree_digest_of(files: dict[str, bytes]) -> str:
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def test_killed_before_the_folder_is_renamed_it_does_not_exist(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    action = f"with atomic_dir({str(out)!r}) as folder:\n    (folder / 'model.safetensors').write_bytes(b'w')"
    _killed("os.rename", "checkpoint", action)
    assert not out.exists()
    with atomic_dir(out) as folder:
        (folder / "model.safetensors").write_bytes(b"w")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_atomic_dir_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_dir(tmp_path / "deep" / "out") as folder:
            (folder / "part").write_text("x")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []


def test_atomic_dir_takes_an_empty_folder_and_refuses_a_full_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_dir(out) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
    assert (out / "a" / "b").read_text() == "x"
    with pytest.raises(WorldloomError, match="already exists"), atomic_dir(out):
        raise AssertionError("the work must not begin")


def test_atomic_write_replaces_and_keeps_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "new", "ü")
    atomic_write(tmp_path / "new", "ß")
    assert (tmp_path / "new").read_text(encoding="utf-8") == "ß"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "plain"]


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}(/[a-z]{4,6})?", fullmatch=True), st.binary(max_size=30), min_size=1))
def test_a_tree_digest_is_of_names_and_bytes(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    names = {name for name in files if not any(other.startswith(name + "/") for other in files)}
    kept = {name: files[name] for name in names}
    folder = tmp_path_factory.mktemp("tree")
    for name, data in kept.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    assert tree_digest(folder) == tree_digest_of(kept)


def test_the_code_version_names_the_commit() -> None:
    text = artifacts.code_version()
    assert re.fullmatch(r"worldloom \d+\.\d+\.\d+(\+git\.[0-9a-f]{12}(\.dirty)?)?", text)
    here = Path(artifacts.__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False).stdout
    if head:
        assert "+git." in text
