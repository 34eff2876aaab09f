"""Where worlds begin: spans of recorded clips, with the actions taken in them, or videos that the caller holds.

Letters: T frames, H W pixels, a action size.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.schema import Clip
from worldloom.shards import Dataset, ShardSample, open_dataset

_CACHED = 16  # decoded clips that are kept


@dataclass(frozen=True)
class Start:
    """The first frames of a world."""

    frames: np.ndarray
    """uint8 ``(T, H, W, 3)``."""
    actions: np.ndarray | None
    """float32 ``(T-1, a)``: what was done between them; None where nobody knows."""
    source: str
    """Where they come from: ``CLIP @ FRAME``."""


class StartPool:
    """Draws starts from a dataset of clips, or from videos.

    Args:
        source: a dataset of clips (or its folder), or uint8 videos ``(T, H, W, 3)``, which carry no actions.
        size: (height, width) the frames are fitted to; None keeps theirs.

    Raises:
        WorldloomError: a dataset of latents, or nothing to start from.
    """

    def __init__(
        self, source: Dataset | str | Path | Sequence[np.ndarray], size: tuple[int, int] | None = None
    ) -> None:
        self.size = size
        self.dataset: Dataset | None = None
        self._videos: list[np.ndarray] = []
        self._read: OrderedDict[int, Start] = OrderedDict()
        if isinstance(source, (str, Path, Dataset)):
            self.dataset = source if isinstance(source, Dataset) else open_dataset(source)
            if self.dataset.index.kind != "clips":
                raise WorldloomError(
                    "worlds start from pixels", got=f"{self.dataset.root} holds latents", do="give the dataset of clips"
                )
            self._clips: list[Clip] = list(self.dataset.clips())
            self._lengths = [clip.frames for clip in self._clips]
        else:
            self._videos = [np.asarray(video) for video in source]
            if any(video.ndim != 4 or video.dtype != np.uint8 for video in self._videos):
                shapes = [f"{video.dtype} {video.shape}" for video in self._videos]
                raise WorldloomError("start videos are uint8 (T, H, W, 3)", got=shapes)
            self._clips, self._lengths = [], [len(video) for video in self._videos]
        if not self._lengths:
            raise WorldloomError("there is nothing to start from", got=source, do="give a dataset of clips or videos")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is known about all clips: of the dataset, else of its first clip."""
        if self.dataset is None:
            return {}
        return {**self._clips[0].metadata, **self.dataset.index.metadata}

    @property
    def action_names(self) -> tuple[str, ...]:
        """What the components of the recorded actions are called; empty where nobody says."""
        return tuple(str(name) for name in self.metadata.get("action_names") or ())

    @property
    def action_dim(self) -> int:
        """Size of the recorded actions; 0 where there are none."""
        return 0 if self.dataset is None else self.dataset.index.action_dim

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip."""
        return list(self._lengths)

    def draw(self, random: np.random.Generator, frames: int) -> Start:
        """A random span of ``frames`` frames; every span of every clip is equally likely.

        Raises:
            WorldloomError: no clip is long enough.
        """
        spans = np.maximum(np.array(self._lengths) - frames + 1, 0)
        if not spans.sum():
            raise WorldloomError(
                f"no clip has the {frames} frames of a start",
                got=f"the longest has {max(self._lengths)}",
                do="give longer clips, or a shorter context",
            )
        at = int(random.integers(spans.sum()))
        number = int(np.searchsorted(np.cumsum(spans), at, side="right"))
        return self.at(number, at - int(spans[:number].sum()), frames)

    def at(self, which: int | str, frame: int, frames: int) -> Start:
        """``frames`` frames of a clip, by its number or id, from ``frame`` on.

        Raises:
            WorldloomError: no such clip, or it does not reach that far.
        """
        number = self._number(which)
        if frame < 0 or frame + frames > self._lengths[number]:
            raise WorldloomError(
                f"the clip does not have frames {frame} to {frame + frames}",
                got=f"{self._lengths[number]} frames in {which}",
                do=f"start at {max(self._lengths[number] - frames, 0)} or before",
            )
        clip = self._load(number)
        actions = None if clip.actions is None else clip.actions[frame : frame + frames - 1]
        return Start(clip.frames[frame : frame + frames], actions, f"{clip.source} @ {frame}")

    def samples(self) -> Sequence[int]:
        """Numbers of all clips."""
        return range(len(self._lengths))

    def whole(self, which: int | str) -> Start:
        """All frames and actions of a clip."""
        return self._load(self._number(which))

    def _number(self, which: int | str) -> int:
        if isinstance(which, str):
            found = [number for number, clip in enumerate(self._clips) if clip.id == which]
            if found:
                return found[0]
        elif 0 <= which < len(self._lengths):
            return int(which)
        raise WorldloomError(
            "there is no such clip to start from", got=which, do=f"give an id, or 0 to {len(self._lengths) - 1}"
        )

    def _load(self, number: int) -> Start:
        if number in self._read:
            self._read.move_to_end(number)
            return self._read[number]
        if self.dataset is None:
            frames, actions, source = self._videos[number], None, f"video {number}"
            frames = frames if self.size is None else media.fit(frames, self.size)
        else:
            sample = self.dataset.load(number)
            frames, actions, source = read_sample(sample, self.size), sample.arrays.get("actions"), sample.clip.id
        self._read[number] = Start(frames, actions, source)
        if len(self._read) > _CACHED:
            self._read.popitem(last=False)
        return self._read[number]


def read_sample(sample: ShardSample, size: tuple[int, int] | None) -> np.ndarray:
    """The frames of a clip, uint8 ``(T, H, W, 3)``, fitted to a size."""
    assert sample.video is not None
    return media.read_frames(sample.video, size=size)


def one_hot(actions: np.ndarray) -> bool:
    """True if every row ``(n, a)`` is one of a choices: a one among zeros."""
    if not len(actions) or actions.shape[1] < 2:
        return False
    return bool(np.isin(actions, (0, 1)).all() and (actions.sum(1) == 1).all())


def discrete_size(description: object) -> int:
    """n of ``Discrete(n)`` or ``Discrete(n, start=k)``, as a recording describes its action space; 0 for any other."""
    found = re.match(r"Discrete\((\d+)", str(description or ""))
    return int(found[1]) if found else 0
