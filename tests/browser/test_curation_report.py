"""The curation report in a real browser: it opens, asks for nothing, and every thumbnail in it plays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, look_at, thumbnails
from curation_videos import scene, write

from worldloom import media
from worldloom_curation.pipeline import run
from worldloom_curation.report import make_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, a copy, a still, and a file that is no video."""
    root = tmp_path_factory.mktemp("report")
    videos = root / "videos"
    write(videos / "a", np.concatenate([scene(1, 24), scene(2, 30, speed=9)]), "mjpeg")
    write(videos / "still", np.repeat(scene(3, 1), 30, 0), "ffv1")
    shutil.copy(videos / "a.avi", videos / "copy.avi")
    (videos / "text.mp4").write_text("<script>document.title = 'broken out'</script>")
    run(videos, root / "out")
    return make_report(root / "out")


def test_the_report_holds_what_it_promises(report: Path) -> None:
    page = report.read_text()
    for section in ("Funnel", "Measured values", "Clips", "Duplicates", "Sources", "Dropped and failed"):
        assert f">{section}</h2>" in page
    assert "have every frame of every source exactly once" in page
    assert 'class="threshold"' in page
    assert "broken out" not in page.replace("&lt;script&gt;", "")
    shown = thumbnails(page)
    assert len(shown) == 2 + 2 * 2  # two clips; two copies beside their originals
    for data in shown:
        assert media.read_frames(data).shape[1] <= 160
    originals, copies = shown[2::2], shown[3::2]
    assert originals == copies
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing from elsewhere
    assert len(page) < 2_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_thumbnail_plays_in_chromium(report: Path, tmp_path: Path) -> None:
    found = look_at(report, tmp_path)
    assert found["played"] == ["plays"] * len(thumbnails(report.read_text()))
    assert found["refused"] == []
    assert found["charts"] >= 1
