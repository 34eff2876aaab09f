"""Small robot episodes with known faults, and LeRobot datasets of them, written here by hand from the public format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

FPS = 20
NAMES = ["shoulder", "elbow"]


@dataclass(frozen=True)
class RobotEpisode:
    """T frames, the state at each, and the action taken at each (one per frame: the last leads nowhere)."""

    frames: np.ndarray
    actions: np.ndarray
    state: np.ndarray
    task: str = "Push the block."
    success: bool | None = None
    rewards: np.ndarray | None = field(default=None)


def episode(
    seed: int, frames: int = 120, *, kind: str = "relative", idle: Sequence[tuple[int, int]] = (), noise: float = 0.2
) -> RobotEpisode:
    """A bright block that two joints push about on a textured ground, with pauses of random length.

    Args:
        kind: ``relative``: actions are velocities. ``absolute``: they are the next position.
        idle: ``[start, end)`` of frames in which nothing is done.
        noise: grey levels of noise in the picture (standard deviation), as a camera has it.
    """
    rng = np.random.default_rng(seed)
    velocity = np.zeros((frames, 2))
    at = 0
    while at < frames:
        length = int(rng.integers(4, 12))
        velocity[at : at + length] = rng.uniform(-3, 3, 2) if rng.random() < 0.7 else 0.0
        at += length
    for start, end in idle:
        velocity[start:end] = 0
    place = np.concatenate([np.zeros((1, 2)), velocity[:-1].cumsum(axis=0)])
    target = np.concatenate([place[1:], place[-1:]])
    actions = velocity if kind == "relative" else target
    return RobotEpisode(_render(place, rng, noise), actions.astype(np.float32), place.astype(np.float32))


def _render(place: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    height, width, side = 48, 64, 14
    ground = rng.uniform(40, 90, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    block = rng.uniform(120, 250, (side, side, 3))
    pictures = []
    for y, x in np.rint(place).astype(int):
        picture = ground.copy()
        rows, columns = (np.arange(side) + 17 + y) % height, (np.arange(side) + 25 + x) % width
        picture[np.ix_(rows, columns)] = block
        pictures.append(picture + rng.normal(0, noise, picture.shape))
    return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)


def delayed(made: RobotEpisode, by: int) -> RobotEpisode:
    """The same episode with a log whose actions and state are written down `by` frames late (early if negative)."""
    shift = np.clip(np.arange(len(made.actions)) - by, 0, len(made.actions) - 1)
    return replace(made, actions=made.actions[shift], state=made.state[shift])


def encode(path: Path, parts: Sequence[np.ndarray], *, fps: int = FPS, b_frames: int = 0) -> None:
    """All the frames of some episodes as one H.264 file, as LeRobot makes them: every second frame is a keyframe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "12", "bf": str(b_frames), "g": "2" if not b_frames else "12"}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = parts[0].shape[1], parts[0].shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frames in parts:
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_lerobot_dataset(
    root: Path,
    episodes: Sequence[RobotEpisode],
    version: str = "v3.0",
    cameras: Sequence[str] = ("observation.images.top",),
    per_file: int = 2,
) -> Path:
    """A LeRobot dataset; of several cameras, each after the first sees its pictures mirrored.

    Args:
        per_file: episodes in one file, v3.0 only.
    """
    (root / "meta").mkdir(parents=True)
    tasks = list(dict.fromkeys(made.task for made in episodes))
    size = list(episodes[0].frames.shape[1:])
    features: dict[str, Any] = {
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": NAMES}},
        "observation.state": {"dtype": "float32", "shape": [2], "names": NAMES},
        **{key: {"dtype": "video", "shape": size, "names": ["height", "width", "channels"]} for key in cameras},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index")},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    new = version == "v3.0"
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(episodes),
        "total_frames": sum(len(made.frames) for made in episodes),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if new
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if new
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    tables = [_table(made, number, tasks.index(made.task)) for number, made in enumerate(episodes)]
    mirrored = [[made.frames[:, :, :: -1 if i else 1] for made in episodes] for i in range(len(cameras))]
    if new:
        _write_v3(root, episodes, tables, mirrored, cameras, tasks, per_file)
    else:
        for number, table in enumerate(tables):
            _save(table, root / info["data_path"].format(episode_chunk=0, episode_index=number))
            for camera, pictures in zip(cameras, mirrored, strict=True):
                place = info["video_path"].format(episode_chunk=0, episode_index=number, video_key=camera)
                encode(root / place, [pictures[number]])
        rows = [{"episode_index": i, "tasks": [e.task], "length": len(e.frames)} for i, e in enumerate(episodes)]
        _lines(root / "meta/episodes.jsonl", rows)
        _lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def _write_v3(
    root: Path,
    episodes: Sequence[RobotEpisode],
    tables: Sequence[pa.Table],
    mirrored: Sequence[Sequence[np.ndarray]],
    cameras: Sequence[str],
    tasks: Sequence[str],
    per_file: int,
) -> None:
    rows: list[dict[str, Any]] = []
    for file, start in enumerate(range(0, len(episodes), per_file)):
        chosen = range(start, min(start + per_file, len(episodes)))
        _save(pa.concat_tables([tables[i] for i in chosen]), root / f"data/chunk-000/file-{file:03d}.parquet")
        for camera, pictures in zip(cameras, mirrored, strict=True):
            encode(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4", [pictures[i] for i in chosen])
        begin = 0
        for i in chosen:
            length = len(episodes[i].frames)
            row: dict[str, Any] = {
                "episode_index": i,
                "tasks": [episodes[i].task],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "stats/action/max": episodes[i].actions.max(axis=0).tolist(),
            }
            for camera in cameras:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                row |= {f"videos/{camera}/from_timestamp": begin / FPS}
                row |= {f"videos/{camera}/to_timestamp": (begin + length) / FPS}
            rows.append(row)
            begin += length
    _save(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    table = pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": list(tasks)})
    _save(table, root / "meta/tasks.parquet")


def _table(made: RobotEpisode, number: int, task: int) -> pa.Table:
    count = len(made.frames)
    columns: dict[str, Any] = {
        "action": pa.array(made.actions.tolist(), pa.list_(pa.float32())),
        "observation.state": pa.array(made.state.tolist(), pa.list_(pa.float32(), 2)),
        "timestamp": pa.array(np.arange(count, dtype=np.float32) / FPS),
        "frame_index": np.arange(count),
        "episode_index": np.full(count, number),
        "index": np.arange(count) + 1000 * number,
        "task_index": np.full(count, task),
    }
    if made.success is not None:
        columns["next.success"] = (np.arange(count) == count - 1) & made.success
    if made.rewards is not None:
        columns["next.reward"] = made.rewards
    return pa.table(columns)


def _save(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
