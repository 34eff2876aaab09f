"""Plain files: a video with its actions beside it, by the names of the files.

``EXT`` is npy, csv, json or parquet; a video is a file with one of `VIDEOS`' endings.

* ``NAME.mp4`` with ``NAME.actions.EXT``: one episode. ``NAME.state.EXT``, ``NAME.rewards.EXT`` and ``NAME.json``
  (facts) go with it. These are the names of the plain files that `worldloom curate export` writes.
* A folder with ``actions.EXT``: one episode, and every video in it is a camera of it, named by its file.
  ``state.EXT``, ``rewards.EXT`` and ``episode.json`` (facts) go with it.

Actions have a row for every step: T-1 rows for T frames. A file with T rows has one for every frame; its last row is
dropped, for it leads to a frame that was not recorded. A state has T rows, rewards T-1 or T.
Facts are a JSON object; ``task`` (text), ``action_names``, ``state_names`` (lists), ``success`` (true or false) and
``fps`` mean what they say, the rest becomes metadata.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError, missing_extra
from worldloom_curation.episodes import EpisodeConfig, broken, episode_source
from worldloom_curation.lerobot.read import matrix
from worldloom_curation.stage import Source
from worldloom_curation.stages.probe import sentence

VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".ogv", ".gif"})
FORMATS = (".npy", ".csv", ".json", ".parquet")
_MAX_BYTES = 1 << 30  # of an array file


def companions(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Of the files of one folder, the videos that have actions, each with the files that belong to it."""
    there = {file.name: file for file in files}
    found: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() not in VIDEOS:
            continue
        parts = [f"{file.stem}.{what}{ext}" for what in ("actions", "state", "rewards") for ext in FORMATS]
        if any(f"{file.stem}.actions{ext}" in there for ext in FORMATS):
            found[file] = [there[part] for part in (*parts, f"{file.stem}.json") if part in there]
    return found


def file_sources(video: Path, name: str, index: int) -> tuple[list[Source], list[str]]:
    """The episode of a video and the files that bear its name."""
    return _sources(video.parent, name, {"": video}, f"{video.stem}.", f"{video.stem}.json", index)


def folder_sources(folder: Path, name: str, config: EpisodeConfig, index: int) -> tuple[list[Source], list[str]]:
    """The episode of a folder with ``actions.EXT``: a source for every camera."""
    videos = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in VIDEOS}
    chosen = {stem: file for stem, file in videos.items() if not config.cameras or stem in config.cameras}
    if not chosen:
        what = "the folder has actions but no video" if not videos else "the folder has no such camera"
        return [broken(folder, name, f"{what}: {', '.join(videos) or folder.name}", index)], []
    return _sources(
        folder, name, chosen if len(videos) > 1 else {"": next(iter(chosen.values()))}, "", "episode.json", index
    )


def _sources(
    folder: Path, name: str, videos: Mapping[str, Path], prefix: str, facts_file: str, index: int
) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    inputs: list[str] = []
    for camera, video in videos.items():
        label = f"{name}#{camera}" if camera else name
        try:
            facts = _facts(folder / facts_file)
            arrays, names, files = _arrays(folder, prefix, video)
            if names and "action_names" not in facts:
                facts["action_names"] = names
            digest = file_digest(video)
            rate = float(facts.pop("fps", 0.0) or 0.0)
            facts = {"episode": index, "episode_id": name, **facts, **({"camera": camera} if camera else {})}
            sources.append(episode_source(label, video, digest, index, arrays, facts, rate=rate))
            inputs += [f"file:{file_digest(file)}:{name}/{file.name}" for file in files]
            inputs.append(f"file:{digest}:{name}/{video.name}")
        except (WorldloomError, OSError, ValueError, TypeError) as error:
            sources.append(broken(video, label, sentence(error, str(folder), name), index))
    return sources, list(dict.fromkeys(inputs))


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise WorldloomError("the facts of the episode are not JSON", got=f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise WorldloomError("the facts of the episode are not a JSON object", got=file.name)
    if {"source_digest", "metadata"} <= content.keys():  # what `curate export` wrote of one of our clips
        plain = {**content["metadata"], "fps": content["fps"]}
        return {**plain, "task": content["caption"]} if content.get("caption") else plain
    return content


def _arrays(folder: Path, prefix: str, video: Path) -> tuple[dict[str, np.ndarray], list[str], list[Path]]:
    """The arrays of an episode, the names of its action's components, and the files they are from."""
    arrays: dict[str, np.ndarray] = {}
    names: list[str] = []
    files: list[Path] = []
    for what in ("actions", "state", "rewards"):
        file = _array_file(folder, f"{prefix}{what}")
        if file is None:
            continue
        array, found = read_array(file, what)
        names = found if what == "actions" else names
        arrays[what] = array[:, 0] if what == "rewards" else array
        files.append(file)
    frames = _frames(video, len(arrays["actions"]))
    for what in ("actions", "rewards"):
        if what in arrays and len(arrays[what]) == frames:
            arrays[what] = arrays[what][:-1]
    return arrays, names, files


def _frames(video: Path, rows: int) -> int:
    """Frames of a video; counted where its header fits neither way of writing actions."""
    from worldloom import media

    frames = media.probe(video).frames
    return frames if frames in (rows, rows + 1) else media.probe(video, count=True).frames


def _array_file(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{ext}" for ext in FORMATS if (folder / f"{stem}{ext}").is_file()]
    if len(found) > 1:
        raise WorldloomError("the same array is there twice", got=[file.name for file in found], do="keep one of them")
    return found[0] if found else None


def read_array(file: Path, what: str = "actions") -> tuple[np.ndarray, list[str]]:
    """Numbers of a file as float32 ``(rows, size)``, and the names of the columns where it has any.

    * npy: one or two axes. * csv: comma-separated, a first line that is not numbers names the columns.
    * json: a list of numbers or of lists, or an object with such a list under `what` and perhaps ``names``.
    * parquet: one column of lists, named `what` or without the s, or else every column of numbers.

    Raises:
        WorldloomError: the file holds something else, or no rows.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise WorldloomError("the file is too large for an array of an episode", got=file.name)
    reader = {".npy": _npy, ".csv": _csv, ".json": _json, ".parquet": _parquet}[file.suffix]
    try:
        array, names = reader(file, what)
        array = np.asarray(array, np.float32)
    except (ValueError, TypeError, KeyError, OSError, UnicodeDecodeError) as error:
        raise WorldloomError(f"the {what} cannot be read", got=f"{file.name}: {error}") from error
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise WorldloomError(f"the {what} must be rows of numbers", got=f"{file.name}: {array.shape}")
    return array, names if len(names) == array.shape[1] else []


def _npy(file: Path, what: str) -> tuple[np.ndarray, list[str]]:
    return np.load(file, allow_pickle=False), []


def _csv(file: Path, what: str) -> tuple[np.ndarray, list[str]]:
    with open(file, newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines) if row]
    names: list[str] = []
    try:
        [float(cell) for cell in rows[0]] if rows else None
    except ValueError:
        names, rows = [cell.strip() for cell in rows[0]], rows[1:]
    return np.array([[float(cell) for cell in row] for row in rows]), names


def _json(file: Path, what: str) -> tuple[np.ndarray, list[str]]:
    content: Any = json.loads(file.read_bytes())
    names: list[str] = []
    if isinstance(content, dict):
        names = [str(name) for name in content.get("names") or ()]
        content = content[what]
    return np.array(content, np.float64), names


def _parquet(file: Path, what: str) -> tuple[np.ndarray, list[str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "curation") from error
    try:
        table = parquet.read_table(file)
    except Exception as error:  # pyarrow's errors are of several kinds
        raise ValueError(str(error)) from error
    for name in (what, what.removesuffix("s")):
        if name in table.column_names:
            return matrix(table[name], name), []
    return np.concatenate([matrix(table[name], name) for name in table.column_names], axis=1), list(table.column_names)
