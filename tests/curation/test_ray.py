"""The same sources on Ray Data as in this process: the same bytes. In a process of its own, for Ray warns a lot."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError
from worldloom_curation.config import load
from worldloom_curation.executor import executor
from worldloom_curation.ledger import load_ledger
from worldloom_curation.pipeline import run

OVERRIDES = (
    'stages=["split","motion","duplicates","caption","text_embeddings","embeddings","latents"]',
    "latents.frames=17",
)

DRIVER = f"""
import json, sys
OVERRIDES = {OVERRIDES!r}
"""
DRIVER += """
from worldloom_curation.config import load
from worldloom_curation.pipeline import run

if __name__ == "__main__":
    summary = run(sys.argv[1], sys.argv[2], load(overrides=[*OVERRIDES, "executor='ray'", "workers=2"]))
    assert summary["work"]["scan"]["computed"] == 4, summary
    again = run(sys.argv[1], sys.argv[2], load(overrides=[*OVERRIDES, "executor='ray'", "workers=2"]))
    assert {work["computed"] for work in again["work"].values()} == {0}, again
    from worldloom_curation.executor import executor
    try:
        executor("ray", 2)(json.loads, [("{",)], print, None)
    except ValueError as error:
        print("raised:", error)
"""


def digests(out: Path) -> dict[str, str]:
    files = [out / "ledger.parquet", *sorted(out.rglob("dataset.json")), *sorted(out.rglob("shards/*.tar"))]
    return {file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_ray_gives_the_same_bytes_as_this_process(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for number, codec in enumerate(("h264", "mjpeg", "ffv1", "mpeg4")):
        write(videos / f"{number}", np.concatenate([scene(10 * number + i, 24) for i in range(2)]), codec)
    (videos / "text.mp4").write_text("no video")
    (videos / "copy.mp4").write_bytes((videos / "0.mp4").read_bytes())
    run(videos, tmp_path / "local", load(overrides=OVERRIDES))
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(videos), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "raised: Expecting property name" in done.stdout  # as itself, and not as an error of Ray's
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert any(row.failed for row in load_ledger(tmp_path / "ray"))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(WorldloomError, match="ray is not installed"):
        executor("ray", 1)
    assert load(overrides=["executor='ray'"]).executor == "ray"
