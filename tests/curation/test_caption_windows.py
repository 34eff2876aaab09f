"""Caption windows, through a real HTTP endpoint on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError
from worldloom.shards import open_dataset
from worldloom_curation.config import load
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.pipeline import run
from worldloom_curation.stages.caption_windows import CaptionWindowsConfig, CaptionWindowsStage, sampled, windows


class Endpoint:
    """Answers with the number of pictures it was sent, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.failing = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.failing:
                    outer.failing -= 1
                    self.send_error(503)
                    return
                outer.asked.append(body)
                count = sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
                answer = {
                    "choices": [{"message": {"content": f" A video of {count} pictures,\n told {len(outer.asked)}. "}}]
                }
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_windows_cover_a_clip() -> None:
    assert windows(40) == [(0, 40)]
    assert windows(256) == [(0, 256)]
    assert windows(256 + 127) == [(0, 383)]
    assert windows(256 + 128) == [(0, 256), (256, 384)]
    assert windows(2 * 256 + 5) == [(0, 256), (256, 517)]


def test_frames_are_spread_over_a_window() -> None:
    assert sampled(0, 40, 20.0, 2.0, 64) == [5, 15, 25, 35]
    assert sampled(256, 300, 20.0, 100.0, 4) == [261, 272, 283, 294]
    assert sampled(7, 8, 20.0, 2.0, 64) == [7]


def test_clips_get_their_captions_and_a_second_run_asks_nothing(tmp_path: Path, endpoint: Endpoint) -> None:
    write(tmp_path / "in" / "one", scene(1, 40))
    settings = [
        "stages=['split','caption_windows']",
        f"caption_windows.endpoint='{endpoint.url}'",
        "caption_windows.model='eye'",
        "caption_windows.side=32",
    ]
    run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    [clip] = open_dataset(tmp_path / "out").clips()
    assert clip.caption == "A video of 4 pictures, told 1."
    assert clip.metadata["windows"] == [{"start_frame": 0, "end_frame": 40, "caption": clip.caption}]
    [asked] = endpoint.asked
    assert (asked["model"], asked["max_tokens"]) == ("eye", 512)
    *shown, question = asked["messages"][0]["content"]
    assert question["text"].startswith("These pictures are frames")
    pictures = [
        cv2.imdecode(np.frombuffer(base64.b64decode(part["image_url"]["url"].split(",")[1]), np.uint8), 1)
        for part in shown
    ]
    assert [picture.shape for picture in pictures] == [(32, 48, 3)] * 4
    expected = [cv2.resize(scene(1, 40)[i][..., ::-1], (48, 32), interpolation=cv2.INTER_AREA) for i in (5, 15, 25, 35)]
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(pictures, expected, strict=True)) < 6
    run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_fails_fails_the_clip_and_is_asked_again(tmp_path: Path, endpoint: Endpoint) -> None:
    write(tmp_path / "in" / "one", scene(1, 40))
    write(tmp_path / "in" / "two", scene(2, 40))
    settings = [
        "stages=['split','caption_windows']",
        f"caption_windows.endpoint='{endpoint.url}'",
        "caption_windows.model='eye'",
    ]
    endpoint.failing = 1
    first = run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    assert (first["clips"], first["failed"]) == (1, 1)
    rows = load_ledger(tmp_path / "out")
    [failed] = [row for row in rows if row.failed]
    assert "503" in failed.reason
    assert all(account.balanced for account in accounts(rows).values())
    again = run(tmp_path / "in", tmp_path / "out", load(overrides=settings))
    assert (again["clips"], again["failed"]) == (2, 0)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(WorldloomError, match="needs an endpoint and a model"):
        CaptionWindowsStage(CaptionWindowsConfig())
    with pytest.raises(WorldloomError):
        CaptionWindowsConfig(rate=0)
