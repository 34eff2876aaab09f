"""Curation against decoding alone, and against a plain script of PyAV and PySceneDetect.

Sides, on the same files, single-threaded, taking turns:

- decode: PyAV decodes every frame of every file once and does nothing with it. No pipeline can be faster.
- script: what a user writes in an afternoon. PySceneDetect's `AdaptiveDetector` over PyAV finds the cuts (frames shrunk
  as it does by itself), then every shot is decoded again, shrunk to 256 pixels and encoded by x264 at crf 18.
- ours: `curate run` into an empty folder with split, motion, duplicates and caption, which decodes once to measure and
  once more to encode. Timed in two parts: until everything is decided, and until everything is written.

Figures are medians over passes of ours against the other in the same pass, by this process's processor time (and by the
clock, which a busy machine disturbs). The aim is that deciding runs at 70 % of the speed of decoding once.

Then the peak memory of a process that curates a long synthetic 1280x720 video (`--minutes`, 0 leaves it out).

    python benchmarks/curation.py [VIDEOS] [--passes 3] [--minutes 10]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from worldloom import media
from worldloom_curation.config import CurateConfig, load
from worldloom_curation.pipeline import run

SIDE, CRF = 256, 18
AIM = 0.7


# -- files ------------------------------------------------------------------------------------------------------------


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours with fine noise: ``(h, w, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (6, 8, 3), dtype=np.uint8)
    smooth = media.resize(coarse, (height, width))
    return smooth + rng.integers(0, 30, smooth.shape, dtype=np.uint8)


def encode(path: Path, encoder: str, shots: int, frames: int, size: tuple[int, int], seed: int = 0) -> None:
    """Shots of pictures that glide, 25 frames a second."""
    height, width = size
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(encoder, rate=Fraction(25), options={"preset": "veryfast", "g": "50"})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.thread_count = height, width, "yuv420p", 1
        for shot in range(shots):
            still = picture(seed + shot, height, width)
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(np.roll(still, 3 * i, axis=1), format="rgb24")
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def make(folder: Path) -> None:
    """Six videos of 640x480 in three codecs, three shots of four seconds each."""
    for number in range(6):
        encoder = ("libx264", "mpeg4", "libx264")[number % 3]
        encode(folder / f"{number}.{'avi' if encoder == 'mpeg4' else 'mp4'}", encoder, 3, 100, (480, 640), 3 * number)


def make_long(path: Path, minutes: float) -> None:
    """Ten seconds of 1280x720 in two shots, repeated packet by packet until it is long enough."""
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.mp4"
        encode(short, "libx264", 2, 125, (720, 1280))
        with av.open(str(path), "w") as out:
            stream: Any = None
            for turn in range(max(1, round(minutes * 6))):
                with av.open(str(short)) as source:
                    track = source.streams.video[0]
                    stream = stream or out.add_stream_from_template(track)
                    shift = round(turn * 10 / float(track.time_base or Fraction(1, 1)))
                    for packet in source.demux(track):
                        if packet.dts is None or packet.pts is None:
                            continue
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        out.mux(packet)


# -- sides ------------------------------------------------------------------------------------------------------------


def decode(files: list[Path]) -> int:
    """Every frame, once."""
    count = 0
    for file in files:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            count += sum(1 for _ in container.decode(stream))
    return count


def script(files: list[Path], out: Path) -> int:
    """Find cuts, then cut."""
    from scenedetect import AdaptiveDetector, detect

    clips = 0
    for file in files:
        scenes = detect(str(file), AdaptiveDetector(), backend="pyav")
        ends = [end.frame_num for _, end in scenes] or [sys.maxsize]
        with av.open(str(file)) as container:
            track = container.streams.video[0]
            track.thread_type = "NONE"
            track.codec_context.thread_count = 1
            rate = Fraction(track.average_rate or 25)
            scale = min(1.0, SIDE / min(track.height, track.width))
            height, width = (max(2, round(side * scale / 2) * 2) for side in (track.height, track.width))
            target: Any = None
            stream: Any = None
            written = 0
            for number, frame in enumerate(container.decode(track)):
                if target is None:
                    target = av.open(str(out / f"{file.stem}-{clips}.mp4"), "w")
                    added: Any = target.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
                    added.height, added.width, added.pix_fmt = height, width, "yuv420p"
                    added.codec_context.thread_count = 1
                    stream, clips, written = added, clips + 1, 0
                small = frame.reformat(width, height, "yuv420p")
                small.pts, small.time_base = written, 1 / rate
                written += 1
                target.mux(stream.encode(small))
                if number + 1 >= ends[0]:
                    ends = ends[1:] or [sys.maxsize]
                    target.mux(stream.encode(None))
                    target.close()
                    target = None
            if target is not None:
                target.mux(stream.encode(None))
                target.close()
    return clips


class Ours:
    """`curate run`, timed until the last decision and until the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.decided = (0.0, 0.0)

    def __call__(self, out: Path) -> int:
        start = clocks()

        def progress(step: str, *_: object) -> None:
            if step not in ("write", "add", "pack"):
                self.decided = since(start)

        return run(self.folder, out, config(), progress=progress)["clips"]


def config() -> CurateConfig:
    """The defaults, with the same lengths of clips as the script: whole shots."""
    return load(overrides=["split.max_seconds=600", "split.max_frames=15000", "split.min_frames=1"])


# -- clocks -----------------------------------------------------------------------------------------------------------


def clocks() -> tuple[float, float]:
    """(processor time, time), seconds."""
    return time.process_time(), time.monotonic()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds from `start` to now on both clocks."""
    now = clocks()
    return now[0] - start[0], now[1] - start[1]


def timed(function: Callable[[], int]) -> tuple[int, tuple[float, float]]:
    """What a function returns, and how long it took on both clocks."""
    start = clocks()
    result = function()
    return result, since(start)


def compare(folder: Path, passes: int) -> None:
    """All sides in turn, `passes` times after a warm-up, and the ratios."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    took: dict[str, list[tuple[float, float]]] = {"decode": [], "decide": [], "whole": [], "script": []}
    frames = clips = theirs = 0
    for turn in range(passes + 1):
        with tempfile.TemporaryDirectory() as scratch:
            ours = Ours(folder)
            frames, decoding = timed(lambda: decode(files))
            clips, whole = timed(lambda run=ours, to=Path(scratch): run(to / "ours"))
            (Path(scratch) / "script").mkdir()
            theirs, plain = timed(lambda to=Path(scratch): script(files, to / "script"))
        if turn:
            for name, figure in (("decode", decoding), ("decide", ours.decided), ("whole", whole), ("script", plain)):
                took[name].append(figure)
    print(f"{len(files)} files, {frames} frames; {clips} clips of ours, {theirs} of the script")
    for name, figures in took.items():
        cpu, wall = (statistics.median(figure[i] for figure in figures) for i in (0, 1))
        print(f"{name:<8} {cpu:7.2f} s of processor  {wall:7.2f} s by the clock  {frames / cpu:7.0f} frames/s")
    ratios = {
        "decide/decode": ("decode", "decide", "1 is the speed of decoding once; the aim is 0.7 or more"),
        "whole/decode": ("decode", "whole", "includes encoding every kept clip; higher is better"),
        "whole/script": ("script", "whole", "above 1 we are faster"),
    }
    for name, (other, ours_name, meaning) in ratios.items():
        by_clock = statistics.median(a[1] / b[1] for a, b in zip(took[other], took[ours_name], strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(took[other], took[ours_name], strict=True))
        reached = f"; aim {'reached' if ratio >= AIM else 'missed'}" if name == "decide/decode" else ""
        print(f"ratio {name}: {ratio:.2f} ({by_clock:.2f} by the clock; {meaning}{reached})")


def peak(minutes: float) -> None:
    """Peak memory (MiB) of a process that curates a long video."""
    code = (
        "import re, sys; from pathlib import Path; from worldloom_curation.pipeline import run;"
        "summary = run(sys.argv[1], sys.argv[2]);"
        "print(summary['frames']['frames'], summary['clips'],"
        " re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    with tempfile.TemporaryDirectory() as scratch:
        video = Path(scratch) / "long.mp4"
        make_long(video, minutes)
        done = subprocess.run(
            [sys.executable, "-c", code, str(video), str(Path(scratch) / "out")],
            capture_output=True,
            text=True,
            check=True,
        )
    frames, clips, kib = done.stdout.split()
    print(f"{minutes:g} minutes of 1280x720, {frames} frames, {clips} clips: {int(kib) / 1024:.0f} MiB at the most")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("videos", nargs="?", type=Path, help="a folder of videos; left out, some are made")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the video for the peak memory")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("av", "scenedetect-headless"))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("WORLDLOOM_HOME", scratch)
        if options.passes:
            folder = options.videos or Path(scratch) / "videos"
            if options.videos is None:
                folder.mkdir()
                make(folder)
            compare(folder, options.passes)
        if options.minutes and re.search("linux", sys.platform):
            peak(options.minutes)


if __name__ == "__main__":
    main()
