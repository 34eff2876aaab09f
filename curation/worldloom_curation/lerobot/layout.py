"""The layout of a LeRobot dataset: file names, ``meta/info.json``, features. Imports nothing heavy.

A LeRobot dataset has one row for every frame, with the action taken *at* that frame. ``actions[t]`` leads from frame t
to frame t+1 here, so T frames carry T-1 actions: the action in an episode's last row leads to a frame that was not
recorded, and is dropped on reading. On writing, the last row repeats the action before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.errors import WorldloomError

VERSION = "v3.0"
READABLE = ("v2.0", "v2.1", "v3.0")

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

CHUNK_FILES = 1000
DATA_MB = 100
VIDEO_MB = 200

ACTION, STATE, REWARD, DONE, SUCCESS = "action", "observation.state", "next.reward", "next.done", "next.success"
IMAGES = "observation.images."

ROW_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""The features that every dataset has."""


@dataclass(frozen=True)
class Info:
    """What ``meta/info.json`` says that a reader needs."""

    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str
    chunks_size: int
    robot_type: str
    episodes: int

    @property
    def videos(self) -> list[str]:
        """The keys of the cameras whose frames are in video files."""
        return [key for key, feature in self.features.items() if feature.get("dtype") == "video"]

    @property
    def images(self) -> list[str]:
        """The keys of the cameras whose frames are images inside the data files."""
        return [key for key, feature in self.features.items() if feature.get("dtype") == "image"]


def is_lerobot(folder: Path) -> bool:
    """Whether a folder says that it is a LeRobot dataset."""
    try:
        return "codebase_version" in json.loads((folder / INFO).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_info(root: Path) -> Info:
    """``meta/info.json``.

    Raises:
        WorldloomError: it is damaged, or of a version that is not read.
    """
    try:
        content = json.loads((root / INFO).read_bytes())
        version = str(content["codebase_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorldloomError("meta/info.json cannot be read", got=f"{root}: {error!r}") from error
    if version not in READABLE:
        raise WorldloomError(
            "this version of the LeRobot format is not read", got=version, do=f"convert it to {VERSION} with lerobot"
        )
    try:
        info = Info(
            version=version,
            fps=float(content["fps"]),
            features={str(key): dict(feature) for key, feature in content["features"].items()},
            data_path=str(content["data_path"]),
            video_path=str(content.get("video_path") or ""),
            chunks_size=int(content.get("chunks_size") or CHUNK_FILES),
            robot_type=str(content.get("robot_type") or ""),
            episodes=int(content["total_episodes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorldloomError("meta/info.json is damaged", got=f"{root}: {error!r}") from error
    if info.fps <= 0 or info.chunks_size < 1:
        raise WorldloomError("meta/info.json is damaged", got=f"{root}: fps {info.fps}, chunks {info.chunks_size}")
    return info


def fill(template: str, **values: str | int) -> str:
    """A path template of ``info.json`` with its fields filled in. (``str.format`` would look up attributes as well.)

    Raises:
        WorldloomError: a field that is not known.
    """

    def field(match: re.Match[str]) -> str:
        name, digits = match[1], match[2]
        if name not in values:
            raise WorldloomError("a path in meta/info.json has a field that is not known", got=match[0])
        value = values[name]
        return f"{value:0{int(digits)}d}" if digits and isinstance(value, int) else str(value)

    return re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", field, template)


def inside(root: Path, relative: str) -> Path:
    """A file of the dataset.

    Raises:
        WorldloomError: the path leaves the dataset, or there is no such file.
    """
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise WorldloomError("a path leads out of the dataset", got=relative)
    if not path.is_file():
        raise WorldloomError("a file of the dataset is missing", got=relative)
    return path


def names_of(feature: Mapping[str, Any]) -> list[str]:
    """The names of a vector's components, from any of the ways in which datasets give them; [] for none."""
    names = feature.get("names")
    if isinstance(names, Mapping):
        lists = [value for value in names.values() if isinstance(value, list)]
        if lists:
            names = [item for value in lists for item in value]
        else:  # {"x": 0, "y": 1}: names with their places
            names = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
    if not isinstance(names, list):
        return []
    flat: list[str] = []
    for item in names:
        flat += [str(part) for part in item] if isinstance(item, list) else [str(item)]
    return flat
