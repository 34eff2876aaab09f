"""Near-copies and hard cuts, planted in real videos, and how many of them are found.

Near-copies: the videos are cut into originals of two seconds that do not overlap; where those are fewer than asked for,
mirrored ones are added, then upside-down ones. Each original gets one copy: cropped (each side by up to 15 %), resized
(0.4 to 1 times), brightened or darkened, shifted by up to 0.3 s, at another rate, and encoded again by another codec at
a low quality. A pair is found if the two are named as copies of each other; anything else that is named is a mistake.
What there is to confuse are the originals: many are of one camera that does not move.

Cuts: shots of 0.8 to 3 seconds, also mirrored and turned, in random order and all of one size, spliced and encoded;
never two of the same view in a row, which can join without a cut to see. A cut is found if one is given within two
frames of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from worldloom import media
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages.near_duplicates import NearDuplicatesConfig, NearDuplicatesStage
from worldloom_curation.stages.split import SplitConfig, SplitStage

FPS = 20
SIDE = 240  # short side of an original


@dataclass(frozen=True)
class Part:
    """Some seconds of a video."""

    name: str
    frames: np.ndarray


def parts(folder: Path, seconds: float, count: int, without: Sequence[str] = ()) -> list[Part]:
    """Consecutive pieces of every video at `FPS`, then mirrored, then turned by 180 degrees, until there are enough."""
    plain: list[Part] = []
    length = round(seconds * FPS)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.stem not in without):
        info = media.probe(path)
        scale = min(1.0, SIDE / min(info.height, info.width))
        size = (round(info.height * scale / 2) * 2, round(info.width * scale / 2) * 2)
        frames: list[np.ndarray] = []
        for number, frame in enumerate(media.iter_frames(path)):
            while len(frames) < (number + 1) / info.fps * FPS:
                frames.append(media.resize(frame, size))
        starts = range(0, len(frames) - length // 2, length)
        plain += [Part(f"{path.stem} {first}", np.stack(frames[first : first + length])) for first in starts]
    mirrored = [Part(f"{part.name} mirrored", part.frames[:, :, ::-1]) for part in plain]
    turned = [Part(f"{part.name} turned", part.frames[:, ::-1, ::-1]) for part in plain]
    return [*plain, *mirrored, *turned][:count]


def encode(path: Path, frames: np.ndarray, fps: int, codec: str, crf: int) -> Path:
    """Write frames with a codec at its quality."""
    import av

    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    with av.open(str(path), "w") as container:
        options = {"crf": str(crf), "preset": "veryfast"} if codec == "libx264" else {"qscale": str(crf // 4)}
        stream: Any = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.thread_count = 1
        if codec != "libx264":
            stream.bit_rate = 600_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def copy_of(part: Part, rng: np.random.Generator) -> tuple[np.ndarray, int, str, int]:
    """(frames, rate, codec, quality) of a near-copy."""
    t, h, w, _ = part.frames.shape
    top, bottom, left, right = rng.uniform(0, 0.15, 4)
    cut = part.frames[:, int(h * top) : h - int(h * bottom), int(w * left) : w - int(w * right)]
    scale = rng.uniform(0.4, 1.0)
    size = (max(48, round(cut.shape[1] * scale / 2) * 2), max(48, round(cut.shape[2] * scale / 2) * 2))
    first = int(rng.integers(0, max(1, min(round(0.3 * FPS), t // 4))))
    fps = int(rng.choice([FPS, 15, 25]))
    at = first + np.arange(int((t - first) * fps / FPS)) * FPS // fps
    gain, lift = rng.uniform(0.85, 1.1), rng.uniform(-12, 12)
    frames = np.stack([media.resize(np.clip(cut[i] * gain + lift, 0, 255).astype(np.uint8), size) for i in at])
    return frames, fps, str(rng.choice(["libx264", "mpeg4", "mjpeg"])), int(rng.integers(24, 36))


def watched(stage: Any, frames: Any, source: Source, fps: float) -> dict[str, np.ndarray]:
    """What a stage collects from frames."""
    observer = stage.observer(source, fps)
    for frame in frames:
        observer.add(Frame(frame))
    return observer.result()


def near_copies(folder: Path, pairs: int, seed: int, without: Sequence[str]) -> dict[str, Any]:
    """Plant near-copies in the videos of a folder, of which no two show the same, and look for them."""
    rng = np.random.default_rng(seed)
    stage = NearDuplicatesStage(NearDuplicatesConfig())
    spans: list[Span] = []
    signals: dict[str, dict[str, np.ndarray]] = {}

    def add(name: str, frames: np.ndarray, fps: int, codec: str, crf: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = encode(Path(scratch) / "clip.mkv", frames, fps, codec, crf)
            source = Source(name, name, name, name)
            decoded = list(media.iter_frames(path))
        signals[name] = watched(stage, decoded, source, fps)
        spans.append(Span(source, 0, len(decoded), float(fps)))

    originals = parts(folder, 2.0, pairs, without)
    for part in originals:
        add(part.name, part.frames, FPS, "libx264", 20)
    for part in originals:
        add(f"{part.name} copy", *copy_of(part, rng))
    start = time.perf_counter()
    verdicts = stage.decide(spans, signals)
    seconds = time.perf_counter() - start
    wanted = {frozenset((part.name, f"{part.name} copy")) for part in originals}
    named = [verdict for verdict in verdicts if not verdict.kept]
    found = {frozenset((v.span.source.name, v.reason.split(" of ")[-1].split(" [")[0])) for v in named}
    right = len(found & wanted)
    return {
        "pairs": len(wanted),
        "named": len(named),
        "precision": right / max(1, len(named)),
        "recall": right / len(wanted),
        "seconds to decide": round(seconds, 2),
        "mistakes": sorted(" = ".join(sorted(pair)) for pair in found - wanted)[:20],
        "missed": sorted(" = ".join(sorted(pair)) for pair in wanted - found)[:20],
    }


def cuts(folder: Path, count: int, seed: int, without: Sequence[str]) -> dict[str, Any]:
    """Splice shots of the videos of a folder, that hold no cuts themselves, and look for the cuts."""
    rng = np.random.default_rng(seed)
    taken = parts(folder, 3.0, 10_000, without)
    shots, views = [part.frames for part in taken], [_view(part.name) for part in taken]
    size = (180, 240)
    frames: list[np.ndarray] = []
    planted: list[int] = []
    before = -1
    while len(planted) < count:
        number = int(rng.choice([i for i in range(len(shots)) if before < 0 or views[i] != views[before]]))
        length = min(len(shots[number]), int(rng.integers(round(0.8 * FPS), 3 * FPS)))
        if frames:
            planted.append(len(frames))
        frames += list(media.fit(shots[number][:length], size))
        before = number
    with tempfile.TemporaryDirectory() as scratch:
        path = encode(Path(scratch) / "spliced.mkv", np.stack(frames), FPS, "libx264", 26)
        decoded = list(media.iter_frames(path))
    source = Source("spliced", "spliced", "spliced", "spliced")
    result: dict[str, Any] = {"frames": len(frames), "cuts": len(planted)}
    for mode in ("shots", "transnet"):
        stage = SplitStage(SplitConfig(mode=mode, min_frames=1, max_seconds=1000.0, max_frames=100_000))
        start = time.process_time()
        signals = watched(stage, decoded, source, FPS)
        seconds = time.process_time() - start
        verdicts = stage.decide([Span(source, 0, len(decoded), float(FPS))], {"spliced": signals})
        found = [verdict.span.start for verdict in verdicts if verdict.kept and verdict.span.start]
        right = sum(min(abs(cut - at) for at in found) <= 2 for cut in planted) if found else 0
        true = sum(min(abs(cut - at) for cut in planted) <= 2 for at in found)
        precision, recall = true / max(1, len(found)), right / len(planted)
        result[mode] = {
            "precision": precision,
            "recall": recall,
            "F1": 2 * precision * recall / max(1e-9, precision + recall),
            "to the frame": sum(at in planted for at in found),
            "frames per CPU second": round(len(frames) / seconds, 1),
            "missed": [cut for cut in planted if not found or min(abs(cut - at) for at in found) > 2],
            "false": [at for at in found if min(abs(cut - at) for cut in planted) > 2],
        }
    return result


def _view(name: str) -> tuple[str, ...]:
    """Video of a part, and whether it is mirrored or turned: of one fixed camera two parts may join without a cut."""
    video, _, *turned = name.split()
    return (video, *turned)
