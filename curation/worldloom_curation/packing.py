"""Packing: the clips of a run, with their arrays and what stages have added, into shards beside the old ones."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.errors import WorldloomError
from worldloom.schema import Clip, ShardRef
from worldloom.shards import ShardSample, ShardWriter
from worldloom_curation.additions import adding, load_added, stored_key
from worldloom_curation.quarantine import Failure
from worldloom_curation.robot import describe
from worldloom_curation.scan import face_blur
from worldloom_curation.sources import load_episode
from worldloom_curation.stage import Derives, Verdict
from worldloom_curation.stages import probe, write

if TYPE_CHECKING:
    import numpy as np

    from worldloom.members import Kind
    from worldloom_curation.pipeline import Run
    from worldloom_curation.stage import Span


def is_copied(span: Span, frames: int) -> bool:
    """Whether the clip is a recorded episode as it is."""
    return span.source.exact and (span.start, span.end, span.step) == (0, frames, 1)


@dataclass(frozen=True)
class Packed:
    """The shards of a run, in its staging folder."""

    clips: list[ShardRef]
    derived: Mapping[str, list[ShardRef]]
    """By the name of the stage."""


def pack_shards(
    this: Run,
    spans: Sequence[Span],
    sizes: Mapping[str, tuple[int, int]],
    frames: Mapping[str, int],
    failures: Mapping[tuple[str, int, int], Failure],
) -> Packed:
    """Write the clips, in order, into shards beside the old ones, and the last rows of the ledger."""
    position, staging = len(this.stages) + 1, this.out / ".cache" / "next"
    shutil.rmtree(staging, ignore_errors=True)
    written: dict[str, str] = {}
    action_dims: dict[int, str] = {}
    config = this.config.write
    with contextlib.ExitStack() as open_writers:

        def writer_of(root: Path, kind: Kind) -> ShardWriter:
            return open_writers.enter_context(
                ShardWriter(root, kind, samples_per_shard=config.samples_per_shard, max_bytes=config.max_shard_bytes)
            )

        writer = writer_of(staging, "clips")
        derived = {
            stage.name: writer_of(staging / stage.name, "latents")
            for stage in this.stages
            if isinstance(stage, Derives)
        }
        episode: tuple[str, ShardSample | None] = ("", None)
        for number, span in enumerate(spans, start=1):
            name = span.source.name
            if span.id in written:
                reason = f"clip {span.id} is already written, from {written[span.id]}"
                this.note(position, "write", Verdict(span, False, "earlier copies", 1.0, 1.0, reason))
                continue
            if span.source.exact and episode[0] != name:
                episode = (name, load_episode(span.source))
            recorded = episode[1] if span.source.exact else None
            try:
                why = failures.get((span.source.key, span.start, span.end))
                made = why or _sample(this, span, sizes[name], frames[name], recorded)
            except FileNotFoundError:
                made = Failure("the clip was not encoded")
            except WorldloomError as error:
                made = Failure(probe.sentence(error))
            if isinstance(made, Failure):
                verdict = Verdict(span, False, reason=made.reason, traceback=made.traceback)
                this.note(position, "write", verdict, failed=True)
                continue
            sample, derived_samples = made
            action_dims.setdefault(sample.clip.action_dim, name)
            if len(action_dims) > 1:
                (one, first), (other, second) = action_dims.items()
                raise WorldloomError(
                    "the clips of one dataset must have one action size",
                    got=f"{one} in {first}, {other} in {second}",
                    do="curate the folders one at a time, each with its own --out",
                )
            writer.write(sample)
            for stage, windows in derived_samples.items():
                for window in windows:
                    derived[stage].write(window)
            written[span.id] = name
            describe(this.statistics, sample.arrays, span.source.facts)
            clip = sample.clip
            this.note(
                position, "write", Verdict(span, True, reason=f"{span.frames} frames, {clip.width}x{clip.height}")
            )
            this.progress("pack", number, len(spans), name)
        return Packed(writer.close(), {stage: other.close() for stage, other in derived.items()})


def _sample(
    this: Run, span: Span, size: tuple[int, int], frames: int, episode: ShardSample | None
) -> tuple[ShardSample, dict[str, list[ShardSample]]]:
    """The shard sample of a span: its encoded clip, its part of the episode's arrays, and what stages add.

    Beside it, the samples that stages derive from it, by the stage's name.
    """
    copied = episode is not None and is_copied(span, frames)
    stored = stored_key(span, size, this.config, copied)
    video = episode.video if copied and episode is not None else this.cache.path("clips", stored, ".mp4").read_bytes()
    arrays = write.cut_arrays(span.source.arrays if episode is None else episode.arrays, span, frames)
    derived: dict[str, Mapping[str, np.ndarray]] = {}
    for stage in adding(this.stages):
        made = load_added(this.cache, stage, span, stored)
        assert made is not None, "what could not be added is a failure, and is not packed"
        if isinstance(stage, Derives):
            derived[stage.name] = made
        else:
            arrays |= made
    sample = ShardSample(clip_of(this, span, size), video, arrays)
    return sample, {
        stage.name: list(stage.derive(sample, derived[stage.name]))
        for stage in this.stages
        if isinstance(stage, Derives)
    }


def clip_of(this: Run, span: Span, size: tuple[int, int]) -> Clip:
    """What a sample says it is."""
    facts = {name: value for name, value in span.source.facts.items() if name != "caption"}
    start, end = span.source.original(span.start, span.end)
    if not span.source.exact:
        facts["source_size"] = list(this.source_sizes[span.source.name])
    if write.blurs_faces(span, this.config.write):
        facts["faces"] = f"blurred by {face_blur()}"
    return Clip(
        id=span.id,
        source=span.source.name,
        source_digest=span.source.digest,
        start=start,
        end=end,
        fps=span.fps / span.step,
        width=size[1],
        height=size[0],
        caption=span.caption,
        action_dim=0 if span.source.actions is None else span.source.actions.shape[1],
        metadata={**facts, **span.notes},
        step=span.step * (span.source.cut_from or (0, 0, 1))[2],
    )
