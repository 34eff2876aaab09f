"""The two jobs that touch pixels, each for one source: measure it, and encode its clips. Both can run in a worker."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom_curation.cache import Cache, key_of
from worldloom_curation.config import CurateConfig, build_stages, config_class
from worldloom_curation.sources import load_episode
from worldloom_curation.stage import Observer, Source, Span, Stage
from worldloom_curation.stages import probe, write

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know about the run."""

    config: str
    """The config as JSON: a class made for a third party's stage cannot be pickled."""
    cache: str
    """The cache folder."""


@dataclass(frozen=True)
class Scan:
    """What is known about a source after its one decoding."""

    header: probe.Header
    frames: int = 0
    """Frames that decode."""
    error: str = ""
    """Why decoding stopped early."""
    probed: bool = False
    """True if the header was read now, false if its result was cached."""
    measured: tuple[str, ...] = ()
    """Stages whose observers watched now; empty if everything was cached."""


def plan(config: CurateConfig, cache: Cache) -> Plan:
    """A plan for workers."""
    return Plan(json.dumps(configs.to_dict(config), sort_keys=True), str(cache.root))


@functools.cache
def prepare(text: str) -> tuple[CurateConfig, list[Stage]]:
    """Config and stages of a plan; cached for the life of a worker."""
    config = configs.load(config_class(), base=json.loads(text))
    return config, build_stages(config)


@functools.cache
def decoder() -> str:
    """Another decoder may give other pixels, so its version is part of every key that depends on pixels."""
    return f"av {importlib.metadata.version('av')}"


def signals_key(stage: Stage, source: Source) -> str:
    """The key of what a stage's observer collects from a source."""
    config = asdict(stage.config)
    used = {name: config[name] for name in stage.measured_with}
    return key_of("signals", stage.name, stage.version, used, source.key, VERSION, decoder())


def clip_key(span: Span, size: tuple[int, int], config: write.WriteConfig) -> str:
    """The key of an encoded clip."""
    crf = None if span.source.recorded else config.crf
    return key_of(
        "clip", write.VERSION, span.source.key, span.start, span.end, span.step, span.fps, size, crf, decoder()
    )


def scan_source(source: Source, job: Plan) -> Scan:
    """Probe a source, then decode it once for all the stages that have not measured it yet."""
    from worldloom import media

    config, stages = prepare(job.config)
    cache = Cache(job.cache)
    limits = config.probe.limits()
    probe_key = key_of("probe", probe.VERSION, asdict(limits), source.key, decoder())
    video: str | bytes = b""  # read when it is first needed
    header: probe.Header
    known = cache.load("probe", probe_key)
    if known is None:
        video = _video(source)
        header = probe.probe(video, config.probe)
        cache.save("probe", probe_key, asdict(header))
    else:
        header = probe.Header(**known)
    result = Scan(header, probed=known is None)
    if header.error or probe.too_small(header, config.probe):
        return result
    scan_key = key_of("scan", VERSION, asdict(limits), source.key, decoder())
    count: dict[str, Any] | None = cache.load("scan", scan_key)
    observers = _observers(source, header, stages, cache)
    if count is None or observers:
        frames, error = 0, ""
        try:
            for frame in media.iter_frames(video or _video(source), limits=limits):
                for observer in observers.values():
                    observer.add(frame)
                frames += 1
        except (WorldloomError, OSError) as problem:
            error = probe.sentence(problem, source.path, "the file")
        for stage in stages:
            if stage.name in observers:
                cache.save_signals(stage.name, signals_key(stage, source), observers[stage.name].result())
        count = {"frames": frames, "error": error}
        cache.save("scan", scan_key, count)
        result = replace(result, measured=("count", *observers))
    return replace(result, frames=count["frames"], error=count["error"])


def _observers(source: Source, header: probe.Header, stages: Sequence[Stage], cache: Cache) -> dict[str, Observer]:
    """The observers of the stages whose measurements are not cached."""
    observers: dict[str, Observer] = {}
    for stage in stages:
        observer = stage.observer(source, header.fps)
        if observer is not None and not cache.has_signals(stage.name, signals_key(stage, source)):
            observers[stage.name] = observer
    return observers


def encode_source(source: Source, spans: Sequence[Span], size: tuple[int, int], job: Plan) -> str:
    """Encode spans of a source into the cache in one pass; the error sentence if it stops before the last, else ""."""
    config, _ = prepare(job.config)
    cache = Cache(job.cache)

    def save(span: Span, encoded: bytes) -> None:
        from worldloom.artifacts import atomic_write

        atomic_write(cache.path("clips", clip_key(span, size, config.write), ".mp4"), encoded)

    try:
        write.encode_spans(_video(source), spans, size, config.write, save, config.probe.limits())
    except WorldloomError as error:
        return probe.sentence(error, source.path, "the file")
    return ""


def _video(source: Source) -> str | bytes:
    if not source.recorded:
        return source.path
    video = load_episode(source).video
    assert video is not None, "open_dataset checked that the dataset holds clips"
    return video
