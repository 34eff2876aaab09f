"""A world with four actions: a square that moves up, down, left or right by as many pixels each step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from worldloom import media, shards
from worldloom.schema import Clip, clip_id

MOVES = ("up", "down", "left", "right")
_STEPS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])


def moves(frames: int, seed: int, size: int = 16, square: int = 6, step: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """uint8 video ``(t, size, size, 3)`` and the moves taken, int64 ``(t-1,)``; every move stays in the picture."""
    rng = np.random.default_rng(seed)
    places = [rng.integers(0, size - square + 1, 2)]
    taken: list[int] = []
    while len(places) < frames:
        inside = [
            i
            for i, way in enumerate(_STEPS)
            if ((to := places[-1] + step * way) >= 0).all() and (to <= size - square).all()
        ]
        taken.append(int(rng.choice(inside)))
        places.append(places[-1] + step * _STEPS[taken[-1]])
    video = np.full((frames, size, size, 3), 30, np.uint8)
    for frame, (y, x) in zip(video, places, strict=True):
        frame[y : y + square, x : x + square] = (230, 200, 60)
    return video, np.array(taken)


def make_moves(root: Path, clips: int, frames: int = 33, seed: int = 0) -> Path:
    """A dataset of clips of that world, with one-hot actions."""
    with shards.ShardWriter(root) as writer:
        for i in range(clips):
            video, taken = moves(frames, seed + i)
            source, side = f"{seed:032d}{i:032d}", video.shape[1]
            clip = Clip(
                clip_id(source, 0, frames), f"e{i}", source, 0, frames, 10.0, side, side, action_dim=len(MOVES),
                metadata={"action_names": list(MOVES)},
            )  # fmt: skip
            data = media.write_video(None, video, 10, lossless=True)
            writer.write(shards.ShardSample(clip, data, {"actions": np.eye(len(MOVES), dtype=np.float32)[taken]}))
        refs = writer.close()
    shards.commit_dataset(root, refs, kind="clips", inputs=["file:0:none"])
    return root
