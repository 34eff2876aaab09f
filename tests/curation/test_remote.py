from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from curation_videos import scene, write
from robot_episodes import episode, write_lerobot_dataset

from worldloom import WorldloomError
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.episodes import EpisodeConfig
from worldloom_curation.pipeline import run
from worldloom_curation.remote import _under, local_copy


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=["stages=['split','caption']", *overrides])


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_a_bucket_is_curated_as_its_files_would_be(memory: Any, tmp_path: Path) -> None:
    write(tmp_path / "videos" / "a", scene(1, 30))
    write(tmp_path / "videos" / "sub" / "b", scene(2, 30))
    memory.put(str(tmp_path / "videos"), "/bucket/videos", recursive=True)
    allow = 'sources.allow=["memory://bucket/videos"]'
    summary = run("memory://bucket/videos", tmp_path / "out", settings(allow))
    run(tmp_path / "videos", tmp_path / "local", settings(allow))
    local, remote = open_dataset(tmp_path / "local"), open_dataset(tmp_path / "out")
    assert [sample.video for sample in remote] == [sample.video for sample in local]
    assert remote.index.metadata["source"] == "memory://bucket/videos"
    assert [clip.source for clip in remote.clips()] == ["a.mp4", "sub/b.mp4"]
    assert summary["work"]["scan"]["computed"] == 2
    # One file goes, one comes: only the new one is looked at.
    memory.rm("/bucket/videos/a.mp4")
    write(tmp_path / "more" / "c", scene(3, 30))
    memory.put(str(tmp_path / "more" / "c.mp4"), "/bucket/videos/c.mp4")
    again = run("memory://bucket/videos", tmp_path / "out", settings(allow))
    assert [clip.source for clip in open_dataset(tmp_path / "out").clips()] == ["c.mp4", "sub/b.mp4"]
    assert again["work"]["scan"] == {"cached": 1, "computed": 1, "copied": 0}


def test_one_file_and_a_robot_dataset_behind_a_url(memory: Any, tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", [episode(0, 30)])
    memory.put(str(tmp_path / "robot"), "/data/robot", recursive=True)
    run("memory://data/robot", tmp_path / "out", settings('sources.allow=["memory://data"]'))
    assert [clip.source for clip in open_dataset(tmp_path / "out").clips()] == ["robot#000000"]
    memory.put(str(write(tmp_path / "a", scene(1, 30))), "/data/a.mp4")
    run("memory://data/a.mp4", tmp_path / "one", settings('sources.allow=["memory://data/a.mp4"]'))
    assert [clip.source for clip in open_dataset(tmp_path / "one").clips()] == ["a.mp4"]


def test_a_file_url_is_this_machine(tmp_path: Path) -> None:
    write(tmp_path / "my videos" / "a", scene(1, 30))
    url = (tmp_path / "my videos").as_uri()
    run(url, tmp_path / "out", settings())
    assert [clip.source for clip in open_dataset(tmp_path / "out").clips()] == ["a.mp4"]


def test_nothing_is_read_that_is_not_allowed(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/secret/a.mp4", b"x")
    for allow in ((), ("memory://bucket/videos",), ("memory://other",), ("s3://bucket/secret",)):
        with pytest.raises(WorldloomError, match="may not be read"):
            local_copy("memory://bucket/secret", tmp_path, EpisodeConfig(allow=allow))
    for url in ("simplecache::memory://bucket", "zip://a::memory://bucket/secret", "ftp://host/a", "github://a/b"):
        with pytest.raises(WorldloomError, match="by this protocol"):
            local_copy(url, tmp_path, EpisodeConfig(allow=(url, "memory://bucket")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "prefix", "under"),
    [
        ("s3://a/b/c.mp4", "s3://a/b", True),
        ("s3://a/b", "s3://a/b/", True),
        ("s3://a/bc", "s3://a/b", False),
        ("s3://a/b/../c", "s3://a/b", False),
        ("s3://a/b/%2e%2e/c", "s3://a/b", False),
        ("https://host.evil/x", "https://host", False),
        ("https://host@evil/x", "https://host", False),
        ("https://host:8080/x", "https://host", False),
        ("http://host/x", "https://host", False),
        ("https://host/x", "https://host", True),
        ("s3://a/b", "", False),
    ],
)
def test_a_prefix_allows_what_lies_under_it(url: str, prefix: str, under: bool) -> None:
    assert _under(url, prefix) is under


def test_more_than_the_limit_is_not_fetched(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/a.mp4", b"x" * 5000)
    with pytest.raises(WorldloomError, match="more is at this URL than may be fetched"):
        local_copy("memory://bucket", tmp_path, EpisodeConfig(allow=("memory://bucket",), max_gib=1e-6))
    assert not list(tmp_path.rglob("*.mp4"))


def test_names_cannot_lead_out_of_the_copy(memory: Any, tmp_path: Path) -> None:
    memory.store["/bucket/../../evil.mp4"] = memory.store.get("/x") or _file(memory)
    with pytest.raises(WorldloomError):
        local_copy("memory://bucket", tmp_path / "in", EpisodeConfig(allow=("memory://bucket",)))
    assert not list(tmp_path.rglob("evil.mp4"))


def _file(memory: Any) -> Any:
    memory.pipe("/x", b"evil")
    return memory.store["/x"]


class _Server(http.server.BaseHTTPRequestHandler):
    body: ClassVar[bytes] = b""
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved.mp4":
            self.send_response(302)
            self.send_header("Location", "/private/a.mp4")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning", "default::ResourceWarning")
def test_http_is_read_where_it_is_allowed_and_redirections_are_not_followed(tmp_path: Path) -> None:
    _Server.body = write(tmp_path / "a", scene(1, 30)).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        config = EpisodeConfig(allow=(f"{host}/videos", f"{host}/moved.mp4"))
        copy = local_copy(f"{host}/videos/a.mp4", tmp_path / "copies", config)
        assert copy.read_bytes() == _Server.body
        _Server.asked.clear()
        try:
            moved = local_copy(f"{host}/moved.mp4", tmp_path / "copies", config)
        except WorldloomError:
            pass
        else:
            assert moved.read_bytes() != _Server.body
        assert set(_Server.asked) == {"/moved.mp4"}
    finally:
        server.shutdown()
        server.server_close()
