"""The training loader against plain webdataset, and, where they are installed, LitData and MosaicML streaming.

Every side reads the same samples of the same machine's disk in shuffled order, decodes them and collates batches of 8:
latents to float32, clips to uint8 frames, with their actions and ids. What the batches hold together is compared before
anything is timed. Clips are decoded by the same function on all sides. Sides take turns. Figures are medians over
passes, ratios those of ours over theirs in the same pass: of a whole epoch, which counts what each side does before its
first batch, and of what comes after the first batch. They are by the clock and by this process's processor time, which
a busy machine disturbs less (with workers it says nothing).

LitData and MosaicML streaming want packages that ours does not; they are measured when this runs in an environment that
has them, and left out, said so, elsewhere.

    python benchmarks/dataloader.py [--passes 7] [--latents 2048] [--clips 64] [--workers 0]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from worldloom import media
from worldloom.loader import open_loader
from worldloom.schema import Clip, clip_id
from worldloom.shards import ShardSample, ShardWriter, commit_dataset, open_dataset

BATCH = 8
Batch = tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]  # latents or frames, actions, ids


# -- the same samples for all -------------------------------------------------------------------------------------


def make(root: Path, kind: Any, samples: int) -> Path:
    """`samples` latents (16, 9, 16, 16), or clips of 33 frames of 128x128; 8 actions a frame."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (33, 128, 128, 3)).astype(np.uint8)
    with ShardWriter(root, kind=kind, samples_per_shard=64) as writer:
        for i in range(samples):
            source = f"{i:064d}"
            clip = Clip(clip_id(source, 0, 33), f"{i}.mp4", source, 0, 33, 10.0, 128, 128, action_dim=8)
            arrays = {"actions": rng.standard_normal((32, 8)).astype(np.float32)}
            video = None
            if kind == "latents":
                arrays["latents"] = rng.standard_normal((16, 9, 16, 16)).astype(np.float16)
            else:
                video = media.write_video(None, np.roll(noise, 3 * i, axis=2) + np.uint8(i % 100), 10)
            writer.write(ShardSample(clip, video, arrays))
    tokenizer = {"name": "none", "fingerprint": "0", "temporal_ratio": 4} if kind == "latents" else None
    commit_dataset(root, writer.shards, kind=kind, tokenizer=tokenizer)
    return root


def collate(rows: list[dict[str, Any]]) -> Batch:
    """What a user of the other libraries writes: rows with ``clip``, ``actions`` and ``latents`` or ``frames``."""
    key = "latents" if "latents" in rows[0] else "frames"
    content = torch.from_numpy(np.stack([row[key] for row in rows]))
    content = content.float() if key == "latents" else content
    actions = torch.from_numpy(np.stack([row["actions"] for row in rows]))
    return content, actions, tuple(row["clip"]["id"] for row in rows)


def load(data: bytes) -> np.ndarray:
    """An ``.npy`` file."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


# -- sides --------------------------------------------------------------------------------------------------------

Side = Callable[[int], Iterator[Batch]]  # of a seed


def ours(root: Path, samples: int, workers: int, seed: int) -> Iterator[Batch]:
    """Our loader, its checks included."""
    for batch in open_loader(root, BATCH, seed=seed, workers=workers, batches=samples // BATCH):
        yield batch.latents if hasattr(batch, "latents") else batch.frames, batch.actions, batch.clip_ids


def wds_row(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of webdataset, decoded."""
    row = {"clip": json.loads(sample["json"]), "actions": load(sample["actions.npy"])}
    if "mp4" in sample:
        return row | {"frames": media.read_frames(sample["mp4"])}
    return row | {"latents": load(sample["latents.npy"])}


def webdataset(root: Path, workers: int, seed: int) -> Iterator[Batch]:
    """Its usual pipeline: shards shuffled, then a buffer of 256 samples."""
    wds: Any = importlib.import_module("webdataset")
    urls = [str(root / ref.path) for ref in open_dataset(root).index.shards]
    pipeline = wds.WebDataset(urls, shardshuffle=len(urls), seed=seed).shuffle(256, rng=random.Random(seed))
    pipeline = pipeline.map(wds_row).batched(BATCH, collation_fn=collate)
    yield from DataLoader(pipeline, batch_size=None, num_workers=workers) if workers else pipeline


def stored_row(root: Path, index: int) -> dict[str, Any]:
    """A sample as the peers' writers take it: the same json, arrays and video as in our shards."""
    sample = open_dataset(root).load(index)
    row = {"json": json.dumps(dataclasses.asdict(sample.clip)).encode(), **sample.arrays}
    return row if sample.video is None else row | {"mp4": sample.video}


def decoded_row(row: dict[str, Any]) -> dict[str, Any]:
    """Decode the json and the video, if any, of a row."""
    decoded = {**row, "clip": json.loads(bytes(row["json"]))}
    return decoded if "latents" in row else decoded | {"frames": media.read_frames(bytes(row["mp4"]))}


def collate_rows(rows: list[dict[str, Any]]) -> Batch:
    """Decode, then collate."""
    return collate([decoded_row(row) for row in rows])


def mosaic(root: Path, folder: Path, workers: int) -> Side:
    """MosaicML streaming: MDS shards on the local disk, shuffled by its default algorithm."""
    library: Any = importlib.import_module("streaming")
    dataset = open_dataset(root)
    content = {"latents": "ndarray"} if dataset.index.kind == "latents" else {"mp4": "bytes"}
    columns = {"json": "bytes", "actions": "ndarray", **content}
    with library.MDSWriter(out=str(folder), columns=columns) as writer:
        for index in range(len(dataset)):
            writer.write(stored_row(root, index))

    def batches(seed: int) -> Iterator[Batch]:
        library.base.util.clean_stale_shared_memory()
        data = library.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=BATCH)
        yield from DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate_rows)

    return batches


def litdata(root: Path, folder: Path, workers: int) -> Side:
    """LitData: optimised chunks on the local disk, shuffled."""
    library: Any = importlib.import_module("litdata")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        library.optimize(
            partial(stored_row, root),
            list(range(len(open_dataset(root)))),
            str(folder),
            chunk_bytes="64MB",
            num_workers=1,
        )

    def batches(seed: int) -> Iterator[Batch]:
        data = library.StreamingDataset(str(folder), shuffle=True, seed=seed)
        yield from library.StreamingDataLoader(
            data, batch_size=BATCH, num_workers=workers, collate_fn=collate_rows, shuffle=True
        )

    return batches


# -- measuring ----------------------------------------------------------------------------------------------------


def content(batches: Iterator[Batch]) -> tuple[int, set[str], float, float]:
    """What one epoch holds, whatever its order."""
    count, ids, total, actions = 0, set(), 0.0, 0.0
    for tensor, acts, keys in batches:
        count += len(keys)
        ids |= set(keys)
        total += float(tensor.double().sum())
        actions += float(acts.double().sum())
    return count, ids, round(total, 3), round(actions, 3)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Samples per second of one epoch."""

    epoch: float
    """By the clock."""
    epoch_cpu: float
    """By processor time of this process."""
    steady: float
    """After the first batch, by the clock."""
    steady_cpu: float
    """After the first batch, by processor time."""


def rate(start: Callable[[], Iterator[Batch]]) -> Rates:
    """Measure one epoch."""
    began, worked = time.perf_counter(), time.process_time()
    batches = start()
    first = len(next(batches)[2])
    running, running_cpu = time.perf_counter(), time.process_time()
    rest = sum(len(keys) for _, _, keys in batches)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    every = first + rest
    return Rates(
        every / (ended - began),
        every / (ended_cpu - worked),
        rest / (ended - running),
        rest / (ended_cpu - running_cpu),
    )


def compare(sides: dict[str, Side], passes: int) -> dict[str, list[Rates]]:
    """Measure each side `passes` times; the sides take turns in an order that rotates."""
    expected = content(sides["worldloom"](0))
    for name, side in sides.items():
        found = content(side(0))
        if found != expected:
            raise SystemExit(f"{name} gives other samples: {found[0]} of {expected[0]}, sums {found[2:]}")
    rates: dict[str, list[Rates]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(passes):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rates[name].append(rate(partial(sides[name], number + 1)))
    return rates


def show(kind: str, rates: dict[str, list[Rates]]) -> None:
    """Print the medians, and the medians of the ratios of pairs."""
    columns = [field.name for field in dataclasses.fields(Rates)]
    print(f"{kind:<22}{'epoch':>12}{'by cpu':>12}{'after first':>14}{'by cpu':>12}   samples/s")
    for name, values in rates.items():
        medians = [statistics.median(getattr(value, column) for value in values) for column in columns]
        print(f"  {name:<20}" + "".join(f"{m:>{w}.1f}" for m, w in zip(medians, (12, 12, 14, 12), strict=True)))
    for name in list(rates)[1:]:
        pairs = list(zip(rates["worldloom"], rates[name], strict=True))
        ratios = [statistics.median(getattr(a, column) / getattr(b, column) for a, b in pairs) for column in columns]
        print(
            f"ratio {kind} worldloom / {name}: {ratios[0]:.2f} ({ratios[1]:.2f} by processor time); after the first "
            f"batch {ratios[2]:.2f} ({ratios[3]:.2f}); higher is better"
        )


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=7, help="epochs of each side")
    parser.add_argument("--latents", type=int, default=2048, help="samples of latents (75 kB each)")
    parser.add_argument("--clips", type=int, default=64, help="samples of clips")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = Path(__file__).parent
    sys.path = [entry for entry in sys.path if Path(entry) != here]  # tokenizers.py here is not the package
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {args.workers} workers; "
        f"median of {args.passes} passes"
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["WORLDLOOM_HOME"] = f"{scratch}/home"
        for kind, samples in (("latents", args.latents), ("clips", args.clips)):
            samples -= samples % BATCH
            root = make(Path(scratch, kind), kind, samples)
            sides: dict[str, Side] = {
                "worldloom": partial(ours, root, samples, args.workers),
                "webdataset": partial(webdataset, root, args.workers),
            }
            for name, build in (("litdata", litdata), ("streaming", mosaic)):
                try:
                    sides[name] = build(root, Path(scratch, f"{kind}-{name}"), args.workers)
                except ImportError as error:
                    print(f"{kind}: {name} is left out: {error}")
            show(kind, compare(sides, args.passes))


if __name__ == "__main__":
    main()
