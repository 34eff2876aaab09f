"""Video out: bit-deterministic H.264, and files taken over as they are. `worldloom.media` is the door to it.

Encoders run on one thread, for a threaded one is not deterministic.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.artifacts import atomic_write
from worldloom.decoding import DEFAULT_LIMITS, Limits, Reader, Source, import_av, rotation_of
from worldloom.errors import WorldloomError


def write_video(
    path: str | os.PathLike[str] | None,
    frames: np.ndarray | Iterable[Any],
    fps: float | Fraction,
    lossless: bool = False,
    crf: int = 18,
) -> bytes | None:
    """Encode uint8 RGB frames as MP4 (H.264). Equal frames give equal bytes (by one PyAV wheel on one kind of CPU).

    ``lossless`` stores RGB exactly (4:4:4, quantiser 0; browsers do not play it). Otherwise 4:2:0, or 4:4:4 where the
    width or the height is odd, since 4:2:0 cannot hold those.

    Args:
        path: the file, replaced atomically; None returns the bytes instead.
        frames: ``(t, h, w, 3)``, or an iterable of ``(h, w, 3)`` and of pictures that `for_encoder` made.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (best) to 51.

    Raises:
        WorldloomError: no frames, another dtype or shape, a size that changes, or a rate that is not positive.
    """
    av = import_av()
    if not fps or not math.isfinite(fps) or fps <= 0:
        raise WorldloomError("the frame rate must be a positive number", got=fps)
    if not 0 <= crf <= 51:
        raise WorldloomError("crf must lie between 0 and 51", got=crf)
    rate = Fraction(fps).limit_denominator(65536)
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise WorldloomError("there are no frames to write", do="give at least one frame")
    shape = _shape(first)
    height, width = shape[:2]
    buffer = io.BytesIO()
    options = {"threads": "1", "preset": "ultrafast" if lossless else "veryfast"}
    # Off: macroblock-tree rate control. At small sizes x264 reads memory there that it never wrote: one in ten files
    # differed between runs at 64x64 (none in thousands without it).
    options |= {"qp": "0"} if lossless else {"crf": str(crf), "x264-params": "mbtree=0"}
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if lossless else "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        if not lossless:
            stream.codec_context.colorspace = 6  # BT.601, which is what the conversion below computes
        frame, index = first, 0
        while frame is not None:
            picture = frame
            if isinstance(frame, np.ndarray):
                check_frame(frame, shape)
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                if not lossless:
                    picture = picture.reformat(format=stream.pix_fmt, dst_colorspace="ITU601", threads=1)
            picture.pts, picture.time_base, picture.pict_type = index, 1 / rate, 0
            container.mux(stream.encode(picture))
            frame, index = next(iterator, None), index + 1
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    if path is None:
        return data
    atomic_write(Path(path), data)
    return None


def for_encoder(picture: Any, size: tuple[int, int]) -> Any | None:
    """A decoded frame at another size as `write_video` stores it, without a detour over RGB; a tenth of the time.

    Areas are averaged. None where that is not all: a picture that is to be turned, or cut to keep its shape (half a
    percent of stretching is let pass), or a size with an odd side.

    Args:
        picture: ``av.VideoFrame``, as `worldloom.media.iter_decoded` gives it.
        size: ``(h, w)``.
    """
    height, width = size
    stretch = picture.width * height / (picture.height * width)
    if height % 2 or width % 2 or rotation_of(picture) or abs(stretch - 1) > 0.005:
        return None
    return picture.reformat(
        width, height, "yuv420p", interpolation="AREA", dst_colorspace="ITU601", dst_color_range="MPEG", threads=1
    )


def copy_video(
    source: Source, frames: int, fps: float, size: tuple[int, int], limits: Limits = DEFAULT_LIMITS
) -> bytes | None:
    """The video of a file as an MP4 of its own, without encoding it again; None where it is not what is asked for.

    It must be H.264, 4:2:0, upright, with a constant rate. Nothing but the video stream is taken along.

    Args:
        source: as for `probe`.
        frames: how many there must be.
        fps: frames per second that there must be.
        size: ``(h, w)`` that they must have.

    Raises:
        WorldloomError: as `probe`.
    """
    with Reader(source, limits) as reader:
        first, stream = next(reader.frames(), None), reader.stream
        context = stream.codec_context
        if first is None or rotation_of(first) or (context.name, context.pix_fmt) != ("h264", "yuv420p"):
            return None
        if (first.height, first.width) != size or not stream.time_base:
            return None
        step = 1 / (fps * float(stream.time_base))  # of time stamps
    times: list[int] = []
    with Reader(source, limits) as reader:
        for packet in _stored(reader):
            if packet is None or (not times and not packet.is_keyframe):
                return None
            times.append(packet.pts)
    times.sort()
    if len(times) != frames or any(abs(time - times[0] - i * step) > 1 for i, time in enumerate(times)):
        return None
    buffer = io.BytesIO()
    with Reader(source, limits) as reader:
        options = {"fflags": "+bitexact"}
        with reader.av.open(buffer, "w", format="mp4", container_options=options) as out:
            stream = out.add_stream_from_template(reader.stream)
            stream.metadata.clear()
            for packet in _stored(reader):
                packet.pts, packet.dts, packet.stream = packet.pts - times[0], packet.dts - times[0], stream
                out.mux(packet)
    return buffer.getvalue()


def _stored(reader: Reader) -> Iterator[Any]:
    """The packets of a video; None in the place of one that is damaged or has no time stamps."""
    for packet in reader.container.demux(reader.stream):
        if packet.size:
            damaged = packet.is_corrupt or packet.is_discard or packet.pts is None or packet.dts is None
            yield None if damaged else packet


def _shape(frame: Any) -> tuple[int, int, int]:
    if isinstance(frame, np.ndarray):
        check_frame(frame, frame.shape)
        return frame.shape[0], frame.shape[1], 3
    return frame.height, frame.width, 3


def check_frame(frame: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse what is not a frame, uint8 ``(h, w, 3)`` of that shape."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape or 0 in frame.shape:
        raise WorldloomError(
            "frames must be uint8 (h, w, 3), all of one size", got=f"{frame.dtype} {frame.shape}, first {shape}"
        )
