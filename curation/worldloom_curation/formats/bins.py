"""Clips sorted by resolution, aspect and duration: a bin for every clip there can be.

The names and the aspect edges are cosmos-curate's. Its bins leave holes (under 5 s; wider than 10:1; a clip of exactly
10 s is in two); ours do not: every edge belongs to one side, and the outermost bins are open.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_write, file_digest
from worldloom.errors import WorldloomError
from worldloom.schema import Clip, ShardRef
from worldloom.shards import Dataset, ShardWriter, commit_dataset, pack, scan_shard
from worldloom_curation.export import ExportOptions, Progress

RESOLUTIONS = (256, 480, 720, 1080)
"""Short side in pixels, ``[edge, next edge)``: resolution_lt_256, resolution_256, ..., resolution_1080 (and more)."""
COSMOS_RESOLUTIONS = (720, 1080)
"""The same, as cosmos-curate has them."""
DURATIONS = (2, 5, 10, 30)
"""Seconds, ``[edge, next edge)``: duration_0_2, duration_2_5, duration_5_10, duration_10_30, duration_30_inf."""
ASPECTS = ((0.65, "9_16"), (0.88, "3_4"), (1.16, "1_1"), (1.55, "4_3"), (float("inf"), "16_9"))
"""Width over height, ``(edge before, edge]``, and the name."""


@dataclass(frozen=True, order=True)
class Bin:
    """Where a clip belongs."""

    resolution: str
    aspect: str
    duration: str

    @property
    def path(self) -> str:
        """The folder, with ``/``."""
        return f"resolution_{self.resolution}/aspect_ratio_{self.aspect}/duration_{self.duration}"


def bin_of(clip: Clip, resolutions: Sequence[int] = RESOLUTIONS) -> Bin:
    """The one bin of a clip."""
    side, ratio, seconds = min(clip.width, clip.height), clip.width / clip.height, clip.frames / clip.fps
    place = bisect.bisect_right(resolutions, side)
    resolution = str(resolutions[place - 1]) if place else f"lt_{resolutions[0]}"
    aspect = next(name for edge, name in ASPECTS if ratio <= edge)
    place = bisect.bisect_right(DURATIONS, seconds)
    low, high = (0, *DURATIONS)[place], (*DURATIONS, "inf")[place]
    return Bin(resolution, aspect, f"{low}_{high}")


def sort_clips(dataset: Dataset, resolutions: Sequence[int] = RESOLUTIONS) -> dict[Bin, list[int]]:
    """The numbers of all clips by bin, bins and clips in order."""
    found: dict[Bin, list[int]] = {}
    for number, clip in enumerate(dataset.clips()):
        found.setdefault(bin_of(clip, resolutions), []).append(number)
    return dict(sorted(found.items()))


def tars(sizes: Sequence[int], most: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``[start, end)`` of clips that fit a tar; a clip that fits none has one of its own."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and (i - start >= most or total + size > most_bytes):
            yield start, i
            start = i
            total = 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def write(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """A dataset of ours in every bin's folder, and ``bins.json``: how many clips are where.

    A bin whose dataset is there is left alone; in the others, so is every tar that holds what it should.
    """
    bins = sort_clips(dataset)
    done = 0
    counts: dict[str, int] = {}
    for place, numbers in bins.items():
        root = folder / place.path
        done += len(numbers)
        sizes = [sum(dataset.sizes(number).values()) for number in numbers]
        shards: list[ShardRef] = []
        for index, (start, end) in enumerate(tars(sizes, options.clips_per_tar, options.tar_mb << 20)):
            shards.append(_shard(dataset, root, index, numbers[start:end]))
        commit_dataset(
            root,
            shards,
            inputs=[dataset.index.id],
            metadata={**dataset.index.metadata, "bin": place.path},
            config={"export": "webdataset", "bin": place.path},
            name=f"{dataset.root.resolve().name}-{place.path.replace('/', '-')}",
        )
        counts[place.path] = sum(shard.samples for shard in shards)
        progress(done, len(dataset), place.path)
    atomic_write(folder / "bins.json", json.dumps(counts, indent=1) + "\n")
    return {"clips": sum(counts.values()), "bins": counts}


def _shard(dataset: Dataset, root: Path, index: int, numbers: Sequence[int]) -> ShardRef:
    """Write one tar, unless it is there already; a tar under its name is whole."""
    path = root / "shards" / f"{index:06d}.tar"
    keys = [dataset.keys()[number] for number in numbers]
    if path.exists():
        try:
            same = [entry.key for entry in scan_shard(path)] == keys
        except WorldloomError:
            same = False
        if same:
            return ShardRef(f"shards/{path.name}", file_digest(path), len(numbers), path.stat().st_size)
    with ShardWriter(root, "clips", len(numbers), 1 << 50, first_shard=index) as writer:
        for number in numbers:
            sample = dataset.load(number)
            writer.write_members(sample.clip.id, pack(sample))
    return writer.shards[0]
