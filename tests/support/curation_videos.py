"""Small real videos for the tests, made with PyAV: any codec, known cuts, known stills."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {
    "h264": (".mp4", "libx264", "yuv420p"),
    "mpeg4": (".avi", "mpeg4", "yuv420p"),
    "mjpeg": (".avi", "mjpeg", "yuvj420p"),
    "vp9": (".webm", "libvpx-vp9", "yuv420p"),
    "ffv1": (".mkv", "ffv1", "yuv420p"),
    "mpeg2": (".mpg", "mpeg2video", "yuv420p"),
}
"""Name -> (file extension, encoder, pixel format)."""


def scene(seed: int, frames: int, height: int = 64, width: int = 96, speed: int = 2) -> np.ndarray:
    """A smooth coloured texture that glides sideways by `speed` pixels a frame: uint8 ``(t, h, w, 3)``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for _ in range(3):
        cycles, (slant, phase, low) = rng.integers(1, 3), rng.uniform((0, 0, 0), (2, 6, 150))
        planes.append(low + 50 * (1 + np.sin(2 * np.pi * (cycles * x / width + slant * y / height) + phase)))
    still = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return np.stack([np.roll(still, speed * i, axis=1) for i in range(frames)])


def write(path: Path, frames: np.ndarray, codec: str = "h264", fps: int = 20) -> Path:
    """Encode frames; the extension of `path` is replaced by the codec's."""
    extension, encoder, pixels = CODECS[codec]
    path = path.with_suffix(extension)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "20", "b": "0", "cpu-used": "8"} if codec == "vp9" else {}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "mjpeg", "mpeg2"):
            stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def turned(data: bytes, degrees: int) -> bytes:
    """An MP4 whose picture a player turns counter-clockwise by 90, 180 or 270 degrees."""
    # The track header's matrix, 16.16 fixed point: [cos sin 0 | -sin cos 0 | 0 0 1], a clockwise turn when shown.
    cos, sin = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]
    matrix = b"".join(int(v * s).to_bytes(4, "big", signed=True) for v, s in (
        (cos, 1 << 16), (sin, 1 << 16), (0, 1), (-sin, 1 << 16), (cos, 1 << 16), (0, 1), (0, 1), (0, 1), (1, 1 << 30)
    ))  # fmt: skip
    place = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # after version/flags, times and ids, reserved, layer and volume
    return data[:place] + matrix + data[place + 36 :]
