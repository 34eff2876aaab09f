"""Opening and decoding video that nobody vouches for; `worldloom.media` is the door to it.

Only regular local files or bytes are opened, only by the demuxers in `FORMATS` (no playlists, no image sequences, no
concat scripts), with FFmpeg's protocols cut down to ``file`` and ``pipe``; pixels, frames, seconds and bytes are held
against `Limits` before anything is allocated. One thread per decoder: a threaded PyAV decoder in the parent makes
forked data loader workers hang.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import WorldloomError, missing_extra

Source = str | os.PathLike[str] | bytes

FORMATS = (
    "asf,avi,av1,dv,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,m4a,3gp,3g2,mj2,"
    "mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,vc1,yuv4mpegpipe"
)
"""The demuxers that may open a file. Those that open other files or URLs (hls, dash, concat, sdp) are not in it."""


@dataclass(frozen=True)
class Limits:
    """What a source may ask of this machine. Held before allocation."""

    max_pixels: int = 4096 * 4096
    """Width times height of a frame."""
    max_frames: int = 1_000_000
    """Frames decoded from one source."""
    max_seconds: float = 24 * 3600.0
    """Declared duration."""
    max_bytes: int = 64 * 2**30
    """Size of the file."""
    max_array_bytes: int = 16 * 2**30
    """Size of the array that one `read_frames` call may return."""
    max_work_seconds: float = 24 * 3600.0
    """By the clock, from opening a source to its last frame, whatever its reader does in between."""


DEFAULT_LIMITS = Limits()

_SEEK_AFTER = 64  # frames; below, decoding from the start costs less than finding out where to seek


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds, as shown: the size is after rotation."""

    codec: str
    """FFmpeg's name of the video codec."""
    width: int
    """Pixels, as displayed."""
    height: int
    """Pixels, as displayed."""
    fps: float
    """Average frame rate; of a variable rate the mean."""
    frames: int
    """Number of frames: counted if `exact`, else what the header says or duration times rate."""
    duration: float
    """Seconds."""
    has_audio: bool
    """Whether there is at least one audio stream."""
    pix_fmt: str
    """FFmpeg's name of the pixel format."""
    container: str
    """FFmpeg's name of the demuxer."""
    rotation: int = 0
    """Degrees, counter-clockwise, that the stored pixels were turned by to be shown."""
    exact: bool = False
    """True if `frames` was counted by decoding."""


class Reader:
    """One open source and its first video stream, decoded on one thread within limits."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits = source, limits
        self._deadline = time.monotonic() + limits.max_work_seconds
        self.av = import_av()
        if isinstance(source, bytes | bytearray | memoryview):
            target: Any = io.BytesIO(source)
            size = len(source)
        else:
            file = local_file(source)
            target, size = f"file:{file}", file.stat().st_size
        if size == 0:
            raise WorldloomError("the file is empty", got=source_name(source))
        if size > limits.max_bytes:
            raise over_limit("bytes", size, limits.max_bytes, source)
        options = {
            "protocol_whitelist": "file,pipe",
            "format_whitelist": FORMATS,
            "max_pixels": str(limits.max_pixels),
        }
        try:
            self.container: Any = self.av.open(target, options=options)
        except PermissionError as error:
            raise WorldloomError(
                "the file may not be read", got=source_name(source), do="check its permissions"
            ) from error
        except (self.av.FFmpegError, OSError, ValueError) as error:
            raise WorldloomError(
                "not a video that can be read",
                got=f"{source_name(source)}: {_reason(error)}",
                do="check the file in a player",
            ) from error
        try:
            self._check_stream()
        except BaseException:
            self.close()
            raise

    def _check_stream(self) -> None:
        # A picture attached to a music file is a video stream too, of a single frame.
        streams = [s for s in self.container.streams.video if not _attached(s)]
        if not streams:
            raise WorldloomError(
                "the file has no video", got=source_name(self.source), do="give a file with a video stream"
            )
        self.stream: Any = streams[0]
        context = self.stream.codec_context
        if context is None:
            raise WorldloomError("no decoder for this video", got=source_name(self.source), do="convert it to H.264")
        self.stream.thread_type, context.thread_count = "NONE", 1
        pixels = (context.width or 0) * (context.height or 0)
        if pixels > self.limits.max_pixels:
            raise over_limit("pixels of a frame", pixels, self.limits.max_pixels, self.source)
        if self.duration() > self.limits.max_seconds:
            raise over_limit("seconds", self.duration(), self.limits.max_seconds, self.source)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.container.close()

    def fps(self) -> float:
        """Mean rate in frames per second; 25 where the file says nothing usable."""
        for rate in (self.stream.average_rate, self.stream.guessed_rate, self.stream.base_rate):
            if rate and 0 < float(rate) <= 1000:
                return float(rate)
        return 25.0

    def duration(self) -> float:
        """Seconds as declared; 0 where the file does not say."""
        if self.stream.duration is not None and self.stream.time_base:
            return max(0.0, float(self.stream.duration * self.stream.time_base))
        return max(0.0, (self.container.duration or 0) / 1e6)

    def frames(self) -> Iterator[Any]:
        """All frames that decode, in presentation order. Damaged packets are stepped over."""
        seen = 0
        for packet in self._packets():
            if time.monotonic() > self._deadline:
                raise WorldloomError(
                    f"over the limit of {self.limits.max_work_seconds:g} seconds of work",
                    got=source_name(self.source),
                    do="raise Limits",
                )
            try:
                frames = self.stream.decode(packet)
            except MemoryError:
                raise
            except (self.av.FFmpegError, OSError):
                continue
            for frame in frames:
                if frame.width * frame.height > self.limits.max_pixels:
                    raise over_limit(
                        "pixels of a frame", frame.width * frame.height, self.limits.max_pixels, self.source
                    )
                seen += 1
                if seen > self.limits.max_frames:
                    raise over_limit("frames", seen, self.limits.max_frames, self.source)
                yield frame

    def frames_from(self, start: int) -> Iterator[tuple[int, Any]]:
        """(index, frame) pairs from ``start`` on; where seeking is not provably exact, also those before it."""
        point = self._seek_point(start) if start >= _SEEK_AFTER else None
        if point is None:
            yield from enumerate(self.frames())
            return
        target, keyframe = point
        self.container.seek(keyframe, stream=self.stream)
        frames = self.frames()
        first = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
        if first is not None and first.pts == target:
            yield from enumerate(itertools.chain((first,), frames), start)
            return
        with Reader(self.source, self.limits) as again:
            yield from enumerate(again.frames())

    def _seek_point(self, start: int) -> tuple[int, int] | None:
        """(time stamp of frame ``start``, time stamp of the keyframe before it), from a pass over the packets alone.

        None where decoding from that keyframe might not give the frame that counting from the start gives: other
        containers than MP4 and Matroska, time stamps that are missing, repeated or impossible, and files whose first
        frames do not come out in the order of their packets' time stamps (some muxers write decode times there).
        """
        if self.container.format.name.split(",")[0] not in ("mov", "matroska"):
            return None
        order, keyframes = [], []
        with Reader(self.source, self.limits) as other:
            try:
                for packet in other.container.demux(other.stream):
                    if packet.size == 0 or packet.is_discard:
                        continue
                    if packet.is_corrupt or packet.pts is None or packet.dts is None or packet.pts < packet.dts:
                        return None
                    order.append(packet.pts)
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
            except (self.av.FFmpegError, OSError):
                return None
        order.sort()
        if start >= len(order) or any(a == b for a, b in itertools.pairwise(order)):
            return None
        before = [pts for pts in keyframes if order[0] < pts <= order[start]]
        if not before:
            return None
        with Reader(self.source, self.limits) as other:
            head = [frame.pts for frame in itertools.islice(other.frames(), _SEEK_AFTER)]
        return (order[start], max(before)) if head == order[:_SEEK_AFTER] else None

    def _packets(self) -> Iterator[Any]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                yield next(packets)
            except StopIteration:
                return
            except (self.av.FFmpegError, OSError):
                # A file that was cut off: what came before still counts, and so does what the decoder holds back.
                yield None
                return

    def no_frame(self) -> WorldloomError:
        if not self.stream.codec_context.width:
            # FFmpeg shows a size over `max_pixels` as none at all, in containers that have it in their header.
            return WorldloomError(
                f"no frame of the video decodes within the limit of {self.limits.max_pixels:g} pixels of a frame",
                got=source_name(self.source),
                do="its frames are larger than Limits allow, or the file is damaged",
            )
        return WorldloomError(
            "no frame of the video decodes",
            got=source_name(self.source),
            do="the file is damaged or cut off; fetch it again",
        )


def _attached(stream: Any) -> bool:
    return bool(int(getattr(stream, "disposition", 0)) & 0x400)


def rotation_of(frame: Any) -> int:
    return round(float(frame.rotation or 0) / 90) * 90 % 360


def to_rgb(frame: Any) -> np.ndarray:
    image = frame.reformat(format="rgb24", threads=1).to_ndarray()
    turns = rotation_of(frame) // 90
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def local_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    try:
        if file.is_file():
            return file.resolve()
        kind = "is a folder" if file.is_dir() else "is not a regular file" if file.exists() else "does not exist"
    except (OSError, ValueError) as error:
        kind = f"cannot be looked up ({_reason(error)})"
    raise WorldloomError(f"the file {kind}", got=file, do="give the path of a local file")


def source_name(source: Source) -> str:
    return f"{len(source)} bytes in memory" if isinstance(source, bytes | bytearray | memoryview) else str(source)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def over_limit(what: str, value: float, limit: float, source: Any) -> WorldloomError:
    return WorldloomError(
        f"over the limit of {limit:g} {what}", got=f"{value:g} in {source_name(source)}", do="raise Limits"
    )


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise missing_extra("av (PyAV)", "curation") from error
    return av
