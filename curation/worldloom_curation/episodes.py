"""Episodes that others recorded: a video with actions beside it. What the readers of their formats share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldloom_curation.stage import Source


@dataclass(frozen=True)
class EpisodeConfig:
    """Where sources come from, and what of a robot's episodes is taken."""

    cameras: tuple[str, ...] = ()
    """Cameras of LeRobot datasets and episode folders that are taken, e.g. observation.images.top or top; none: all."""
    action_key: str = "action"
    """The column of a LeRobot dataset that holds the actions."""
    state_key: str = "observation.state"
    """The column of a LeRobot dataset that holds the state."""
    allow: tuple[str, ...] = ()
    """URLs that may be read: each allows what lies under it, e.g. s3://bucket/videos or https://host/data."""
    max_gib: float = 64.0
    """Most that is fetched from one URL, in GiB."""


def episode_source(
    name: str,
    video: Path,
    digest: str,
    index: int,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    *,
    rate: float = 0.0,
    window: tuple[int, int] | None = None,
) -> Source:
    """The source of an episode whose frames are in a video file.

    Args:
        digest: sha256 of that file; with the frames of the episode in it, a clip's identity.
        arrays: as in a shard sample: ``actions`` (T-1, a), ``state`` (T, s), ``rewards`` (T-1,).
        window: which frames of the file are the episode; None for all.
    """
    key = hashlib.sha256(json.dumps([digest, window, rate, dict(facts)], sort_keys=True).encode())
    for label, array in sorted(arrays.items()):
        key.update(f"{label} {array.dtype} {array.shape}".encode())
        key.update(np.ascontiguousarray(array).data)
    return Source(
        name=name,
        path=str(video.absolute()),
        digest=digest,
        key=key.hexdigest(),
        index=index,
        cut_from=(window[0], window[1], 1) if window else None,
        facts=facts,
        actions=arrays.get("actions"),
        window=window,
        rate=rate,
        arrays=arrays,
    )


def broken(path: Path, name: str, error: str, index: int | None = None) -> Source:
    """A source that cannot be opened; the error becomes its row in the ledger."""
    digest = hashlib.sha256(f"{error}\n{name}".encode()).hexdigest()
    return Source(name, str(path.absolute()), digest, key=digest, index=index, error=error)
