"""What stages add to the clips that are kept: the job that makes it, for one source, and where it is kept until then.

Clips are looked at as they are stored, after they were encoded, so that vectors and latents belong to what a training
run reads. Every result is cached for itself, under the digest of its clip and of the stage's settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from worldloom.errors import MissingPackage, WorldloomError
from worldloom.schema import Clip
from worldloom_curation.cache import Cache, key_of
from worldloom_curation.quarantine import Failure, failure
from worldloom_curation.scan import Plan, clip_key, prepare
from worldloom_curation.sources import load_episode
from worldloom_curation.stage import Adds, Source, Stage

if TYPE_CHECKING:
    import numpy as np

    from worldloom_curation.config import CurateConfig
    from worldloom_curation.stage import Span


@dataclass(frozen=True)
class Stored:
    """A clip as it is stored, that stages have not yet looked at."""

    span: Span
    clip: Clip
    key: str
    """See `stored_key`."""
    copied: bool
    """Whether it is a recorded episode as it is."""
    missing: tuple[str, ...]
    """Names of the stages that have not added to it."""


def adding(stages: Sequence[Stage]) -> list[Adds]:
    """Those of the stages that add something."""
    return [stage for stage in stages if isinstance(stage, Adds)]


def stored_key(span: Span, size: tuple[int, int], config: CurateConfig, copied: bool) -> str:
    """The key of a clip as it is stored: encoded, or an episode's own bytes."""
    return key_of("episode", span.source.key) if copied else clip_key(span, size, config.write)


def added_key(stage: Adds, span: Span, stored: str) -> str:
    """The key of what a stage adds to a clip."""
    caption = [span.caption] if stage.reads_caption else []
    return key_of("added", stage.name, stage.version, asdict(stage.config), stored, *caption)


def load_added(cache: Cache, stage: Adds, span: Span, stored: str) -> dict[str, np.ndarray] | None:
    """What a stage has added to a clip; None if it has not."""
    return cache.load_signals(f"added-{stage.name}", added_key(stage, span, stored))


def add_to_clips(source: Source, clips: Sequence[Stored], job: Plan) -> Mapping[str, Failure]:
    """Let the stages look at clips of one source that they have not; returns why, by clip id, for those they cannot."""
    cache, stages = Cache(job.cache), adding(prepare(job.config)[1])
    failed: dict[str, Failure] = {}
    with _one_thread():
        for stored in clips:
            try:
                video = _video(source, cache, stored)
            except OSError as error:
                failed[stored.clip.id] = failure(error, source, expected=True)
                continue
            for stage in stages:
                if stage.name not in stored.missing:
                    continue
                try:
                    made = stage.add(stored.clip, video)
                except MissingPackage:
                    raise
                except Exception as error:
                    why = failure(error, source, expected=isinstance(error, WorldloomError))
                    failed[stored.clip.id] = Failure(f"{stage.name}: {why.reason}", why.traceback)
                    break
                cache.save_signals(f"added-{stage.name}", added_key(stage, stored.span, stored.key), made)
    return failed


def _video(source: Source, cache: Cache, stored: Stored) -> bytes:
    if not stored.copied:
        return cache.path("clips", stored.key, ".mp4").read_bytes()
    video = load_episode(source).video
    assert video is not None, "open_dataset checked that the dataset holds clips"
    return video


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Networks on one thread: sums in another order give other last bits, and every executor must give the same.

    More workers are how more than one core is used.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
