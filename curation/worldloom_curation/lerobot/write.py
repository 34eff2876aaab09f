"""`curate export --format lerobot`: a dataset of clips as a LeRobot v3.0 dataset.

Each clip is an episode; clips of several cameras that show the same episode become one episode with several videos.
Videos are packed into files without decoding or encoding a frame. ``meta/info.json`` is written last, so a folder that
has one is whole.

LeRobot has an action for every frame, our clips one fewer: the last row repeats the action before it, and its reward
is 0. Readers that follow our convention (`read`) drop that row's action.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.artifacts import atomic_file, atomic_write
from worldloom.decoding import DEFAULT_LIMITS, Reader, import_av
from worldloom.errors import WorldloomError, missing_extra
from worldloom.schema import Clip
from worldloom.shards import Dataset, ShardSample
from worldloom_curation.lerobot import layout
from worldloom_curation.robot import QUANTILES, Statistics

if TYPE_CHECKING:
    from typing_extensions import Self

_EPISODES_PER_FILE = 1000
_FRAMES_LOOKED_AT = 100  # of an episode, for the statistics of its pixels

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Episode:
    """What becomes one episode."""

    clips: Mapping[str, str]
    """Camera key -> clip id; all of the same frames."""
    clip: Clip
    """One of those clips."""
    task: str
    success: bool | None


@dataclass(frozen=True)
class WriteOptions:
    """How large files may become, and which camera is written."""

    camera: str = ""
    """Only clips of this camera; empty for all."""
    chunk_files: int = layout.CHUNK_FILES
    data_mb: float = layout.DATA_MB
    video_mb: float = layout.VIDEO_MB


def write_lerobot(
    dataset: Dataset, root: Path, options: WriteOptions, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Write all clips of a dataset; returns counts.

    Raises:
        WorldloomError: clips of different sizes, rates or sets of cameras, or with a video of no constant rate.
    """
    episodes = _plan(dataset, options.camera)
    cameras = list(episodes[0].clips)
    size, fps = _common(episodes)
    fields, left_out = _fields(dataset, episodes)
    features = _features(episodes[0].clip, dataset, episodes[0], fields, cameras, size)
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    rows = _RowWriter(root, features, options)
    videos = {camera: _VideoWriter(root, camera, fps, options) for camera in cameras}
    totals: dict[str, Any] = {}
    meta: list[dict[str, Any]] = []
    index = 0
    with contextlib.ExitStack() as open_files:
        for writer in (rows, *videos.values()):
            open_files.enter_context(writer)
        for number, episode in enumerate(episodes):
            record: dict[str, Any] = {"episode_index": number, "tasks": [episode.task], "length": episode.clip.frames}
            statistics: dict[str, Mapping[str, Any]] = {}
            columns: dict[str, np.ndarray] = {}
            for camera, key in episode.clips.items():
                sample = dataset.load(key)
                assert sample.video is not None, "a dataset of clips"
                if not columns:
                    columns = _columns(sample, number, index, fps, tasks.index(episode.task), fields, episode.success)
                    record |= rows.add(columns)
                record |= videos[camera].add(sample.video, sample.clip)
                pixels = _pixels(sample, root)
                totals[camera] = pixels if camera not in totals else totals[camera] + pixels
                statistics[camera] = _pixel_statistics(pixels, size)
            for name, values in columns.items():
                part, whole = Statistics(), totals.setdefault(name, Statistics())
                for gathered in (part, whole):
                    gathered.add(values.reshape(len(values), -1))
                statistics[name] = part.result()
            record |= {"dataset_from_index": index, "dataset_to_index": index + episode.clip.frames}
            for name, found in statistics.items():
                record |= {f"stats/{name}/{key}": _listed(value) for key, value in found.items()}
            index += episode.clip.frames
            meta.append(record)
            progress(number + 1, len(episodes), episode.clip.id)
    for camera, video in videos.items():
        features[camera]["info"] = video.info
    _write_episodes(root, meta, options)
    _write_tasks(root, tasks)
    summed = {
        name: _pixel_statistics(total, size) if isinstance(total, np.ndarray) else total.result()
        for name, total in totals.items()
    }
    listed = {name: {key: _listed(value) for key, value in values.items()} for name, values in summed.items()}
    atomic_write(root / layout.STATS, json.dumps(listed, indent=4))
    info = {
        "codebase_version": layout.VERSION,
        "robot_type": episodes[0].clip.metadata.get("robot_type"),
        "total_episodes": len(episodes),
        "total_frames": index,
        "total_tasks": len(tasks),
        "chunks_size": options.chunk_files,
        "data_files_size_in_mb": options.data_mb,
        "video_files_size_in_mb": options.video_mb,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": layout.DATA,
        "video_path": layout.VIDEO,
        "features": features,
    }
    atomic_write(root / layout.INFO, json.dumps(info, indent=4))
    return {
        "clips": sum(len(episode.clips) for episode in episodes),
        "episodes": len(episodes),
        "frames": index,
        "cameras": cameras,
        "data_files": rows.files,
        "video_files": sum(video.files for video in videos.values()),
        "left_out": left_out,
    }


def clips_of_camera(dataset: Dataset, camera: str) -> int:
    """How many clips `write_lerobot` must write."""
    return sum(not camera or camera_key(clip) == _key(camera) for clip in dataset.clips())


def camera_key(clip: Clip) -> str:
    """The feature that a clip's frames become."""
    return _key(str(clip.metadata.get("camera") or "main"))


def _key(camera: str) -> str:
    return camera if camera.startswith("observation.image") else layout.IMAGES + camera.replace("/", "_")


def _plan(dataset: Dataset, camera: str) -> list[Episode]:
    """The episodes, in the order of their first clips."""
    groups: dict[str, dict[str, list[Clip]]] = {}
    for clip in dataset.clips():
        key = camera_key(clip)
        if not camera or key == _key(camera):
            groups.setdefault(str(clip.metadata.get("episode_id") or clip.id), {}).setdefault(key, []).append(clip)
    if not groups:
        raise WorldloomError("the dataset has no clip of this camera", got=camera)
    keys = {tuple(sorted(cameras)) for cameras in groups.values()}
    episodes: list[Episode] = []
    for group in groups.values():
        parts = list(zip(*(group[key] for key in sorted(group)), strict=False))
        frames = [{clip.frames for clip in part} for part in parts]
        uneven = len({len(clips) for clips in group.values()}) > 1 or any(len(lengths) > 1 for lengths in frames)
        if len(keys) > 1 or uneven:
            raise WorldloomError(
                "an episode of a LeRobot dataset needs the same frames of every camera, and some clips lack theirs",
                got=sorted({key for cameras in groups.values() for key in cameras}),
                do="export one camera: --camera NAME",
            )
        for part in parts:
            first = part[0]
            success = first.metadata.get("success")
            episodes.append(
                Episode(
                    clips={camera_key(clip): clip.id for clip in part},
                    clip=first,
                    task=first.caption or str(first.metadata.get("task") or ""),
                    success=None if success is None else bool(success),
                )
            )
    return episodes


def _common(episodes: list[Episode]) -> tuple[tuple[int, int], int | float]:
    """``(h, w)`` and rate of all clips."""
    sizes = {(episode.clip.height, episode.clip.width) for episode in episodes}
    rates = {episode.clip.fps for episode in episodes}
    if len(sizes) > 1 or len(rates) > 1:
        raise WorldloomError(
            "a LeRobot dataset has frames of one size and one rate",
            got=f"sizes {sorted(sizes)}, rates {sorted(rates)}",
            do="curate sources of one size and rate together",
        )
    rate = rates.pop()
    return sizes.pop(), int(rate) if float(rate).is_integer() else rate


def _fields(dataset: Dataset, episodes: list[Episode]) -> tuple[list[str], list[str]]:
    """Which arrays every clip has, and what is left out of the LeRobot dataset, in words."""
    counts: dict[str, int] = {}
    for episode in episodes:
        for extension in dataset.sizes(episode.clip.id):
            if extension not in ("json", "mp4"):
                name = extension.partition(".")[0]
                counts[name] = counts.get(name, 0) + 1
    fields = [name for name in ("actions", "state", "rewards") if counts.get(name) == len(episodes)]
    left_out = [
        f"{name} of {count} of {len(episodes)} episodes" for name, count in sorted(counts.items()) if name not in fields
    ]
    known = sum(episode.success is not None for episode in episodes)
    if known == len(episodes):
        fields.append("success")
    elif known:
        left_out.append(f"success of {known} of {len(episodes)} episodes")
    return fields, left_out


def _features(
    clip: Clip, dataset: Dataset, first: Episode, fields: list[str], cameras: list[str], size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    arrays = dataset.load(first.clip.id).arrays
    for name, key, names in (
        ("actions", layout.ACTION, clip.metadata.get("action_names")),
        ("state", layout.STATE, clip.metadata.get("state_names")),
    ):
        if name in fields:
            width = int(arrays[name].shape[1])
            named = [str(item) for item in names] if names and len(names) == width else None
            features[key] = {"dtype": "float32", "shape": [width], "names": named}
    for camera in cameras:
        features[camera] = {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
    if "rewards" in fields:
        features[layout.REWARD] = {"dtype": "float32", "shape": [1], "names": None}
    features[layout.DONE] = {"dtype": "bool", "shape": [1], "names": None}
    if "success" in fields:
        features[layout.SUCCESS] = {"dtype": "bool", "shape": [1], "names": None}
    return features | {name: dict(feature) for name, feature in layout.ROW_FEATURES.items()}


def _columns(
    sample: ShardSample, number: int, index: int, fps: float, task: int, fields: list[str], success: bool | None
) -> dict[str, np.ndarray]:
    """The rows of an episode, one per frame, by feature."""
    frames = sample.clip.frames
    columns: dict[str, np.ndarray] = {}
    if "actions" in fields:
        actions = sample.arrays["actions"]
        last = actions[-1:] if len(actions) else np.zeros((1, actions.shape[1]), np.float32)
        columns[layout.ACTION] = np.concatenate([actions, last])
    if "state" in fields:
        columns[layout.STATE] = sample.arrays["state"]
    if "rewards" in fields:
        columns[layout.REWARD] = np.append(sample.arrays["rewards"], np.float32(0))
    end = np.arange(frames) == frames - 1
    columns[layout.DONE] = end
    if "success" in fields:
        columns[layout.SUCCESS] = end & bool(success)
    columns["timestamp"] = (np.arange(frames) / fps).astype(np.float32)
    columns["frame_index"] = np.arange(frames)
    columns["episode_index"] = np.full(frames, number)
    columns["index"] = np.arange(index, index + frames)
    columns["task_index"] = np.full(frames, task)
    return columns


class _Files:
    """Numbered files of one kind, one open at a time; a file appears under its name only when it is whole."""

    def __init__(self, root: Path, template: str, options: WriteOptions) -> None:
        self._root, self._template, self._options = root, template, options
        self._whole: contextlib.ExitStack | None = None
        self.files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        if self._whole is not None and kind is not None:
            self._close_writer()
            self._whole.__exit__(kind, *exc)
        elif self._whole is not None:
            self.finish()

    def begin(self, **names: str) -> Path:
        """The temporary name of the next file."""
        chunk, file = self.place
        path = self._root / layout.fill(self._template, chunk_index=chunk, file_index=file, **names)
        self._whole = contextlib.ExitStack()
        return self._whole.enter_context(atomic_file(path))

    def finish(self) -> None:
        """Close the file and give it its name."""
        assert self._whole is not None
        self._close_writer()
        self._whole.close()
        self._whole = None
        self.files += 1

    def _close_writer(self) -> None:
        raise NotImplementedError

    @property
    def place(self) -> tuple[int, int]:
        """(chunk, file) of the file that is being written."""
        return divmod(self.files, self._options.chunk_files)


class _RowWriter(_Files):
    """Packs rows into parquet files, a row group per episode."""

    def __init__(self, root: Path, features: Mapping[str, Mapping[str, Any]], options: WriteOptions) -> None:
        super().__init__(root, layout.DATA, options)
        pa, _ = _pyarrow()
        self._schema = pa.schema(
            [(name, _arrow(feature)) for name, feature in features.items() if feature["dtype"] != "video"]
        )
        self._bytes = 0
        self._writer: Any = None

    def add(self, columns: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Append an episode; returns where it is."""
        pa, parquet = _pyarrow()
        arrays = []
        for field in self._schema:
            values = np.ascontiguousarray(columns[field.name])
            flat = pa.array(values.reshape(-1))
            if pa.types.is_fixed_size_list(field.type):
                flat = pa.FixedSizeListArray.from_arrays(flat, field.type.list_size)
            arrays.append(flat.cast(field.type))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        if self._writer is not None and self._bytes + table.nbytes > self._options.data_mb * 2**20:
            self.finish()
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self.begin(), self._schema, compression="snappy")
        self._writer.write_table(table)
        self._bytes += table.nbytes
        chunk, file = self.place
        return {"data/chunk_index": chunk, "data/file_index": file}

    def _close_writer(self) -> None:
        self._writer.close()
        self._writer, self._bytes = None, 0


class _VideoWriter(_Files):
    """Packs the videos of one camera into mp4 files, packet by packet, at one constant rate.

    A video whose codec parameters differ from those before it begins a file of its own.
    """

    def __init__(self, root: Path, camera: str, fps: float, options: WriteOptions) -> None:
        super().__init__(root, layout.VIDEO, options)
        self._camera, self._rate = camera, Fraction(fps).limit_denominator(65536)
        self._output: tuple[Any, Any] | None = None
        self._signature: Any = None
        self._bytes = self._frames = 0
        self.info: dict[str, Any] = {}
        """The ``info`` of the feature, once there is a video."""

    def add(self, video: bytes, clip: Clip) -> dict[str, Any]:
        """Append an episode; returns where it is."""
        with Reader(video, DEFAULT_LIMITS) as reader:
            stream = reader.stream
            context = stream.codec_context
            signature = (context.name, context.extradata, context.width, context.height, context.pix_fmt)
            signature += (stream.time_base,)
            full = self._bytes + len(video) > self._options.video_mb * 2**20
            if self._output is not None and (full or signature != self._signature):
                self.finish()
            output, out = self._output or self._start(stream, signature)
            packets = [packet for packet in reader.container.demux(stream) if packet.dts is not None]
            ticks = self._ticks(packets, stream, clip)
            first = min(packet.pts for packet in packets)
            for packet in packets:
                packet.pts += self._frames * ticks - first
                packet.dts += self._frames * ticks - first
                packet.stream = out
                output.mux(packet)
        chunk, file = self.place
        begin, self._frames = self._frames, self._frames + clip.frames
        self._bytes += len(video)
        key = f"videos/{self._camera}"
        return {
            f"{key}/chunk_index": chunk,
            f"{key}/file_index": file,
            f"{key}/from_timestamp": float(begin / self._rate),
            f"{key}/to_timestamp": float(self._frames / self._rate),
        }

    def _start(self, stream: Any, signature: Any) -> tuple[Any, Any]:
        """Begin a file: its container and stream."""
        made = self.begin(video_key=self._camera)
        output = import_av().open(str(made), "w", format="mp4", container_options={"fflags": "+bitexact"})
        out = output.add_stream_from_template(stream)
        out.time_base = stream.time_base
        self._output, self._signature = (output, out), signature
        rate = float(self._rate)
        self.info = self.info or {
            "video.height": stream.codec_context.height,
            "video.width": stream.codec_context.width,
            "video.codec": stream.codec_context.codec.canonical_name,
            "video.pix_fmt": stream.codec_context.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": int(rate) if rate.is_integer() else rate,
            "video.channels": 3,
            "has_audio": False,
        }
        return output, out

    def _close_writer(self) -> None:
        assert self._output is not None
        self._output[0].close()
        self._output, self._signature = None, None
        self._bytes = self._frames = 0

    def _ticks(self, packets: list[Any], stream: Any, clip: Clip) -> int:
        """Time stamps per frame."""
        ticks = 1 / self._rate / stream.time_base
        times = sorted(packet.pts for packet in packets)
        even = ticks.denominator == 1 and all(b - a == ticks for a, b in itertools.pairwise(times))
        if len(times) != clip.frames or not even:
            raise WorldloomError(
                "a clip's video does not have a frame for every step of its rate",
                got=f"{clip.id}: {len(times)} packets for {clip.frames} frames at {float(self._rate):g} frames/s",
                do="make the clips with worldloom curate run",
            )
        return int(ticks)


def _pixels(sample: ShardSample, root: Path) -> np.ndarray:
    """How often each level occurs in each channel of frames spread evenly over a clip: int64 ``(3, 256)``.

    Kept beside the export, so that one that was interrupted does not decode again.
    """
    kept = root / ".worldloom" / f"{sample.clip.id}.npy"
    try:
        counts = np.load(kept, allow_pickle=False)
        if counts.shape == (3, 256):
            return counts
    except (OSError, ValueError):
        pass
    every = -(-sample.clip.frames // _FRAMES_LOOKED_AT)
    counts = np.zeros((3, 256), np.int64)
    assert sample.video is not None
    for frame in media.iter_frames(sample.video, stride=every):
        for channel in range(3):
            counts[channel] += np.bincount(frame[..., channel].reshape(-1), minlength=256)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(kept) as made, open(made, "wb") as file:
        np.save(file, counts)
    return counts


def _pixel_statistics(counts: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Statistics of levels in [0, 1] per channel, each ``(3, 1, 1)``; ``count`` is that of the frames looked at."""
    levels = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = (counts @ levels) / total
    std = np.sqrt(np.maximum((counts @ levels**2) / total - mean**2, 0))
    below = counts.cumsum(axis=1)
    found = {"mean": mean, "std": std}
    found["min"] = np.array([levels[np.flatnonzero(row)[0]] for row in counts])
    found["max"] = np.array([levels[np.flatnonzero(row)[-1]] for row in counts])
    for name, share in QUANTILES.items():
        found[name] = np.array([levels[int(np.searchsorted(row, share * row[-1]))] for row in below])
    return {
        "count": int(total[0]) // (size[0] * size[1]),
        **{name: value.reshape(3, 1, 1) for name, value in found.items()},
    }


def _listed(value: Any) -> Any:
    """A statistic as lists; a count as a list of one."""
    return value.tolist() if isinstance(value, np.ndarray) else [value]


def _write_episodes(root: Path, meta: list[dict[str, Any]], options: WriteOptions) -> None:
    pa, parquet = _pyarrow()
    for number, start in enumerate(range(0, len(meta), _EPISODES_PER_FILE)):
        chunk, file = divmod(number, options.chunk_files)
        part = [
            {**record, "meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            for record in meta[start : start + _EPISODES_PER_FILE]
        ]
        path = root / layout.fill(layout.EPISODES, chunk_index=chunk, file_index=file)
        with atomic_file(path) as made:
            parquet.write_table(pa.Table.from_pylist(part), made, compression="snappy")


def _write_tasks(root: Path, tasks: list[str]) -> None:
    """``meta/tasks.parquet``: a pandas table whose index is the text of the task."""
    pa, parquet = _pyarrow()

    def column(name: str, kind: str, numpy_type: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        ],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.0.0",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)})
    table = pa.table({"task_index": list(range(len(tasks))), "task": tasks}, schema=schema)
    with atomic_file(root / layout.TASKS) as made:
        parquet.write_table(table, made, compression="snappy")


def _arrow(feature: Mapping[str, Any]) -> Any:
    pa, _ = _pyarrow()
    kind = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}[feature["dtype"]]
    return kind if feature["shape"] == [1] else pa.list_(kind, feature["shape"][0])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "curation") from error
    return pyarrow, parquet
