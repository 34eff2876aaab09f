"""kill -9 at random instants of `curate run`, then run again: nothing lost, nothing torn, nothing different."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.ledger import load_ledger
from worldloom_curation.pipeline import run

DRIVER = """
import sys
from worldloom.config import load
from worldloom_curation import CurateConfig
from worldloom_curation.pipeline import run
import av, cv2, pyarrow.parquet, xxhash
if any("latents" in text for text in sys.argv):
    import torch, worldloom_tokenizers.encode

if __name__ == "__main__":
    print("ready", flush=True)
    run(sys.argv[1], sys.argv[2], load(CurateConfig, overrides=sys.argv[3:]))
    print("done", flush=True)
"""

SETTINGS = ("write.samples_per_shard=3",)


def digests(out: Path) -> dict[str, str]:
    files = [out / "ledger.parquet", *sorted(out.rglob("dataset.json")), *sorted(out.rglob("shards/*"))]
    return {file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill") / "videos"
    for number in range(6):
        shots = [scene(10 * number + i, 24 + number, 96, 128) for i in range(2)]
        write(root / f"{number}", np.concatenate(shots), ("h264", "mjpeg", "ffv1")[number % 3])
    (root / "text.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def start(driver: Path, videos: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process group of its own; returns when its imports are done and the work begins."""
    process = subprocess.Popen(
        [sys.executable, str(driver), str(videos), str(out), *SETTINGS, *overrides],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; true if the run was still at work."""
    at_work = process.poll() is None
    if at_work:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    return at_work


def assert_nothing_looks_whole_that_is_torn(out: Path) -> None:
    with contextlib.suppress(WorldloomError):
        dataset = open_dataset(out)
        assert dataset.verify() == []
        assert len(list(dataset)) == dataset.index.samples
    if (out / "ledger.parquet").exists():
        load_ledger(out)
    if (out / "summary.json").exists():
        open_dataset(out)


@pytest.mark.parametrize(
    ("kills", "how"),
    [
        (10, ()),
        pytest.param(50, (), marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(50, ("executor='ray'",), marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_kills_at_random_instants_leave_the_same_shards_and_ledger(
    videos: Path, driver: Path, tmp_path: Path, kills: int, how: tuple[str, ...]
) -> None:
    if how:
        pytest.importorskip("ray")
    process = start(driver, videos, tmp_path / "whole", *how)
    began = time.monotonic()
    while not list((tmp_path / "whole" / ".cache").rglob("*.json")):  # Ray takes most of the time to start
        assert process.poll() is None
        time.sleep(0.01)
    at_work = time.monotonic() - began
    assert process.wait() == 0
    took = time.monotonic() - began
    assert process.stdout is not None
    process.stdout.close()
    expected = digests(tmp_path / "whole")
    assert len(expected) == 2 + 4  # 12 clips, 3 to a shard
    instants, interrupted, resumed = random.Random(), 0, 0
    for number in range(kills):
        out = tmp_path / f"killed-{number}"
        process = start(driver, videos, out, *how)
        time.sleep(instants.uniform(0.8 * at_work, took))
        interrupted += kill(process)
        assert_nothing_looks_whole_that_is_torn(out)
        summary = run(videos, out, load(CurateConfig, overrides=SETTINGS))
        resumed += summary["work"]["scan"]["cached"] > 0
        assert digests(out) == expected, f"kill {number}"
        assert [path for path in out.rglob("*") if "worldloom-tmp" in path.name] == []
    assert interrupted >= kills // 2, "the kills came too late to prove anything"
    assert resumed >= kills // 4, "the runs after a kill began from nothing"


@pytest.mark.parametrize("more", [(), ('stages=["split","duplicates","latents"]', "latents.frames=9")])
def test_one_folder_killed_again_and_again_ends_the_same(
    videos: Path, driver: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """A run over old results is killed too: with other settings, so that old shards are in the way."""
    settings = [*SETTINGS, *more]
    run(videos, tmp_path / "whole", load(CurateConfig, overrides=settings))
    assert len(digests(tmp_path / "whole")) == (2 + 4 + 1 + 10 if more else 2 + 4)  # 12 clips, 30 windows of them
    out = tmp_path / "out"
    run(videos, out, load(CurateConfig, overrides=[*settings, "write.short_side=64"]))
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, *((1.2, 1.6, 2.0) if more else ())):
        process = start(driver, videos, out, *more)
        time.sleep(wait)
        kill(process)
        assert_nothing_looks_whole_that_is_torn(out)
        if more:
            assert_nothing_looks_whole_that_is_torn(out / "latents")
    run(videos, out, load(CurateConfig, overrides=settings))
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_die_with_their_parent(videos: Path, driver: Path, tmp_path: Path) -> None:
    process = start(driver, videos, tmp_path / "out", "workers=2")
    group, deadline = process.pid, time.monotonic() + 30
    while len(members(group)) < 5 and process.poll() is None:  # parent, resource tracker, forkserver, two workers
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert kill(process), "the run was over before it could be killed"
    while members(group):
        assert time.monotonic() < deadline, "worker processes outlive a killed run"
        time.sleep(0.05)
    run(videos, tmp_path / "out", load(CurateConfig, overrides=SETTINGS))
    run(videos, tmp_path / "whole", load(CurateConfig, overrides=SETTINGS))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found
