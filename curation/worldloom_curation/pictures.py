"""A decoded frame as curation sees it: small pictures of it are made when a stage asks for one, and once.

Most stages look at a small picture, so the whole frame is hardly ever converted to RGB: its planes are shrunk as they
were decoded, each halved by averaging 2 x 2 pixels while it is at least twice as large as what is asked for and
interpolated linearly from there, and only the small planes become colours. (Averaging areas in one go takes several
times as long; OpenCV halves at the speed of memory.)

Every picture is made from the frame itself and never from another picture that happens to be there: what an observer
collects must not depend on which other stages run.

Letters: h w pixels of the frame as shown.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom.decoding import rotation_of, to_rgb
from worldloom.errors import missing_extra
from worldloom.media import fit

if TYPE_CHECKING:
    from types import ModuleType


_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}
"""Formats of which the planes are shrunk before colours are made; the others become RGB first."""
_LUMA = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
"""Parts of red and blue in luma, by FFmpeg's number of the colour space (ITU-R BT.709, BT.2020); BT.601 otherwise."""
_BT601 = (0.299, 0.114)
_PIECES = 64  # of memory that are held; one size of video takes about half of it


@functools.cache
def opencv() -> ModuleType:
    """The module ``cv2``.

    Raises:
        WorldloomError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise missing_extra("opencv", "curation") from error
    return cv2


class _Workspace(threading.local):
    """Memory for the halves of one frame at a time. New memory for every frame would cost more than filling it."""

    def __init__(self) -> None:
        self._owner: Frame | None = None
        self._made: tuple[list[np.ndarray], ...] = ()
        self._memory: dict[tuple[object, ...], np.ndarray] = {}

    def memory(self, purpose: str, plane: int, *shape: int) -> np.ndarray:
        """Memory for one purpose, as it was left."""
        key = (purpose, plane, shape)
        if key not in self._memory:
            if len(self._memory) >= _PIECES:  # of videos of many sizes
                self._memory.clear()
            self._memory[key] = np.empty(shape, np.uint8)
        return self._memory[key]

    def halves(self, frame: Frame, plane: int) -> list[np.ndarray]:
        """The halves of a frame's plane that were made so far; those of the frame before are forgotten."""
        if self._owner is not frame:
            self._owner, self._made = frame, ([], [], [])
        return self._made[plane]


_WORKSPACE = _Workspace()


class Frame:
    """One frame of a video. What its methods return must not be changed.

    Args:
        image: uint8 RGB ``(h, w, 3)``.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.height, self.width = image.shape[:2]
        self._rgb: np.ndarray | None = image
        self._decoded: Any = None
        self._turns = 0
        self._planes = [image]
        self._made: dict[tuple[str, int, int], np.ndarray] = {}

    @classmethod
    def decoded(cls, picture: Any) -> Frame:
        """A frame as PyAV decoded it (``av.VideoFrame``), turned upright."""
        if picture.format.name not in _PLANAR:
            return cls(to_rgb(picture))
        frame = cls.__new__(cls)
        frame._rgb, frame._decoded, frame._made = None, picture, {}
        frame._turns = rotation_of(picture) // 90
        frame._planes = [_pixels(plane) for plane in picture.planes]
        shape = frame._planes[0].shape
        frame.height, frame.width = shape[::-1] if frame._turns % 2 else shape
        return frame

    def rgb(self) -> np.ndarray:
        """The frame: uint8 ``(h, w, 3)``."""
        if self._rgb is None:
            self._rgb = to_rgb(self._decoded)
        return self._rgb

    def colour(self, side: int) -> np.ndarray:
        """The frame with a short side of at most `side` pixels: uint8 ``(h', w', 3)``."""
        return self._picture("colour", *_shrunk(self.height, self.width, side))

    def halved(self, side: int) -> np.ndarray:
        """The frame, halved until its short side has at most `side` pixels: uint8 ``(h', w', 3)``; costs least."""
        return self._picture("colour", *_halved(self.height, self.width, side))

    def grey(self, side: int | None = None) -> np.ndarray:
        """As `colour`, its brightness (luma) alone: uint8 ``(h', w')``, 0 black, 255 white. None keeps the size."""
        size = (self.height, self.width) if side is None else _shrunk(self.height, self.width, side)
        return self._picture("grey", *size)

    def squeezed(self, height: int, width: int) -> np.ndarray:
        """The frame at a fixed size, its aspect ratio not kept: uint8 ``(height, width, 3)``."""
        return self._picture("colour", height, width)

    def digest(self) -> bytes:
        """16 bytes that equal frames of equal size and pixel format share: XXH3 of the pixels as they were decoded.

        Against chance and not against an attacker: who makes two pictures collide loses his own.
        """
        try:
            import xxhash
        except ImportError as error:
            raise missing_extra("xxhash", "curation") from error
        kind = self._decoded.format.name if self._decoded is not None else "rgb24"
        state = xxhash.xxh3_128(f"{kind} {self._turns} {self.height}x{self.width}".encode())
        for plane in self._planes:
            state.update(np.ascontiguousarray(plane).data)
        return state.digest()

    def _picture(self, kind: str, height: int, width: int) -> np.ndarray:
        key = (kind, height, width)
        if key not in self._made:
            self._made[key] = self._make(kind, height, width)
        return self._made[key]

    def _make(self, kind: str, height: int, width: int) -> np.ndarray:
        if self._decoded is None:
            small = self._reduced(0, height, width)
            return small.copy() if kind == "colour" else opencv().cvtColor(small, opencv().COLOR_RGB2GRAY)
        if self._turns % 2:
            height, width = width, height
        full = self._decoded.color_range == 2 or self._decoded.format.name.startswith("yuvj")
        if kind == "grey":
            small = self._reduced(0, height, width)
            small = small.copy() if full else opencv().LUT(small, _LEVELS)
        else:
            planes = [self._reduced(plane, height, width) for plane in range(3)]
            merged = opencv().merge(planes, _WORKSPACE.memory("merged", 0, height, width, 3))
            small = opencv().transform(merged, _colours(int(self._decoded.colorspace), full))
        return np.ascontiguousarray(np.rot90(small, self._turns)) if self._turns else small

    def _reduced(self, plane: int, height: int, width: int) -> np.ndarray:
        """A plane at another size: averages of 2 x 2 pixels as often as they fit, then linear. Valid until the next."""
        cv2, pixels = opencv(), self._planes[plane]
        sizes = _halves(*pixels.shape[:2], height, width)
        if sizes:
            made, others = _WORKSPACE.halves(self, plane), pixels.shape[2:]
            for rows, columns in sizes[len(made) :]:
                whole = (made[-1] if made else pixels)[: 2 * rows, : 2 * columns]
                to = _WORKSPACE.memory("half", plane, rows, columns, *others)
                made.append(cv2.resize(whole, (columns, rows), to, interpolation=cv2.INTER_AREA))
            pixels = made[len(sizes) - 1]
        if pixels.shape[:2] == (height, width):
            return pixels
        to = _WORKSPACE.memory("linear", plane, height, width, *pixels.shape[2:])
        return cv2.resize(pixels, (width, height), to, interpolation=cv2.INTER_LINEAR)


@functools.lru_cache(maxsize=256)
def _halves(rows: int, columns: int, height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Sizes of the halves of a picture that are no smaller than ``(height, width)``."""
    sizes: list[tuple[int, int]] = []
    while rows >= 2 * height and columns >= 2 * width:
        rows, columns = rows // 2, columns // 2
        sizes.append((rows, columns))
    return tuple(sizes)


@functools.lru_cache(maxsize=256)
def _shrunk(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of a picture whose short side is at most `side`."""
    scale = side / min(height, width)
    if scale >= 1:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


@functools.lru_cache(maxsize=256)
def _halved(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of a picture that was halved until its short side is at most `side`."""
    while min(height, width) > max(side, 1):
        height, width = max(1, height // 2), max(1, width // 2)
    return height, width


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, OpenCV works on one thread: pictures are small, and its others would only spin."""
    cv2 = opencv()
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def frames(decoded: Iterator[Any]) -> Iterator[Frame]:
    """Frames of a video, of what PyAV decodes of it, in presentation order.

    Raises:
        WorldloomError: what the decoding raises (`worldloom.media.iter_decoded`).
    """
    shape = None
    for picture in decoded:
        frame = Frame.decoded(picture)
        # A stream may change its size on the way; the first frame's size is the video's.
        shape = shape or (frame.height, frame.width)
        yield frame if (frame.height, frame.width) == shape else Frame(fit(frame.rgb()[None], shape)[0])


def _pixels(plane: Any) -> np.ndarray:
    """The pixels of a plane of 8 bits, without its padding: uint8 ``(h, w)``, of the decoder's own memory."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


_LEVELS = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)
"""Grey level of a luma of limited range, 16 to 235."""


@functools.cache
def _colours(space: int, full: bool) -> np.ndarray:
    """The matrix ``(3, 4)`` from (Y, Cb, Cr, 1) of 8 bits to RGB (ITU-R BT.601, 709 and 2020, section "signal format").

    Args:
        space: FFmpeg's number of the colour space.
        full: whether levels go from 0 to 255, and not from 16 to 235 (240 for colours).
    """
    red, blue = _LUMA.get(space, _BT601)
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    matrix = np.array(
        [[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]], np.float64
    )
    matrix *= 1 if full else np.array([255 / 219, 255 / 224, 255 / 224])
    offset = -matrix @ np.array([0 if full else 16, 128, 128])
    return np.column_stack([matrix, offset]).astype(np.float32)
