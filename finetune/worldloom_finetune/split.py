"""A dataset of clips in two: one to train on, one to test on, without a source or a stretch of video in both."""

from __future__ import annotations

from pathlib import Path

from worldloom import shards
from worldloom.errors import WorldloomError
from worldloom.schema import Clip

_SOURCES = 4  # from this many sources on, whole sources are held out


def held_out(clips: list[Clip]) -> set[str]:
    """Ids of the clips to test on: every fourth source, or, of fewer sources, the last quarter of each one's clips.

    A single clip is neither split nor held out.
    """
    by_source: dict[str, list[Clip]] = {}
    for clip in clips:
        by_source.setdefault(clip.source_digest, []).append(clip)
    if len(by_source) >= _SOURCES:
        chosen = sorted(by_source)[::_SOURCES]
        return {clip.id for digest in chosen for clip in by_source[digest]}
    out: set[str] = set()
    for group in by_source.values():
        ordered = sorted(group, key=lambda clip: clip.start)
        count = max(len(ordered) // 4, 1) if len(ordered) > 1 else 0
        out |= {clip.id for clip in ordered[len(ordered) - count :]}
    return out


def split_dataset(root: Path, train: Path, test: Path, shortest: int) -> tuple[Path, Path]:
    """Write the two parts of the dataset ``root`` to ``train`` and ``test``; a split that is there already stays.

    Args:
        shortest: clips of fewer frames are left out of both.

    Raises:
        WorldloomError: one part would be empty.
    """
    dataset = shards.open_dataset(root)
    clips = [clip for clip in dataset.clips() if clip.frames >= shortest]
    chosen = held_out(clips)
    kept = {clip.id for clip in clips}
    parts = {train: kept - chosen, test: chosen}
    if not all(parts.values()):
        raise WorldloomError(
            "these videos give too few clips to train on some and test on others",
            got=f"{len(clips)} clips of at least {shortest} frames",
            do=f"add videos, or see why clips were dropped: worldloom curate report --out {root}",
        )
    for out, wanted in parts.items():
        if _is_part_of(out, dataset.index.id):
            continue
        with shards.ShardWriter(out) as writer:
            for sample in dataset:
                if sample.clip.id in wanted:
                    writer.write(sample)
        metadata = {**dataset.index.metadata, "split_of": dataset.index.id}
        shards.commit_dataset(
            out,
            writer.shards,
            metadata=metadata,
            inputs=[dataset.index.id],
            config={"part": out.name, "shortest": shortest},
        )
    return train, test


def _is_part_of(out: Path, whole: str) -> bool:
    if not (out / "dataset.json").is_file():
        return False
    return shards.open_dataset(out).index.metadata.get("split_of") == whole
