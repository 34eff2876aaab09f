"""Write: encode every kept span, once, and cut an episode's arrays to it.

Videos become H.264 at most `short_side` pixels high or wide; so do the episodes of robot datasets. A clip that is a
whole file, and whose file is such a video already, is taken from it as it is. Episodes that we
recorded stay exact: kept whole, their bytes are copied; cut, they are encoded again without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from worldloom.detectors import FaceGuard
    from worldloom.media import Limits
    from worldloom_curation.stage import Span

VERSION = 2
_FACES_AT_ONCE = 16  # frames

PER_STEP = frozenset({"actions", "rewards"})
"""Arrays with a row for every step from one frame to the next: T-1 rows for T frames. All others have T."""


@dataclass(frozen=True)
class WriteConfig:
    """How clips are stored."""

    short_side: int = 256
    """Videos: clips are shrunk to this many pixels on the short side (never enlarged); 0 keeps the size."""
    aspect: str = ""
    """Videos: cut to this shape about the middle, as ``16:9``; empty keeps the source's."""
    crf: int = 18
    """Videos: x264's quality, 0 (best) to 51."""
    copy: bool = True
    """Videos: a whole file that is H.264 of that size already is not encoded again."""
    faces: Literal["keep", "blur"] = "keep"
    """Videos: make every face unrecognisable, by `worldloom.detectors.FaceGuard`. Our own episodes stay as they are."""
    samples_per_shard: int = 256
    """Clips in one tar file."""
    max_shard_bytes: int = 1 << 30
    """Bytes in one tar file, about."""

    def __post_init__(self) -> None:
        if self.short_side and self.short_side < 16:
            raise WorldloomError("write.short_side must be 0 or at least 16", got=self.short_side)
        if self.aspect:
            aspect_of(self.aspect)
        if not 0 <= self.crf <= 51:
            raise WorldloomError("write.crf must be between 0 and 51", got=self.crf)
        if self.samples_per_shard < 1 or self.max_shard_bytes < 1:
            raise WorldloomError("write.samples_per_shard and write.max_shard_bytes must be at least 1")


def aspect_of(text: str) -> float:
    """Width over height that ``W:H`` says.

    Raises:
        WorldloomError: it says none.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise WorldloomError("write.aspect is W:H in whole numbers", got=text, do='write "16:9"')
    return int(parts[0]) / int(parts[1])


def stored_size(height: int, width: int, exact: bool, config: WriteConfig) -> tuple[int, int]:
    """``(h, w)`` of the stored clip. Videos get even sides, which every player wants of H.264."""
    if exact:
        return height, width
    shape = aspect_of(config.aspect) if config.aspect else width / height
    cut_height, cut_width = min(height, width / shape), min(width, height * shape)
    scale = min(1.0, config.short_side / min(cut_height, cut_width)) if config.short_side else 1.0
    return _even(cut_height * scale), _even(cut_width * scale)


def _even(side: float) -> int:
    return max(2, round(side / 2) * 2)


def encode_spans(
    video: str | bytes,
    spans: Sequence[Span],
    size: tuple[int, int],
    config: WriteConfig,
    save: Callable[[Span, bytes], None],
    limits: Limits,
) -> None:
    """Encode spans of one source in a single pass over it, one frame in memory at a time.

    Args:
        spans: in order, not overlapping.
        save: called with each span and its mp4.

    Raises:
        WorldloomError: the source ends before a span does.
    """
    from worldloom import media

    source, at, only = spans[0].source, spans[0].start, spans[0]
    blurred = blurs_faces(only, config)
    whole = len(spans) == 1 and (only.start, only.step) == (0, 1)
    if config.copy and whole and not source.recorded and not blurred:
        copied = media.copy_video(video, only.end, only.fps, size, limits)
        if copied is not None:
            save(only, copied)
            return
    first = source.window[0] if source.window else 0
    pictures = media.iter_decoded(video, first + at, first + spans[-1].end, limits=limits)
    for span in spans:
        assert span.start >= at, "spans must be in order"
        _skip(pictures, span.start - at)
        taken = _fitted(_every(pictures, span), size, plain=not (source.exact or blurred))
        if blurred:
            taken = without_faces(taken)
        encoded = media.write_video(None, taken, span.fps / span.step, lossless=span.source.exact, crf=config.crf)
        assert encoded is not None
        save(span, encoded)
        at = span.end


def blurs_faces(span: Span, config: WriteConfig) -> bool:
    """Whether faces are blurred in a span's clip."""
    return config.faces == "blur" and not span.source.exact


def without_faces(frames: Iterator[np.ndarray], guard: FaceGuard | None = None) -> Iterator[np.ndarray]:
    """The frames with their faces blurred, some at a time.

    Each part is looked at with a frame before and after it: a face is blurred in its neighbours too.

    Raises:
        WorldloomError: no face detector is installed.
    """
    from worldloom.detectors import FaceGuard

    guard = guard or FaceGuard()
    before: list[np.ndarray] = []
    part = list(islice(frames, _FACES_AT_ONCE))
    while part:
        after = list(islice(frames, 1))
        window = np.stack([*before, *part, *after])
        blurred = guard.check_video(window).frames
        shown = window if blurred is None else blurred
        yield from shown[len(before) : len(before) + len(part)]
        before = part[-1:]
        part = after + list(islice(frames, _FACES_AT_ONCE - 1)) if after else []


def _fitted(pictures: Iterator[Any], size: tuple[int, int], plain: bool) -> Iterator[Any]:
    """Decoded pictures at that size, for the encoder; or uint8 ``(h, w, 3)``, where more than shrinking is to be done.

    Args:
        plain: whether no one looks at the pixels.
    """
    from worldloom.decoding import to_rgb
    from worldloom.encoding import for_encoder
    from worldloom.media import fit

    for picture in pictures:
        made = for_encoder(picture, size) if plain else None
        yield fit(to_rgb(picture)[None], size)[0] if made is None else made


def _skip(frames: Iterator[Any], count: int) -> None:
    for _ in islice(frames, count):
        pass


def _every(frames: Iterator[Any], span: Span) -> Iterator[Any]:
    """The frames of a span that its step takes; reads exactly the span's frames off the iterator."""
    for i in range(span.end - span.start):
        frame = next(frames, None)
        if frame is None:
            raise WorldloomError(f"the source ended at frame {span.start + i}, before the end of the span")
        if i % span.step == 0:
            yield frame


def cut_arrays(arrays: Mapping[str, np.ndarray], span: Span, frames: int) -> dict[str, np.ndarray]:
    """The rows of an episode's arrays that belong to a span: T frames carry T-1 actions.

    Args:
        frames: of the whole episode.

    Raises:
        WorldloomError: an array does not have a row for every frame (or step) of the episode.
    """
    cut: dict[str, Any] = {}
    for name, array in arrays.items():
        rows = frames - 1 if name in PER_STEP else frames
        if len(array) != rows:
            raise WorldloomError(
                f"the {name} of the episode do not fit its video", got=f"{len(array)} rows for {frames} frames"
            )
        end = span.end - 1 if name in PER_STEP else span.end
        cut[name] = np.ascontiguousarray(array[span.start : end])
    return cut
