"""Tiny datasets and runs for the tests of training; run as a script, it trains in forked processes and kills them.

Importing torch, Lightning and DeepSpeed takes seconds; a script that imports them once and forks gives every run a
process of its own, at an instant's cost, and can kill it like `kill -9` does.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom import media, shards
from worldloom.schema import Clip, clip_id

RATIO, CHANNELS = 4, 16


def make_latents(
    root: Path,
    samples: int = 12,
    t: int = 3,
    actions: int = 2,
    seed: int = 0,
    fingerprint: str = "f" * 64,
    tokenizer: str = "absent-tokenizer",
) -> Path:
    """A latents dataset whose frames follow their actions: the second half of each is a function of the first."""
    rng = np.random.default_rng(seed)
    frames = 1 + RATIO * (t - 1)
    with shards.ShardWriter(root, kind="latents") as writer:
        for i in range(samples):
            source = f"{seed:032d}{i:032d}"
            acts = rng.integers(-1, 2, (frames - 1, max(actions, 1))).astype(np.float32)
            latents = np.empty((CHANNELS, t, 4, 4), np.float16)
            latents[:, 0] = rng.standard_normal((CHANNELS, 4, 4))
            for k in range(1, t):
                latents[:, k] = 0.5 * latents[:, k - 1] + acts[RATIO * (k - 1) : RATIO * k].mean()
            clip = Clip(clip_id(source, 0, frames), f"e{i}.mp4", source, 0, frames, 10.0, 32, 32, action_dim=actions)
            arrays = {"latents": latents, "actions": acts} if actions else {"latents": latents}
            writer.write(shards.ShardSample(clip, None, arrays))
        refs = writer.close()
    reference = {"name": tokenizer, "fingerprint": fingerprint, "temporal_ratio": RATIO, "spatial_ratio": 8}
    shards.commit_dataset(root, refs, kind="latents", tokenizer=reference, inputs=["file:0:none"])
    return root


def make_clips(root: Path, samples: int = 6, frames: int = 17, size: int = 32, seed: int = 0) -> Path:
    """Clips of a square that two-dimensional actions push about."""
    rng = np.random.default_rng(seed)
    with shards.ShardWriter(root, kind="clips") as writer:
        for i in range(samples):
            acts = rng.integers(-1, 2, (frames - 1, 2)).astype(np.float32)
            places = (size // 2 + 2 * np.concatenate([np.zeros((1, 2)), np.cumsum(acts, 0)])).astype(int) % (size - 6)
            video = np.full((frames, size, size, 3), 40, np.uint8)
            for frame, (y, x) in zip(video, places, strict=True):
                frame[y : y + 6, x : x + 6] = (220, 200 - 10 * i, 30)
            source = f"{seed:032d}{i:032d}"
            clip = Clip(clip_id(source, 0, frames), f"e{i}.mp4", source, 0, frames, 10.0, size, size, action_dim=2)
            data = media.write_video(None, video, 10, lossless=True)
            writer.write(shards.ShardSample(clip, data, {"actions": acts}))
        refs = writer.close()
    shards.commit_dataset(root, refs, kind="clips", inputs=["file:0:none"])
    return root


def curve(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad norm) of every recorded step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


SMALL = (
    "data.batch_size=2",
    "data.frames=0",
    "data.val_fraction=0.2",
    "data.val_batches=1",
    "optim.lr=0.01",
    "optim.warmup_steps=2",
    "trainer.val_every=5",
    "trainer.checkpoint_every=3",
    "trainer.export_dtype=float32",
    "tracking.enabled=false",
)
"""Settings of a run of a few steps whose weights move."""


def trained_by(runs: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """Train in forked processes of one script; each run is ``{recipe, model, out, data, set, world, kills, seed}``.

    Returns:
        For each run ``{"killed": how often, "finished_early": ...}``.
    """
    job = scratch / f"runs-{time.monotonic_ns()}.json"
    job.write_text(json.dumps([{"kills": 0, "seed": 0, "world": 1, **run} for run in runs], default=str))
    done = subprocess.run([sys.executable, __file__, str(job)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _child(run: dict[str, Any], rank: int, port: int) -> None:
    from worldloom_finetune import train

    if run["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["world"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    recipe = run.get("recipe", "world")
    own = ("objective.pixel_weighting=0",) if recipe == "world" else ()
    config = train.load_config(recipe, None, (*SMALL, *own, *run["set"], f"trainer.devices={run['world']}"))
    request = train.Request(
        recipe, run["data"], run.get("model", "predict/tiny"), run["out"], command="a test", quiet=True
    )
    train.fit(request, config)


def _attempt(run: dict[str, Any], kill_after: float | None, *, after_progress: bool = False) -> str:
    """Train once; ``done`` or ``killed``.

    Args:
        kill_after: seconds until the kill; None for none.
        after_progress: count them from this attempt's first checkpoint.
    """
    pointer = Path(run["out"]) / "checkpoints" / "latest"

    def newest() -> str:
        return pointer.read_text() if pointer.is_file() else ""

    before = newest()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(run["world"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(run, rank, port)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        ranks.append(pid)
    began, alive, failed = time.monotonic(), set(ranks), False
    while alive:
        for pid in sorted(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.discard(pid)
                failed |= status != 0
        if after_progress and newest() != before:
            began, after_progress = time.monotonic(), False
        late = kill_after is not None and not after_progress and time.monotonic() - began > kill_after
        if alive and (late or failed):
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            for pid in alive:
                os.waitpid(pid, 0)
            if failed:
                sys.exit("a rank failed")
            return "killed"
        time.sleep(0.002)
    if failed:
        sys.exit("a rank failed")
    return "done"


def main(path: str) -> None:
    """Carry out the runs of a JSON file and print what became of them."""
    runs = json.loads(Path(path).read_text())
    needed = [
        "lightning.pytorch",
        *(f"worldloom_finetune.{name}" for name in ("export", "module", "strategy", "tokenizer", "world")),
    ]
    needed += ["worldloom_model_zoo.predict.pipeline", "worldloom_tokenizers.checkpoint"]
    if any("deepspeed" in setting for run in runs for setting in run["set"]):
        os.environ["DS_ACCELERATOR"] = "cpu"
        needed += ["deepspeed.runtime.zero.muon.muon_optimizer"]  # its initialisation imports this, for seconds
    for name in needed:
        importlib.import_module(name)
    results, first, length = [], 0.0, 0.0
    for run in runs:
        rng, killed, stages = random.Random(run["seed"]), 0, []
        while True:
            began = time.monotonic()
            # By turns at any instant from the start on, and at any instant after the first new checkpoint.
            share, by_progress = (length - first) / max(run["kills"], 1), killed % 2 == 0
            kill_after = rng.uniform(0, share if by_progress else first + share) if killed < run["kills"] else None
            outcome = _attempt(run, kill_after, after_progress=by_progress and kill_after is not None)
            pointer = Path(run["out"]) / "checkpoints" / "latest"
            stages.append(pointer.read_text() if pointer.is_file() else "")
            if outcome == "done":
                break
            killed += 1
        if not killed:
            length = time.monotonic() - began
            first = min(p.stat().st_ctime for p in Path(run["out"]).glob("config.toml")) - (time.time() - length)
        results.append({"killed": killed, "latest": stages})
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
