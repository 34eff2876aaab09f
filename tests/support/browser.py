"""A page in a real browser, Chromium without a window."""

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
from typing import Any

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


def thumbnails(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)]


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


def look_at(report: Path, scratch: Path) -> dict[str, Any]:
    """What became of a report's thumbnails in Chromium (``played``), of its requests (``refused``), and of its charts.

    Args:
        scratch: a folder for the page and the browser's profile.
    """
    page = scratch / "page.html"
    page.write_text(report.read_text().replace("</body>", f"{PROBE}</body>"))
    with browser(page, scratch / "profile") as port:
        deadline, title = time.monotonic() + 120, ""
        while not title.startswith("{"):
            assert time.monotonic() < deadline, f"not every thumbnail plays; the page is called {title!r}"
            time.sleep(0.3)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
                title = next(item["title"] for item in json.load(answer) if item["type"] == "page")
    return json.loads(html.unescape(title))
