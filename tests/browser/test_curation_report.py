"""The curation report in a real browser: it opens, asks for nothing, and every thumbnail in it plays."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import media
from worldloom_curation.pipeline import run
from worldloom_curation.report import make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PROBE = """
<script>
const outcome = (video) => new Promise((done) => {
  video.addEventListener("timeupdate", () => { if (video.currentTime > 0) done("plays"); });
  video.addEventListener("error", () => done("error: " + video.error.message));
  video.play().catch((error) => done("refused: " + error));
});
const refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
Promise.all([...document.querySelectorAll("video")].map(outcome)).then((played) => {
  document.title = JSON.stringify({ played, refused, charts: document.querySelectorAll("svg line.threshold").length });
});
</script>
"""


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


def thumbnails(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)]


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


@contextlib.contextmanager
def browser(page: Path, profile: Path) -> Iterator[int]:
    """Chromium without a window on `page`; gives the port on which it lists what it shows."""
    args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
    args += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions"]
    args += ["--autoplay-policy=no-user-gesture-required", "--disable-background-networking"]
    log = open(profile.with_suffix(".log"), "wb")  # noqa: SIM115 - closed below
    process = subprocess.Popen([str(CHROMIUM), *args, page.as_uri()], stdout=log, stderr=log, start_new_session=True)
    try:
        file, deadline = profile / "DevToolsActivePort", time.monotonic() + 120
        while not (file.exists() and file.read_text().strip()):
            assert time.monotonic() < deadline, profile.with_suffix(".log").read_text()[-2000:]
            assert process.poll() is None, profile.with_suffix(".log").read_text()[-2000:]
            time.sleep(0.2)
        yield int(file.read_text().split()[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_thumbnail_plays_in_chromium(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = report.read_text()
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    with browser(page, tmp_path / "profile") as port:
        deadline, title = time.monotonic() + 120, ""
        while not title.startswith("{"):
            assert time.monotonic() < deadline, f"not every thumbnail plays; the page is called {title!r}"
            time.sleep(0.3)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
                title = next(item["title"] for item in json.load(answer) if item["type"] == "page")
    found = json.loads(html.unescape(title))
    assert found["played"] == ["plays"] * len(thumbnails(text))
    assert found["refused"] == []
    assert found["charts"] >= 1
