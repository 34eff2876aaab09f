"""Small pictures of the frame that is being scanned, made once however many observers ask for them.

Every observer of a scan is given the same array in turn (see `scan`), so the last frame's small pictures are kept with
that array, per thread. Each is made from the frame itself and never from another small picture that happens to be
there: what an observer collects must not depend on which other stages run. Stages that agree on a size (64 pixels for
grey levels, 144 for colours) share the work.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from worldloom.errors import missing_extra
from worldloom.media import resize, shrink

if TYPE_CHECKING:
    from types import ModuleType

_Key = tuple[str, int, int]


class _Last(threading.local):
    def __init__(self) -> None:
        self.frame: np.ndarray | None = None
        self.made: dict[_Key, np.ndarray] = {}

    def of(self, frame: np.ndarray) -> dict[_Key, np.ndarray]:
        if self.frame is not frame:
            self.frame, self.made = frame, {}
        return self.made


_LAST = _Last()


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


def colour(frame: np.ndarray, side: int) -> np.ndarray:
    """The frame with a short side of at most `side` pixels, area averaged: uint8 ``(h, w, 3)``. Do not change it."""
    made, key = _LAST.of(frame), ("colour", side, 0)
    if key not in made:
        made[key] = shrink(frame, side)
    return made[key]


def grey(frame: np.ndarray, side: int) -> np.ndarray:
    """As `colour`, in grey levels by ITU-R BT.601: uint8 ``(h, w)``. Do not change it."""
    made, key = _LAST.of(frame), ("grey", side, 0)
    if key not in made:
        cv2 = opencv()
        made[key] = cv2.cvtColor(np.ascontiguousarray(colour(frame, side)), cv2.COLOR_RGB2GRAY)
    return made[key]


def squeezed(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frame at a fixed size, its aspect ratio not kept: uint8 ``(height, width, 3)``. Do not change it."""
    made, key = _LAST.of(frame), ("squeezed", height, width)
    if key not in made:
        made[key] = resize(frame, (height, width))
    return made[key]
