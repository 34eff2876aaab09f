"""Reading a simulator's state off frames, with probes fitted to real ones.

Two ways. What the camera looks at from outside (a cart, a ball) is read from each frame by itself. Where the camera
moves with the player, a frame hardly says where it is: there the movement from frame to frame is read and summed up
from the known start, as visual odometry does: ahead and to the left of the player where its heading is known.

Half of the real frames are seen through the model's tokenizer, so that softness alone does not count as an error.

Letters: n videos, t frames, k numbers of a state, m numbers that a probe gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom_model_zoo.action_following import through_tokenizer
from worldloom_model_zoo.probes import ProbeConfig, Reader, fit_probe

if TYPE_CHECKING:
    from worldloom.progress import Report
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

LEAD = 2
"""Given frames that a reader sees before the first frame that it reads."""
_AROUND = np.arange(-1, 3)  # frames around t that tell the movement from t to t + 1


@dataclass(frozen=True)
class Quantity:
    """Something whose true value a simulator knows."""

    name: str
    unit: str
    read: Callable[[Any], Sequence[float]]
    """The unwrapped environment -> its coordinates, or one angle in radians."""
    kind: Literal["position", "angle"] = "position"
    """Errors of positions are Euclidean distances; those of angles are degrees, the short way round."""
    inside: bool = False
    """True for the place and heading of what carries the camera: a position ``(x, y)``, an angle counter-clockwise."""

    def error(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Errors of states ``(..., k)``: ``(...)``."""
        if self.kind == "angle":
            return np.degrees(np.abs(_turned(found - truth)[..., 0]))
        return np.sqrt(np.square(found - truth).sum(-1))

    def spread(self, truth: np.ndarray) -> float:
        """Mean error of always claiming the middle of the states ``(..., k)``."""
        if self.kind == "angle":
            middle = np.arctan2(np.sin(truth).mean(), np.cos(truth).mean())
        else:
            middle = truth.reshape(-1, truth.shape[-1]).mean(0)
        return float(self.error(np.broadcast_to(middle, truth.shape), truth).mean())


def movements(quantities: Sequence[Quantity], states: Sequence[np.ndarray]) -> np.ndarray:
    """Changes from frame to frame of states ``(t, k)``, joined: ``(t-1, m)``; positions in the axes of the heading."""
    heading = _heading(quantities, states)
    parts = []
    for quantity, state in zip(quantities, states, strict=True):
        change = np.diff(state, axis=0)
        if quantity.kind == "angle":
            change = _turned(change)
        elif heading is not None:
            change = _rotated(change, -heading[:-1, 0])
        parts.append(change)
    return np.concatenate(parts, axis=1)


def summed(quantities: Sequence[Quantity], start: Sequence[np.ndarray], changes: np.ndarray) -> list[np.ndarray]:
    """The reverse of `movements`: starts ``(n, k)``, changes ``(n, t, m)`` -> the state after each, ``(n, t, k)``."""
    edges = np.cumsum([state.shape[-1] for state in start])[:-1]
    parts = np.split(changes, edges, axis=-1)
    turns = [part for quantity, part in zip(quantities, parts, strict=True) if quantity.kind == "angle"]
    heading = _heading(quantities, start)
    before = None
    if heading is not None:  # in which direction each change happens
        before = heading[..., 0][:, None] + np.cumsum(turns[0][..., 0], axis=1) - turns[0][..., 0]
    found = []
    for quantity, state, part in zip(quantities, start, parts, strict=True):
        if quantity.kind == "position" and before is not None:
            part = _rotated(part, before)
        found.append(state[:, None] + np.cumsum(part, axis=1))
    return found


class StateReader:
    """Reads states off videos.

    Args:
        quantities: what is read.
        looks: reads what is seen from outside, of each frame.
        moves: reads the movement of what is inside, of each pair of frames.
        frames: real frames that taught it.
    """

    def __init__(self, quantities: Sequence[Quantity], looks: Reader | None, moves: Reader | None, frames: int) -> None:
        self.quantities, self.looks, self.moves, self.frames = tuple(quantities), looks, moves, frames

    @classmethod
    def fit(
        cls,
        pipeline: PredictPipeline,
        episodes: Sequence[tuple[np.ndarray, list[np.ndarray]]],
        quantities: Sequence[Quantity],
        config: ProbeConfig,
        progress: Report | None = None,
    ) -> StateReader:
        """Fit to real episodes: frames uint8 ``(t, H, W, 3)`` and the states ``(t, k)`` of each quantity."""
        seen = [frames if i % 2 else through_tokenizer(pipeline, frames) for i, (frames, _) in enumerate(episodes)]
        states = [[s[: len(frames)] for s in each] for frames, (_, each) in zip(seen, episodes, strict=True)]
        pictures = np.concatenate(seen)

        def shown(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, "physics: the reader")

        looks = moves = None
        outside, inside = ([q.inside == side for q in quantities] for side in (False, True))
        if any(outside):
            chosen = _of(quantities, outside)
            targets = np.concatenate([_circled(chosen, _of(each, outside)) for each in states])
            index = np.arange(len(pictures))[:, None]
            looks = fit_probe(pictures, index, targets, config, device=pipeline.device, progress=shown)
        if any(inside):
            chosen = _of(quantities, inside)
            targets = np.concatenate([movements(chosen, _of(each, inside)) for each in states])
            starts = np.cumsum([0, *map(len, seen[:-1])])
            index = np.concatenate([_pairs(len(frames)) + first for first, frames in zip(starts, seen, strict=True)])
            moves = fit_probe(pictures, index, targets, config, device=pipeline.device, progress=shown)
        return cls(quantities, looks, moves, len(pictures))

    def __call__(self, videos: np.ndarray, start: Sequence[np.ndarray]) -> list[np.ndarray]:
        """States ``(n, t, k)`` of each quantity in the frames after `LEAD` given ones.

        Args:
            videos: uint8 ``(n, LEAD + t, H, W, 3)``.
            start: true states ``(n, k)`` of each quantity in the last given frame.
        """
        n, t = videos.shape[:2]
        flat = videos.reshape(n * t, *videos.shape[2:])
        found: dict[int, np.ndarray] = {}
        first = np.arange(n)[:, None, None] * t
        if self.looks is not None:
            index = (first + np.arange(LEAD, t)[:, None]).reshape(-1, 1)
            made = self.looks(flat, index).reshape(n, t - LEAD, -1)
            at = 0
            for number, quantity in enumerate(self.quantities):
                if not quantity.inside:
                    width = 2 if quantity.kind == "angle" else start[number].shape[-1]
                    part, at = made[..., at : at + width], at + width
                    found[number] = np.arctan2(part[..., 1:], part[..., :1]) if quantity.kind == "angle" else part
        if self.moves is not None:
            index = (first + _pairs(t)[LEAD - 1 :]).reshape(-1, len(_AROUND))
            made = self.moves(flat, index).reshape(n, t - LEAD, -1)
            places = [number for number, quantity in enumerate(self.quantities) if quantity.inside]
            parts = summed([self.quantities[i] for i in places], [start[i] for i in places], made)
            found |= dict(zip(places, parts, strict=True))
        return [found[number] for number in range(len(self.quantities))]


def _of(items: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [item for item, chosen in zip(items, mask, strict=True) if chosen]


def _pairs(frames: int) -> np.ndarray:
    """The frames that tell each movement ``(t-1, 4)``; at the ends the outermost stands for those that are missing."""
    return (np.arange(frames - 1)[:, None] + _AROUND).clip(0, frames - 1)


def _circled(quantities: Sequence[Quantity], states: Sequence[np.ndarray]) -> np.ndarray:
    """States ``(t, k)`` as a probe learns them, joined ``(t, m)``: angles as cosine and sine."""
    parts = [
        np.concatenate([np.cos(state), np.sin(state)], axis=1) if quantity.kind == "angle" else state
        for quantity, state in zip(quantities, states, strict=True)
    ]
    return np.concatenate(parts, axis=1)


def _heading(quantities: Sequence[Quantity], states: Sequence[np.ndarray]) -> np.ndarray | None:
    return next((s for q, s in zip(quantities, states, strict=True) if q.kind == "angle"), None)


def _rotated(vectors: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """``(..., 2)`` turned counter-clockwise by ``(...)``."""
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=-1)


def _turned(angle: np.ndarray) -> np.ndarray:
    """An angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
