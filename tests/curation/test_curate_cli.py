from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from curation_videos import scene, write

from worldloom import media
from worldloom.cli import main
from worldloom.shards import open_dataset


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["curate", *map(str, arguments)])


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write(root / "videos" / "two", np.concatenate([scene(1, 30), scene(2, 30)]))
    write(root / "videos" / "sub" / "still", np.repeat(scene(3, 1), 30, 0))
    (root / "videos" / "<b>notes.mp4").write_text("no video")
    result = cli("run", root / "videos", "--out", root / "out")
    assert result.exit_code == 0, result.output
    return root / "out"


def test_run_says_what_it_did_and_where(curated: Path) -> None:
    result = cli("run", curated.parent / "videos", "--out", curated, "--set", "motion.threshold=0.5")
    assert "probe       3 cached, 0 computed" in result.stdout
    assert "scan        2 cached, 0 computed" in result.stdout
    assert "motion      0 cached, 3 computed" in result.stdout
    assert "3 sources, 90 frames -> 2 clips, 60 frames" in result.stdout
    assert "dropped: motion 1; failed: 1" in result.stdout
    summary = json.loads((curated / "summary.json").read_text())
    assert summary["dataset"] == open_dataset(curated).index.id
    assert summary["dataset"] in result.stdout
    assert "threshold = 0.5" in (curated / "config.toml").read_text()
    assert "scan: 3 of 3" in result.stderr


def test_the_saved_config_repeats_the_run(curated: Path, tmp_path: Path) -> None:
    result = cli("run", curated.parent / "videos", "--out", tmp_path, "--config", curated / "config.toml")
    assert result.exit_code == 0, result.output
    assert open_dataset(tmp_path).index.id == open_dataset(curated).index.id


def test_explain_a_file_and_a_clip(curated: Path) -> None:
    result = cli("explain", "two.mp4", "--out", curated)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "two.mp4" in line]
    assert len(lines) == 1 + 5 * 2
    clip = next(open_dataset(curated).clips())
    result = cli("explain", clip.id[:8], "--out", curated)
    assert [stage in result.output for stage in ("split", "motion", "duplicates", "caption", "write", "probe")] == [
        True
    ] * 5 + [False]
    still = cli("explain", curated.parent / "videos" / "sub" / "still.mp4", "--out", curated).output
    assert "dropped" in still
    assert "it stands still" in still or "it hardly moves" in still
    assert "failed" in cli("explain", "<b>notes.mp4", "--out", curated).output


def test_explain_what_is_not_there_names_the_nearest(curated: Path) -> None:
    result = CliRunner().invoke(main, ["curate", "explain", "twoo.mp4", "--out", str(curated)])
    assert result.exit_code == 2
    assert "did you mean two.mp4" in result.stderr


def test_the_report_is_one_file_with_everything(curated: Path) -> None:
    result = cli("report", "--out", curated, "--clips", 1)
    assert result.exit_code == 0, result.output
    page = Path(result.stdout.strip()).read_text()
    assert page.count("<video") == 1
    assert "data:video/mp4;base64," in page
    assert "&lt;b&gt;notes.mp4" in page
    assert "<b>notes" not in page
    for words in ("Funnel", "motion", "sub/still.mp4", "not a video that can be read"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_export_gives_plain_files_and_goes_on(curated: Path, tmp_path: Path) -> None:
    result = cli("export", curated, "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert f"2 of 2 clips in {tmp_path / 'plain'}" in result.stdout
    for sample in open_dataset(curated):
        video = tmp_path / "plain" / f"{sample.clip.id}.mp4"
        assert video.read_bytes() == sample.video
        assert media.probe(video, count=True).frames == sample.clip.frames
        meta = json.loads(video.with_suffix(".json").read_text())
        assert (meta["source"], meta["start"], meta["end"]) == (sample.clip.source, sample.clip.start, sample.clip.end)
    before = video.stat().st_mtime_ns
    video.with_suffix(".json").write_text("torn")
    assert cli("export", curated, "--out", tmp_path / "plain").exit_code == 0
    assert video.stat().st_mtime_ns == before
    assert json.loads(video.with_suffix(".json").read_text())["id"] == sample.clip.id


def test_user_mistakes_are_errors_without_a_traceback(tmp_path: Path) -> None:
    for arguments, words in (
        (("run", tmp_path, "--out", tmp_path / "out"), "the folder holds no files"),
        (("run", tmp_path, "--out", tmp_path / "out", "--set", "motoin.threshold=1"), "did you mean motion"),
        (("report", "--out", tmp_path), "there is no decision ledger"),
        (("export", tmp_path, "--out", tmp_path / "out"), "not a finished dataset"),
        (("run", "s3://bucket/videos", "--out", tmp_path / "out"), "this URL may not be read"),
        (("run", tmp_path), "give SRC and --out DIR"),
    ):
        result = CliRunner().invoke(main, ["curate", *map(str, arguments)])
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.output


def test_every_setting_is_explained() -> None:
    lines = cli("run", "--help-config").stdout.splitlines()
    assert any(line.startswith("motion.threshold = ") for line in lines)
    names, sentences = lines[::2], lines[1::2]
    assert len(names) == len(sentences) > 20
    assert all(len(sentence.strip()) > 5 for sentence in sentences)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from worldloom.cli import main;"
        "result = CliRunner().invoke(main, ['curate', 'run', '--help']); assert result.exit_code == 0, result.output;"
        "print([name for name in ('torch', 'av', 'cv2', 'pyarrow', 'xxhash') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
