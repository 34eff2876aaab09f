"""Probe: is this a video, how large is it, and is it within the limits? Reads the header only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from worldloom.media import Limits


@dataclass(frozen=True)
class ProbeConfig:
    """Which sources are taken at all. The limits are checked before anything is allocated."""

    min_side: int = 32
    """Smallest width and height, in pixels."""
    max_pixels: int = 4096 * 2304
    """Largest width x height; more is refused before a frame is decoded."""
    max_seconds: float = 6 * 3600.0
    """Longest source."""
    max_frames: int = 2_000_000
    """Most frames of one source."""
    max_bytes: int = 64 * 1024**3
    """Largest file."""
    max_work_seconds: float = 12 * 3600.0
    """Longest time that decoding one source may take, by the clock; what a hostile file can cost."""

    def limits(self) -> Limits:
        """The same limits as the decoder wants them."""
        from worldloom.media import Limits

        return Limits(
            max_pixels=self.max_pixels,
            max_seconds=self.max_seconds,
            max_frames=self.max_frames,
            max_bytes=self.max_bytes,
            max_work_seconds=self.max_work_seconds,
        )


VERSION = 1


@dataclass(frozen=True)
class Header:
    """What the header of a video says, or why it cannot be used."""

    width: int = 0
    height: int = 0
    fps: float = 0.0
    frames: int = 0
    """As the header has it: an estimate. The scan counts."""
    codec: str = ""
    container: str = ""
    error: str = ""
    """The sentence for the ledger; empty where the video can be read."""


def probe(video: str | bytes, config: ProbeConfig, opened: contextlib.ExitStack) -> tuple[Header, Iterator[Any]]:
    """Read the header of a file or of bytes; never raises for what is wrong with the video.

    Args:
        opened: keeps the video open, to be closed by the caller.

    Returns:
        The header, and all frames of the video as PyAV decodes them.
    """
    from worldloom import media
    from worldloom.decoding import Reader

    try:
        info, frames = media.describe(opened.enter_context(Reader(video, config.limits())))
    except (WorldloomError, OSError) as error:
        return Header(error=sentence(error, "" if isinstance(video, bytes) else video, "the file")), iter(())
    return Header(info.width, info.height, float(info.fps), info.frames, info.codec, info.container), frames


def too_small(header: Header, config: ProbeConfig) -> dict[str, Any] | None:
    """The fields of the verdict that drops a source for its size; None if it is large enough."""
    side = min(header.width, header.height)
    if side >= config.min_side:
        return None
    reason = f"{header.width}x{header.height} pixels: the short side is under {config.min_side}"
    return {"measure": "short side", "value": float(side), "threshold": float(config.min_side), "reason": reason}


def sentence(error: Exception, path: str = "", name: str = "") -> str:
    """An error on one line, for the ledger; `path` becomes `name`, so that the ledger does not depend on the place."""
    if isinstance(error, WorldloomError):
        text = error.what if error.got is None else f"{error.what}: {error.got}"
    else:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if path:
        text = text.replace(str(Path(path).resolve()), name).replace(path, name)
    return " ".join(text.split()).replace(f"{name}: ", "").removesuffix(f": {name}") if name else " ".join(text.split())
