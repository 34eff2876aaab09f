"""Episodes of a LeRobot dataset (v2.0, v2.1, v3.0) as sources of `curate run`: one for each episode and camera.

v3.0 packs many episodes into one parquet and one mp4 file; an episode's frames are those between its
``from_timestamp`` and ``to_timestamp``. v2 has a file of each for every episode.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError, missing_extra
from worldloom_curation.episodes import EpisodeConfig, broken, episode_source
from worldloom_curation.lerobot import layout
from worldloom_curation.stage import Source
from worldloom_curation.stages.probe import sentence


def read_sources(root: Path, name: str, config: EpisodeConfig) -> tuple[list[Source], list[str]]:
    """Every episode of every chosen camera, in order, and the files they were read from.

    An episode that cannot be read is a source with an error: it gets its row in the ledger.

    Args:
        name: what sources are named by, ``<name>#<episode>`` or ``<name>#<episode>/<camera>``.

    Raises:
        WorldloomError: the dataset as a whole cannot be read, or it has none of the cameras asked for.
    """
    info = layout.read_info(root)
    cameras = _cameras(info, config.cameras)
    episodes = _episodes(root, info)
    tasks = _tasks(root, info)
    rows = _Rows(root, info, config)
    digest = functools.cache(file_digest)
    sources: list[Source] = []
    read: dict[str, None] = {}
    for number, episode in enumerate(episodes):
        index = int(episode.get("episode_index", number))
        for camera in cameras:
            label = f"{name}#{index:06d}" + (f"/{camera}" if len(cameras) > 1 else "")
            try:
                data = rows.path(episode, index)
                columns = rows.of(data, index)
                video, window = _video(root, info, episode, index, camera, len(columns["frame_index"]))
                facts = _facts(info, config, camera, index, _task(episode, tasks, columns))
                facts["episode_id"] = f"{name}#{index:06d}"
                if layout.SUCCESS in columns:
                    facts["success"] = bool(columns[layout.SUCCESS].any())
                arrays = _arrays(config, columns)
                source = episode_source(label, video, digest(video), index, arrays, facts, rate=info.fps, window=window)
                for path in (data, video):
                    read.setdefault(f"file:{digest(path)}:{name}/{path.relative_to(root).as_posix()}")
            except (WorldloomError, OSError) as error:
                source = broken(root, label, sentence(error, str(root), name), index)
            sources.append(source)
    if not sources:
        raise WorldloomError("the LeRobot dataset has no episodes", got=root)
    return sources, list(read)


def _cameras(info: layout.Info, wanted: Sequence[str]) -> list[str]:
    if not info.videos:
        kind = "its cameras are images inside its data files" if info.images else "it has no camera"
        raise WorldloomError(
            f"the LeRobot dataset has no videos: {kind}",
            got=info.images or sorted(info.features),
            do="convert it to videos with lerobot",
        )
    if not wanted:
        return info.videos
    chosen = [key for key in info.videos if key in wanted or key.removeprefix(layout.IMAGES) in wanted]
    if not chosen:
        raise WorldloomError(
            "the dataset has no such camera", got=list(wanted), do=f"choose of: {', '.join(info.videos)}"
        )
    return chosen


def _episodes(root: Path, info: layout.Info) -> list[Mapping[str, Any]]:
    if info.version != "v3.0":
        return sorted(_json_lines(root / "meta/episodes.jsonl"), key=lambda row: int(row["episode_index"]))
    parquet = _parquet()
    found: list[Mapping[str, Any]] = []
    for file in sorted((root / "meta/episodes").glob("*/*.parquet")):
        try:
            names = parquet.read_schema(file).names
            table = parquet.read_table(file, columns=[name for name in names if not name.startswith("stats/")])
        except Exception as error:  # pyarrow's errors are of several kinds
            raise WorldloomError("a file of the dataset cannot be read", got=f"{file}: {error}") from error
        found += table.to_pylist()
    return sorted(found, key=lambda row: int(row["episode_index"]))


def _tasks(root: Path, info: layout.Info) -> dict[int, str]:
    if info.version != "v3.0":
        file = root / "meta/tasks.jsonl"
        return {int(row["task_index"]): str(row["task"]) for row in _json_lines(file)} if file.is_file() else {}
    file = root / layout.TASKS
    if not file.is_file():
        return {}
    table = _parquet().read_table(file)
    # The text is the index of a pandas table; one without a name is stored under a made-up one.
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise WorldloomError("meta/tasks.parquet lacks task or task_index", got=table.column_names)
    return dict(zip(table["task_index"].to_pylist(), map(str, table[text].to_pylist()), strict=True))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise WorldloomError("a file of the dataset cannot be read", got=f"{file}: {error}") from error


class _Rows:
    """The rows of episodes; keeps the last file it read, since the episodes of a file come one after another."""

    def __init__(self, root: Path, info: layout.Info, config: EpisodeConfig) -> None:
        self._root, self._info = root, info
        self._columns = ("episode_index", "frame_index", "task_index", layout.REWARD, layout.SUCCESS)
        self._columns += (config.action_key, config.state_key)
        self._last: tuple[Path | None, dict[str, np.ndarray]] = (None, {})

    def path(self, episode: Mapping[str, Any], index: int) -> Path:
        """The data file that holds an episode."""
        values = {"episode_index": index, "episode_chunk": index // self._info.chunks_size}
        if self._info.version == "v3.0":
            values = {
                "chunk_index": _whole(episode, "data/chunk_index"),
                "file_index": _whole(episode, "data/file_index"),
            }
        return layout.inside(self._root, layout.fill(self._info.data_path, **values))

    def of(self, path: Path, index: int) -> dict[str, np.ndarray]:
        """The columns of one episode, in the order of its frames."""
        if self._last[0] != path:
            self._last = (path, _read_columns(path, self._columns))
        columns = self._last[1]
        if "episode_index" not in columns or "frame_index" not in columns:
            raise WorldloomError("the data file lacks episode_index or frame_index", got=path.name)
        chosen = np.flatnonzero(columns["episode_index"].reshape(-1) == index)
        order = chosen[np.argsort(columns["frame_index"].reshape(-1)[chosen], kind="stable")]
        if not np.array_equal(columns["frame_index"].reshape(-1)[order], np.arange(len(order))) or not len(order):
            raise WorldloomError(
                "the rows of the episode are not frames 0, 1, 2, ...", got=f"episode {index} in {path}"
            )
        return {name: values[order] for name, values in columns.items()}


def _read_columns(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a parquet file as arrays ``(rows, size)``."""
    parquet = _parquet()
    try:
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in dict.fromkeys(wanted) if name in names])
    except Exception as error:  # pyarrow's errors are of several kinds
        raise WorldloomError("a data file cannot be read", got=f"{path}: {error}") from error
    return {name: matrix(table[name], name) for name in table.column_names}


def matrix(column: Any, name: str) -> np.ndarray:
    """A parquet column of numbers, or of lists of one length, as ``(rows, size)``.

    Raises:
        WorldloomError: lists of different lengths, missing values, or no numbers.
    """
    values = column.combine_chunks()
    rows = len(values)
    while hasattr(values, "storage"):
        values = values.storage
    while str(values.type).startswith(("list", "large_list", "fixed_size_list")):
        if values.null_count:
            raise WorldloomError("a column has missing values", got=name)
        lengths = {len(values.flatten()) / len(values)} if len(values) else {0.0}
        if not str(values.type).startswith("fixed_size_list"):
            lengths = set(np.diff(values.offsets.to_numpy()).tolist())
        if len(lengths) > 1:
            raise WorldloomError("the lists of a column have different lengths", got=name)
        values = values.flatten()
    if values.null_count:
        raise WorldloomError("a column has missing values", got=name)
    try:
        flat = np.asarray(values.to_numpy(zero_copy_only=False))
        flat = flat if flat.dtype.kind in "biuf" else flat.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise WorldloomError("a column does not hold numbers", got=name) from error
    return flat.reshape(rows, -1) if rows else flat.reshape(0, 1)


def _video(
    root: Path, info: layout.Info, episode: Mapping[str, Any], index: int, camera: str, rows: int
) -> tuple[Path, tuple[int, int] | None]:
    """The file with an episode's frames, and which of its frames they are."""
    if info.version != "v3.0":
        values: dict[str, str | int] = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        return layout.inside(root, layout.fill(info.video_path, video_key=camera, **values)), None
    key = f"videos/{camera}"
    chunk, file = _whole(episode, f"{key}/chunk_index"), _whole(episode, f"{key}/file_index")
    path = layout.inside(root, layout.fill(info.video_path, video_key=camera, chunk_index=chunk, file_index=file))
    try:
        begin, end = (float(episode[f"{key}/{side}_timestamp"]) for side in ("from", "to"))
    except (KeyError, TypeError, ValueError) as error:
        raise WorldloomError("the episode does not say where its video is", got=f"episode {index}") from error
    first, last = round(begin * info.fps), round(end * info.fps)
    if abs(last - first - rows) > 1 or first < 0:  # a frame more or less is how muxers round a duration
        raise WorldloomError(
            "the episode's rows do not fit its part of the video",
            got=f"{rows} rows for {begin:g} to {end:g} s at {info.fps:g} frames/s",
        )
    return path, (first, first + rows)


def _whole(episode: Mapping[str, Any], name: str) -> int:
    try:
        return int(episode[name])
    except (KeyError, TypeError, ValueError) as error:
        raise WorldloomError(f"meta/episodes lacks {name}", got=sorted(episode)) from error


def _task(episode: Mapping[str, Any], tasks: Mapping[int, str], columns: Mapping[str, np.ndarray]) -> str:
    """What was to be done, in words: the tasks of the episode in the order in which its rows take them up."""
    named = [str(task) for task in episode.get("tasks") or ()]
    if "task_index" in columns:
        order: list[int] = list(dict.fromkeys(columns["task_index"].reshape(-1).astype(int).tolist()))
        named = [tasks[number] for number in order if number in tasks] or named
    return "; ".join(named)


def _facts(info: layout.Info, config: EpisodeConfig, camera: str, index: int, task: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": f"lerobot {info.version}", "episode": index, "camera": camera, "task": task}
    if info.robot_type:
        facts["robot_type"] = info.robot_type
    for key, fact in ((config.action_key, "action_names"), (config.state_key, "state_names")):
        names = layout.names_of(info.features.get(key, {}))
        if names:
            facts[fact] = names
    return facts


def _arrays(config: EpisodeConfig, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a shard sample. The last row's action and reward belong to a step that was not recorded."""
    arrays: dict[str, np.ndarray] = {}
    if config.action_key in columns:
        arrays["actions"] = columns[config.action_key][:-1].astype(np.float32)
    if config.state_key in columns:
        arrays["state"] = columns[config.state_key].astype(np.float32)
    if layout.REWARD in columns:
        arrays["rewards"] = columns[layout.REWARD][:-1, 0].astype(np.float32)
    return arrays


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "curation") from error
    return parquet
