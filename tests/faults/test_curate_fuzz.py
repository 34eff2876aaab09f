"""Hostile files through a whole run: no crash, no hang, no write outside the output, memory bounded, nothing opened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError, media
from worldloom.schema import Clip, clip_id
from worldloom.shards import ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_curation.ledger import load_ledger, reconcile
from worldloom_curation.pipeline import run

# Not ru_maxrss: after exec it still holds the peak of the process that started this one.
DRIVER = """
import json, re, sys
from pathlib import Path
from worldloom import WorldloomError
from worldloom_curation.config import load
from worldloom_curation.pipeline import run
try:
    summary = run(sys.argv[1], sys.argv[2], load(overrides=json.loads(sys.argv[3])))
except WorldloomError as error:
    if error.what != "no clip was kept":
        raise
    summary = {"clips": 0, "unaccounted": 0, "quarantined": 0}
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({**summary, "peak": peak}))
"""

SETTINGS = ["split.min_frames=4", "motion.threshold=0", "probe.max_work_seconds=20"]
MIB = 1024

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory in /proc")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four random changes: bytes, lengths in headers, pieces cut out, repeated, swapped in, or the end gone."""
    broken = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        size = len(broken)
        at, length = int(rng.integers(size)), int(rng.integers(1, max(2, size // 8)))
        match rng.integers(7):
            case 0:
                for place in rng.integers(size, size=rng.integers(1, 64)):
                    broken[place] = rng.integers(256)
            case 1:  # where headers are, with values that are sizes no one expects
                place = int(rng.integers(min(size, 1024)))
                value = rng.choice([0, 1, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
                broken[place : place + 4] = int(value).to_bytes(4, ["big", "little"][rng.integers(2)])
            case 2:
                del broken[at : at + length]
            case 3:
                broken[at:at] = broken[at : at + length]
            case 4:
                broken[at : at + length] = rng.bytes(length)
            case 5:
                other = int(rng.integers(size))
                broken[at : at + length] = broken[other : other + length]
            case _:
                del broken[max(16, at) :]
        if not broken:
            broken += b"\0"
    return bytes(broken)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An MP4, a Matroska and two AVIs."""
    root = tmp_path_factory.mktemp("seeds")
    files = [write(root / codec, scene(7, 12, 32, 48), codec) for codec in ("h264", "ffv1", "mjpeg", "mpeg4")]
    assert [file.suffix for file in files] == [".mp4", ".mkv", ".avi", ".avi"]
    return files


def everything(root: Path, but: Path) -> dict[str, str]:
    """Digests of all files under `root` that are not under `but`."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and but not in path.parents
    }


def curate_mutated(seeds: list[Path], root: Path, count: int, seed: int) -> int:
    """A run over `count` mutated files in a process of its own; returns how many of them gave a clip."""
    rng = np.random.default_rng(seed)
    (root / "videos").mkdir(parents=True)
    for number in range(count):
        source = seeds[number % len(seeds)]
        (root / "videos" / f"{number:04}{source.suffix}").write_bytes(mutate(source.read_bytes(), rng))
    out, before = root / "out", everything(root, root / "out")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root / "videos"), str(out), json.dumps(SETTINGS)],
        capture_output=True,
        text=True,
        timeout=120 + 20 * count,
        cwd=root,
    )
    assert done.returncode == 0, f"seed {seed}: {done.returncode}\n{done.stderr[-3000:]}"
    assert time.monotonic() - began < 120 + 5 * count  # no file comes near its limit of 20 s
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["peak"] < 700 * MIB
    assert summary["unaccounted"] == 0
    assert summary["quarantined"] == 0, [row.traceback for row in load_ledger(out) if row.traceback][:1]
    rows = load_ledger(out)
    assert {row.source for row in rows} == {path.name for path in (root / "videos").iterdir()}
    assert reconcile(rows) == []
    assert everything(root, out) == before
    return summary["clips"]


@linux
def test_forty_mutated_videos_are_rows_of_the_ledger(seeds: list[Path], tmp_path: Path) -> None:
    assert 0 < curate_mutated(seeds, tmp_path / "run", 40, 0) < 40


@linux
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 9))
def test_two_thousand_mutated_videos_are_rows_of_the_ledger(seeds: list[Path], tmp_path: Path, seed: int) -> None:
    """250 at a time: a crash names its seed."""
    assert curate_mutated(seeds, tmp_path / "run", 250, seed) > 0


def dataset(root: Path) -> Path:
    """Two episodes in a shard."""
    with ShardWriter(root) as writer:
        for number in range(2):
            video = media.write_video(None, scene(number, 8, 32, 32), 10, lossless=True)
            arrays = {"actions": np.zeros((7, 2), np.float32)}
            clip = Clip(
                clip_id("a" * 64, number, number + 8), "a", "a" * 64, number, number + 8, 10.0, 32, 32, action_dim=2
            )
            writer.write(ShardSample(clip, video, arrays))
    commit_dataset(root, writer.shards)
    return root


def read_mutated_tars(root: Path, count: int) -> int:
    """Read the dataset with `count` mutations of its shard in turn; returns how many were read to the end."""
    shard, whole = root / "shards" / "000000.tar", 0
    data, rng = shard.read_bytes(), np.random.default_rng(0)
    before = everything(root.parent, root)
    began = time.monotonic()
    for number in range(count):
        shard.write_bytes(mutate(data, rng))
        try:
            for sample in open_dataset(root):
                media.read_frames(sample.video or b"")
            whole += 1
        except WorldloomError:
            continue
        finally:
            if number % 20 == 0:  # as a source of a run, too
                with contextlib.suppress(WorldloomError):
                    run(root, root.parent / "out")
    shard.write_bytes(data)
    assert time.monotonic() - began < 60 + count
    after = everything(root.parent, root.parent / "out")
    assert {name: after[name] for name in after if not name.startswith("data/")} == before
    assert {path.name for path in root.parent.iterdir()} <= {"data", "out"}
    return whole


def test_mutated_tars_are_errors_or_what_is_left_of_them(tmp_path: Path) -> None:
    assert read_mutated_tars(dataset(tmp_path / "data"), 40) < 40


@pytest.mark.slow
def test_five_hundred_mutated_tars(tmp_path: Path) -> None:
    assert read_mutated_tars(dataset(tmp_path / "data"), 500) < 500


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/worldloom-evil.json", "a/../../evil.json", "link"])
def test_members_with_hostile_names_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    root = dataset(tmp_path / "data")
    with tarfile.open(root / "shards" / "000000.tar", "a") as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
        else:
            member.size = 2
            tar.addfile(member, BytesIO(b"{}"))
    with pytest.raises(WorldloomError):
        list(open_dataset(root))
    assert {path.name for path in tmp_path.rglob("*evil*")} == set()
    assert not Path("/tmp/worldloom-evil.json").exists()


@contextlib.contextmanager
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine, and what was sent to it."""
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    caller, _ = server.accept()
                except OSError:
                    continue
                with caller:
                    caller.settimeout(1)
                    try:
                        calls.append(caller.recv(100))
                    except OSError:
                        calls.append(b"")

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], calls
        finally:
            stop.set()
            thread.join()


def references(url: str) -> dict[str, str]:
    """Files that refer to another one, in the formats that FFmpeg follows."""
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\n{url}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    concat = f"ffconcat version 1.0\nfile '{url}'\n"
    return {
        "list.m3u8": hls,
        "list.mp4": hls,
        "stream.mpd": dash,
        "stream.mkv": dash,
        "session.sdp": sdp,
        "parts.ffconcat": concat,
        "parts.avi": concat,
        "shortcut.url": f"[InternetShortcut]\nURL={url}\n",
    }


@linux
def test_files_that_refer_to_others_open_no_connection_and_no_other_file(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    write(videos / "good", scene(1, 24))
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)  # whoever opens it waits for ever
    with listener() as (port, calls):
        for place, url in {"net": f"http://127.0.0.1:{port}/x.ts", "file": f"file://{pipe}"}.items():
            (videos / place).mkdir()
            for name, text in references(url).items():
                (videos / place / name).write_text(text)
        # The attack is real: FFmpeg follows the playlist where it is allowed to.
        with pytest.raises(av.FFmpegError):
            av.open(str(videos / "net" / "list.m3u8"), options={"protocol_whitelist": "file,http,tcp,crypto,data"})
        assert calls
        calls.clear()
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(videos), str(tmp_path / "out"), json.dumps(SETTINGS)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        time.sleep(0.3)
        assert calls == []
    rows = load_ledger(tmp_path / "out")
    assert {row.source for row in rows if row.stage == "write"} == {"good.mp4"}
    assert sum(row.failed for row in rows) == 2 * len(references(""))
