"""The quickstart's whole loop, small: on recorded episodes, on a folder of videos, again in the same folder."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from curation_videos import scene, write

SMALL = ["steps=3", "batch_size=4", "test_windows=4", "generate_frames=17"]


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worldloom", "quickstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def settings(*values: str) -> list[str]:
    return [part for value in (*SMALL, *values) for part in ("--set", value)]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name in ("src", "href") and (value or "").startswith("http") for name, value in attrs)


@pytest.mark.timeout(300)
def test_on_recorded_episodes(tmp_path: Path, worldloom_home: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--out", str(out), *settings("episodes=3", "test_episodes=2", "episode_steps=40")]
    first = quickstart(*arguments)
    assert first.returncode == 0, first.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sample"] in first.stdout
    assert "simulator  VizdoomHealthGathering-v1#seed=0" in first.stdout
    assert "mlflow ui" in first.stdout
    assert summary["before"]["psnr"]["model"] != summary["after"]["psnr"]["model"]
    trained = json.loads((out / "train" / "summary.json").read_text())
    assert trained["steps"] == 3
    assert (out / "train" / "model" / "adapter_model.safetensors").is_file()
    assert 'strategy = "deepspeed"' in (out / "train" / "config.toml").read_text()
    page = Tags()
    page.feed((out / "report.html").read_text())
    assert page.seen.count("video") >= 3

    again = quickstart(*arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "summary.json").read_text())["sample"] == summary["sample"]

    other = quickstart("--out", str(out), *settings("episodes=4"))
    assert other.returncode == 2
    assert "another model, other videos or settings" in other.stderr


@pytest.mark.timeout(300)
def test_on_a_folder_of_videos(tmp_path: Path, worldloom_home: Path) -> None:
    videos = tmp_path / "videos"
    for index, codec in enumerate(("h264", "mpeg4", "mjpeg", "vp9", "ffv1")):
        write(videos / codec, scene(index, frames=40), codec)
    (videos / "broken.mp4").write_text("not a video")
    out = tmp_path / "run"
    done = quickstart("--videos", str(videos), "--out", str(out), *settings())
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["curation"]["all"]["failed"] == 1
    assert sum(f"file  {name}" in done.stdout for name in ("h264.mp4", "mpeg4.avi", "vp9.webm")) == 3
    assert (out / "report.html").is_file()


def test_an_empty_folder_is_an_error_that_says_what_to_do(tmp_path: Path, worldloom_home: Path) -> None:
    (tmp_path / "videos").mkdir()
    done = quickstart("--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "holds no files" in done.stderr
