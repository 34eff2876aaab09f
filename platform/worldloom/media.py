"""Video in and out: decoding within limits, bit-deterministic H.264, and the one place where pixels become floats.

Letters: b batch, c channels (3, RGB), t frames, h w pixels.
Decoded frames are uint8 ``(t, h, w, c)``; float video is ``(b, c, t, h, w)`` in [-1, 1].

Untrusted input is opened within `Limits`; see `worldloom.decoding`. Encoders run on one thread, for a threaded one is
not deterministic.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom.decoding import (
    DEFAULT_LIMITS,
    Limits,
    Reader,
    Source,
    VideoInfo,
    local_file,
    over_limit,
    rotation_of,
    source_name,
    to_rgb,
)
from worldloom.encoding import check_frame, copy_video, write_video
from worldloom.errors import WorldloomError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Limits",
    "Source",
    "VideoInfo",
    "contact_sheet",
    "copy_video",
    "fit",
    "iter_decoded",
    "iter_frames",
    "probe",
    "read_frames",
    "read_image",
    "resize",
    "shrink",
    "to_frames",
    "to_tensor",
    "write_gif",
    "write_image",
    "write_video",
]


def probe(source: Source, limits: Limits = DEFAULT_LIMITS, *, count: bool = False) -> VideoInfo:
    """What a video is, with proof that its first frame decodes.

    Args:
        source: path of a local file, or the bytes of one.
        limits: see `Limits`.
        count: decode everything to count the frames exactly.

    Raises:
        WorldloomError: no such file, not a video, no decodable frame, or over a limit.
    """
    with Reader(source, limits) as reader:
        info, frames = describe(reader)
        if not count:
            return info
        counted = sum(1 for _ in frames)
        seconds = info.duration if reader.duration() > 0 else counted / info.fps
    return replace(info, frames=counted, exact=True, duration=seconds)


def describe(reader: Reader) -> tuple[VideoInfo, Iterator[Any]]:
    """What a source that was just opened is, and all its frames as PyAV decodes them; the first has been decoded.

    Raises:
        WorldloomError: no frame decodes.
    """
    decoded = reader.frames()
    first = next(decoded, None)
    if first is None:
        raise reader.no_frame()
    stream, width, height, rotation = reader.stream, first.width, first.height, rotation_of(first)
    fps, duration = reader.fps(), reader.duration()
    frames = int(stream.frames or round(duration * fps)) or 1
    if rotation in (90, 270):
        width, height = height, width
    codec, pix_fmt = stream.codec_context.name, str(stream.codec_context.pix_fmt or first.format.name)
    has_audio, container = bool(reader.container.streams.audio), str(reader.container.format.name)
    if duration <= 0:
        duration = frames / fps
    info = VideoInfo(codec, width, height, fps, frames, duration, has_audio, pix_fmt, container, rotation=rotation)
    return info, itertools.chain((first,), decoded)


def iter_frames(
    source: Source,
    start: int = 0,
    end: int | None = None,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """Frames ``start, start + stride, ...`` below ``end``, one by one in presentation order: uint8 ``(h, w, 3)`` RGB.

    A frame's index counts the frames that decode, from the start of the file; time stamps play no part, so variable
    rates and files without time stamps index alike. Rotated video is turned upright. ``size`` goes through `fit`.
    A damaged packet is skipped; a file of which nothing decodes raises.

    Raises:
        WorldloomError: as `probe`, or for a span that makes no sense.
    """
    shape = None
    for frame in iter_decoded(source, start, end, stride, limits):
        image = to_rgb(frame)
        # A stream may change its size on the way; the first frame's size is the video's.
        shape = shape or image.shape[:2]
        yield fit(image[None], size or shape)[0] if image.shape[:2] != (size or shape) else image


def iter_decoded(
    source: Source, start: int = 0, end: int | None = None, stride: int = 1, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Any]:
    """The same frames as PyAV decodes them (``av.VideoFrame``), neither turned nor fitted.

    Raises:
        WorldloomError: as `iter_frames`.
    """
    _check_span(start, end, stride)
    with Reader(source, limits) as reader:
        index = -1
        for index, frame in reader.frames_from(start):
            if end is not None and index >= end:
                return
            if index >= start and (index - start) % stride == 0:
                yield frame
        if index < 0:
            raise reader.no_frame()


def read_frames(
    source: Source,
    start: int = 0,
    end: int | None = None,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Frames ``[start, end)`` as one array, uint8 ``(t, h, w, 3)`` RGB; see `iter_frames`.

    Raises:
        WorldloomError: as `iter_frames`; also if the result would exceed ``limits.max_array_bytes``, or the video ends
            before ``start``. A video that ends before ``end`` gives the frames there are.
    """
    out: list[np.ndarray] = []
    total = 0
    for frame in iter_frames(source, start, end, size, stride, limits):
        total += frame.nbytes
        if total > limits.max_array_bytes:
            raise WorldloomError(
                "the frames do not fit the memory limit",
                got=f"more than {limits.max_array_bytes / 2**30:.1f} GiB decoded from {source_name(source)}",
                do="read a shorter span (start, end), a smaller size, or use iter_frames",
            )
        out.append(frame)
    if not out:
        raise WorldloomError(
            "the video has no frame in that span",
            got=f"frames [{start}, {end}) of {source_name(source)}",
            do="check the span",
        )
    return np.stack(out)


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 ``(t, h, w, 3)`` or ``(b, t, h, w, 3)`` -> float32 ``(1 | b, 3, t, h, w)``: ``x / 127.5 - 1``."""
    import torch

    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3:
        raise WorldloomError("frames must be uint8 (t, h, w, 3) or (b, t, h, w, 3)", got=f"{array.dtype} {array.shape}")
    if array.ndim == 4:
        array = array[None]
    # (b, t, h, w, c) -> (b, c, t, h, w); copied, so that the tensor never shares a read-only buffer
    video = torch.from_numpy(array.transpose(0, 4, 1, 2, 3).copy())
    return video.to(torch.float32).div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> np.ndarray:
    """Float ``(b, 3, t, h, w)`` in [-1, 1] (clamped) -> uint8 ``(b, t, h, w, 3)``; the exact inverse of `to_tensor`."""
    import torch

    if video.ndim != 5 or video.shape[1] != 3:
        raise WorldloomError("a video must be (b, 3, t, h, w)", got=tuple(video.shape))
    if not torch.isfinite(video).all():
        raise WorldloomError("the video holds values that are not finite", do="look for what made the NaN or infinity")
    pixels = video.detach().to("cpu", torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    # (b, c, t, h, w) -> (b, t, h, w, c)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().numpy()


def fit(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre-crop uint8 ``(t, h, w, 3)`` to the aspect ratio of ``size = (h, w)``, then resize by area averaging.

    Shrinking averages areas; enlarging interpolates linearly. Nothing is stretched.
    """
    height, width = _check_size(size)
    if frames.ndim != 4 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise WorldloomError("frames must be uint8 (t, h, w, c)", got=f"{frames.dtype} {frames.shape}")
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    if w * height > h * width:
        crop_h, crop_w = h, max(1, round(h * width / height))
    else:
        crop_h, crop_w = max(1, round(w * height / width)), w
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = frames[:, top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (height, width):
        return np.ascontiguousarray(cropped)
    return np.stack([resize(frame, size) for frame in cropped])


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch one uint8 image ``(h, w, c)`` to ``size = (h, w)``: area averaging down, linear interpolation up."""
    height, width = _check_size(size)
    h, w = image.shape[:2]
    try:
        import cv2
    except ImportError:
        return _resize_numpy(image, height, width)
    channels = image.shape[2:]
    image = np.ascontiguousarray(image)
    if height < h or width < w:
        image = cv2.resize(image, (min(width, w), min(height, h)), interpolation=cv2.INTER_AREA)
    if height > h or width > w:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, *channels)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """A uint8 image ``(h, w, c)`` whose short side is at most `side`, its aspect ratio kept; a smaller one as it is."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    return resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file (PNG, JPEG, WebP, BMP, ...) as uint8 ``(h, w, 3)`` RGB, upright by its EXIF orientation."""
    image_module = _pillow()
    from PIL import ImageOps, UnidentifiedImageError

    file = local_file(path)
    try:
        with image_module.open(file, formats=["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]) as image:
            if image.width * image.height > DEFAULT_LIMITS.max_pixels:
                raise over_limit("pixels of a frame", image.width * image.height, DEFAULT_LIMITS.max_pixels, path)
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise WorldloomError("not an image", got=f"{file}: {error}", do="give a PNG, JPEG, WebP or BMP file") from error


def write_image(path: str | os.PathLike[str] | None, frame: np.ndarray) -> bytes | None:
    """Encode a uint8 ``(h, w, 3)`` image as PNG (JPEG where the path ends so); None returns the PNG's bytes."""
    image_module = _pillow()
    check_frame(frame, frame.shape)
    buffer = io.BytesIO()
    jpeg = path is not None and Path(path).suffix.lower() in (".jpg", ".jpeg")
    image_module.fromarray(np.ascontiguousarray(frame)).save(
        buffer, **({"format": "JPEG", "quality": 95} if jpeg else {"format": "PNG"})
    )
    if path is None:
        return buffer.getvalue()
    _write(path, buffer.getvalue())
    return None


def write_gif(path: str | os.PathLike[str] | None, frames: np.ndarray, fps: float) -> bytes | None:
    """Encode uint8 ``(t, h, w, 3)`` as an endless GIF (256 colours a frame); None returns the bytes."""
    image_module = _pillow()
    if frames.ndim != 4 or not len(frames):
        raise WorldloomError("frames must be uint8 (t, h, w, 3), at least one", got=frames.shape)
    if not fps > 0:
        raise WorldloomError("the frame rate must be a positive number", got=fps)
    for frame in frames:
        check_frame(frame, frames.shape[1:])
    first, *rest = [image_module.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    buffer = io.BytesIO()
    # GIF counts hundredths of a second, and players slow anything under two of them down.
    delay = max(20, round(100 / fps) * 10)
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=delay, loop=0)
    if path is None:
        return buffer.getvalue()
    _write(path, buffer.getvalue())
    return None


def contact_sheet(rows: Sequence[np.ndarray], every: int = 1, gap: int = 2) -> np.ndarray:
    """One image from videos: a row each, every ``every``-th frame from left to right, white gaps.

    Args:
        rows: uint8 ``(t, h, w, 3)`` arrays of one frame size; their lengths may differ.
    """
    if not rows or any(row.ndim != 4 or row.dtype != np.uint8 or not len(row) for row in rows):
        raise WorldloomError("rows must be uint8 (t, h, w, 3) arrays with at least one frame", got=len(rows))
    if len({row.shape[1:] for row in rows}) != 1:
        raise WorldloomError(
            "the rows have different frame sizes", got=[row.shape for row in rows], do="fit() them first"
        )
    if every < 1:
        raise WorldloomError("every must be at least 1", got=every)
    picked = [row[::every] for row in rows]
    h, w = rows[0].shape[1:3]
    columns = max(len(row) for row in picked)
    sheet = np.full((len(rows) * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(picked):
        for j, frame in enumerate(row):
            sheet[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = frame
    return sheet


def _resize_numpy(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`resize` as two matrix products, for machines without OpenCV; within one grey level of it when shrinking."""
    rows, columns = _weights(image.shape[0], height), _weights(image.shape[1], width)
    planes = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))  # (height, w, c)
    planes = np.tensordot(columns, planes, axes=(1, 1)).swapaxes(0, 1)  # (height, width, c)
    return np.clip(np.rint(planes), 0, 255).astype(np.uint8)


def _weights(n: int, m: int) -> np.ndarray:
    """``(m, n)`` rows that average areas (m <= n) or interpolate linearly between pixel centres (m > n)."""
    if m <= n:
        edges = np.arange(m + 1) * (n / m)
        low, high = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(n) + 1)
        return (np.maximum(high - low, 0) * (m / n)).astype(np.float32)
    centre = np.clip((np.arange(m) + 0.5) * (n / m) - 0.5, 0, n - 1)
    return np.maximum(1 - np.abs(centre[:, None] - np.arange(n)), 0).astype(np.float32)


def _write(path: str | os.PathLike[str], data: bytes) -> None:
    from worldloom.artifacts import atomic_write

    atomic_write(Path(path), data)


def _check_span(start: int, end: int | None, stride: int) -> None:
    if start < 0 or stride < 1 or (end is not None and end <= start):
        raise WorldloomError("a span needs 0 <= start < end and stride >= 1", got=f"[{start}, {end}) by {stride}")


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1 or height * width > DEFAULT_LIMITS.max_pixels:
        raise WorldloomError("a size is (height, width), both at least 1", got=size)
    return height, width


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "curation") from error
    return Image
