"""`worldloom curate record`: play episodes of a Gymnasium environment and keep them as a dataset.

One episode is one sample of the dataset form of `worldloom.shards`: lossless video, actions, rewards, and depth and
segmentation where the simulator has them. The frame after reset is frame 0 and ``actions[t]`` leads from frame t to
t+1. Episode e is played with seed ``seed + e`` and owes nothing to the episodes before it, so equal parameters give
equal bytes, and a recording that was stopped goes on with the first episode that is not on disk.

While it runs, finished episodes lie in ``out/.episodes``; when all are there they are joined into shards and
``dataset.json`` is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from worldloom import config as configs
from worldloom import media
from worldloom.artifacts import Store, atomic_write
from worldloom.errors import WorldloomError
from worldloom.progress import progress
from worldloom.schema import Clip, clip_id
from worldloom.shards import (
    DatasetIndex,
    ShardSample,
    ShardWriter,
    commit_dataset,
    open_dataset,
    read_members,
    scan_shard,
)

if TYPE_CHECKING:
    from worldloom_curation.simulators import Simulator, View

Policy = Literal["random", "sticky"]


@dataclass(frozen=True)
class RecordConfig:
    """Everything that decides what a recording contains."""

    env_id: str
    """Gymnasium id of the environment."""
    episodes: int
    """Number of episodes; each becomes one sample."""
    seed: int = 0
    """Seed of the first episode; episode e uses seed + e."""
    size: tuple[int, int] | None = None
    """(height, width) of the stored frames; unset keeps the simulator's own."""
    max_steps: int = 200
    """An episode is stopped after this many actions."""
    frame_skip: int | None = None
    """Simulator frames per action; unset keeps the environment's own."""
    policy: Policy = "sticky"
    """`random` draws a new action every step, `sticky` holds each drawn action for a while."""
    hold: float = 4.0
    """Mean number of steps for which `sticky` holds an action (geometric)."""
    depth: bool = True
    """Keep depth where the simulator has it."""
    segmentation: bool = True
    """Keep segmentation where the simulator has it."""
    samples_per_shard: int = 64
    """Episodes per shard."""
    captions: tuple[str, ...] = ()
    """What the episodes show, in words; episode e takes number e modulo how many there are."""


def record(
    env_id: str,
    episodes: int,
    out: str | Path,
    *,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    max_steps: int = 200,
    frame_skip: int | None = None,
    policy: Policy = "sticky",
    hold: float = 4.0,
    depth: bool = True,
    segmentation: bool = True,
    samples_per_shard: int = 64,
    captions: Sequence[str] = (),
    store: Store | None = None,
    quiet: bool = False,
) -> DatasetIndex:
    """Record episodes into the dataset folder `out`; the arguments are the fields of `RecordConfig`.

    Frames are stretched to `size` by area averaging; depth and segmentation take the nearest pixel, for a mean of two
    distances or two classes is neither.

    Args:
        store: where the dataset's record goes; None for the default store.
        quiet: show no progress on stderr.

    Raises:
        WorldloomError: an impossible parameter, an environment that cannot be made or rendered, or a folder that holds
            a recording with other parameters, or something else.
    """
    given = (env_id, episodes, seed, size, max_steps, frame_skip, policy, hold, depth, segmentation, samples_per_shard)
    config = RecordConfig(*given, tuple(captions))
    _check(config)
    out = Path(out)
    if _is_complete(out, config):
        shutil.rmtree(out / ".episodes", ignore_errors=True)
        return open_dataset(out).index
    started, done_before = time.monotonic(), sum(1 for e in range(episodes) if _part(out, e).is_file())
    frames = _play(config, out, quiet)
    with ShardWriter(out, "clips", samples_per_shard) as writer:
        for episode in range(episodes):
            for key, members in read_members(_part(out, episode)):
                writer.write_members(key, members)
    last = scan_clip(_part(out, episodes - 1))
    shared = ("env_id", "action_names", "action_space", "policy", "hold", "depth_unit", "segmentation_classes")
    index = commit_dataset(
        out,
        writer.shards,
        inputs=[f"env:{env_id}#seed={seed}"],
        config=configs.to_dict(config),
        seed=seed,
        metadata={key: last.metadata[key] for key in shared if key in last.metadata},
        store=store,
    )
    seconds = time.monotonic() - started
    summary = {
        "id": index.id,
        "env_id": env_id,
        "episodes": index.samples,
        "episodes_resumed": done_before,
        "frames": index.frames,
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 1),
        "bytes": sum(shard.bytes for shard in index.shards),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(out / ".episodes", ignore_errors=True)
    return index


def scan_clip(part: Path) -> Clip:
    """The clip of a finished episode."""
    (entry,) = scan_shard(part)
    with open(part, "rb") as file:
        return entry.read_clip(file)


def _play(config: RecordConfig, out: Path, quiet: bool) -> int:
    """Play the episodes that are not on disk; returns the number of frames played."""
    missing = [episode for episode in range(config.episodes) if not _part(out, episode).is_file()]
    if not missing:
        return 0
    from worldloom_curation.simulators import Simulator

    frames = 0
    with (
        Simulator(
            config.env_id, frame_skip=config.frame_skip, depth=config.depth, segmentation=config.segmentation
        ) as simulator,
        progress(f"recording {config.env_id}", quiet=quiet) as report,
    ):
        configs.save(config, out / "config.toml")
        started = time.monotonic()
        for episode in missing:
            if episode:
                # Class numbers are given out in order of appearance, over all episodes.
                before = scan_clip(_part(out, episode - 1)).metadata
                simulator.classes = list(before.get("segmentation_classes", ["background"]))
                if before["packages"] != simulator.packages:
                    raise WorldloomError(
                        "this recording was begun with other package versions",
                        got=f"{before['packages']}, now {simulator.packages}",
                        do="install those, or record into a new folder",
                    )
            sample = play_episode(simulator, config, episode)
            with ShardWriter(out / ".episodes", "clips", 1, first_shard=episode) as writer:
                writer.write(sample)
            frames += sample.clip.frames
            report(episode + 1, config.episodes, f"{frames / (time.monotonic() - started):.0f} frames/s")
    return frames


def play_episode(simulator: Simulator, config: RecordConfig, episode: int) -> ShardSample:
    """Play one episode and pack it. Depends on the simulator's classes, the config and the episode's number only."""
    seed = config.seed + episode
    rng = np.random.default_rng(seed)
    views, actions, rewards = [simulator.reset(seed)], [], []
    source_size = views[0].frame.shape[:2]
    views[0] = _shrink(views[0], config.size)
    terminated = truncated = False
    last_reward = None
    action, vector, left = None, np.zeros(0, np.float32), 0
    from worldloom_curation.simulators import encode_action, sample_action

    while len(actions) < config.max_steps and not (terminated or truncated):
        if left == 0:
            action = sample_action(simulator.space, rng)
            vector = encode_action(simulator.space, action)
            left = int(rng.geometric(1 / config.hold)) if config.policy == "sticky" else 1
        left -= 1
        view, reward, terminated, truncated = simulator.step(action)
        if view is None:
            # No picture of the last state: its frame, and the action that led to it, are dropped.
            last_reward = reward
            break
        views.append(_shrink(view, config.size))
        actions.append(vector)
        rewards.append(reward)
    frames = np.stack([view.frame for view in views])
    arrays = {
        "actions": np.array(actions, np.float32).reshape(len(actions), len(simulator.action_names)),
        "rewards": np.array(rewards, np.float32),
    }
    depths, segmentations = [v.depth for v in views], [v.segmentation for v in views]
    if depths[0] is not None:
        arrays["depth"] = np.stack([d for d in depths if d is not None])
    if segmentations[0] is not None:
        arrays["segmentation"] = np.stack([s for s in segmentations if s is not None])
    metadata: dict[str, Any] = {
        "env_id": config.env_id,
        "seed": seed,
        "episode": episode,
        "action_names": simulator.action_names,
        "action_space": str(simulator.space),
        "policy": config.policy,
        "hold": config.hold if config.policy == "sticky" else 1.0,
        "frame_skip": config.frame_skip,
        "terminated": terminated,
        "truncated": truncated or not terminated,
        "source_size": list(source_size),
        "packages": simulator.packages,
    }
    if last_reward is not None:
        metadata["dropped_final_reward"] = last_reward
    if "depth" in arrays:
        metadata["depth_unit"] = simulator.depth_unit
    if "segmentation" in arrays:
        metadata["segmentation_classes"] = list(simulator.classes)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(frames.tobytes())
    digest.update(arrays["actions"].tobytes())
    source_digest, count = digest.hexdigest(), len(frames)
    clip = Clip(
        id=clip_id(source_digest, 0, count),
        source=f"env:{config.env_id}#seed={seed}",
        source_digest=source_digest,
        start=0,
        end=count,
        fps=simulator.fps,
        width=frames.shape[2],
        height=frames.shape[1],
        caption=config.captions[episode % len(config.captions)] if config.captions else "",
        action_dim=len(simulator.action_names),
        metadata=metadata,
    )
    return ShardSample(clip, media.write_video(None, frames, simulator.fps, lossless=True), arrays)


def _shrink(view: View, size: tuple[int, int] | None) -> View:
    if size is None:
        return type(view)(np.array(view.frame), view.depth, view.segmentation)
    return type(view)(media.resize(view.frame, size), _nearest(view.depth, size), _nearest(view.segmentation, size))


def _nearest(image: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    if image is None:
        return None
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for m, n in zip(size, image.shape, strict=True))
    return image[rows[:, None], columns]


def _part(out: Path, episode: int) -> Path:
    return out / ".episodes" / "shards" / f"{episode:06d}.tar"


def _check(config: RecordConfig) -> None:
    if config.episodes < 1 or config.max_steps < 1 or config.samples_per_shard < 1 or config.seed < 0:
        raise WorldloomError(
            "episodes, max_steps and samples_per_shard must be at least 1, seed at least 0", got=config
        )
    if config.policy not in ("random", "sticky"):
        raise WorldloomError("the policy is random or sticky", got=config.policy)
    if not 1 <= config.hold < 1e6:
        raise WorldloomError("hold must be at least 1", got=config.hold)
    if config.size is not None and not (len(config.size) == 2 and all(1 <= side <= 4096 for side in config.size)):
        raise WorldloomError("size is (height, width), each from 1 to 4096", got=config.size)


def _is_complete(out: Path, config: RecordConfig) -> bool:
    """True if `out` holds this whole recording; False if it may be begun or gone on with."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise WorldloomError("the output is not a folder", got=out)
    file = out / "config.toml"
    if not file.is_file():
        if any(not item.name.startswith(".") for item in out.iterdir()):
            raise WorldloomError("the output folder holds something else", got=out, do="give a new or empty folder")
        return False
    try:
        before = configs.load(RecordConfig, file)
    except WorldloomError as error:
        raise WorldloomError("the output folder holds something else", got=file, do="give a new folder") from error
    old, new = asdict(before), asdict(config)
    changed = [f"{key} = {new[key]!r} (there: {old[key]!r})" for key in new if new[key] != old[key]]
    if changed:
        raise WorldloomError(
            "the output folder holds a recording with other parameters",
            got=", ".join(changed),
            do=f"use the same parameters to go on with {out}, or record into a new folder",
        )
    return (out / "dataset.json").is_file()


def _parse_size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not x or not height.isdigit() or not width.isdigit():
        raise WorldloomError("a size is written HEIGHTxWIDTH", got=text, do="for example: --size 64x64")
    return int(height), int(width)


@click.command("record")
@click.option("--env", "env_id", required=True, metavar="ENV_ID", help="Gymnasium id, e.g. VizdoomBasic-v1.")
@click.option("--episodes", required=True, type=click.IntRange(1), help="How many episodes; each becomes one sample.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Dataset folder; run again to resume.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Episode e is played with seed + e.")
@click.option("--size", metavar="HxW", help="Size of the stored frames; without it, the simulator's own.")
@click.option("--steps", "max_steps", default=200, show_default=True, type=click.IntRange(1), help="Actions at most.")
@click.option("--frame-skip", type=click.IntRange(1), help="Simulator frames per action.")
@click.option("--policy", default="sticky", show_default=True, type=click.Choice(["sticky", "random"]))
@click.option("--hold", default=4.0, show_default=True, help="Mean steps for which sticky holds an action.")
@click.option("--depth/--no-depth", default=True, show_default=True, help="Keep depth where there is any.")
@click.option("--segmentation/--no-segmentation", default=True, show_default=True, help="Keep it where there is any.")
@click.option("--samples-per-shard", default=64, show_default=True, type=click.IntRange(1), help="Episodes per tar.")
@click.option("--caption", "captions", multiple=True, help="What is seen, in words; given again, episodes take turns.")
def record_command(out: Path, size: str | None, **options: Any) -> None:
    """Record episodes of a Gymnasium environment, with actions, into a dataset."""
    index = record(out=out, size=_parse_size(size) if size else None, **options)
    total = sum(shard.bytes for shard in index.shards) / 2**20
    height, width = index.size or (0, 0)
    click.echo(
        f"{index.samples} episodes, {index.frames} frames of {width}x{height}, "
        f"{index.action_dim} actions, {total:.1f} MiB: {out}  ({index.id})"
    )
