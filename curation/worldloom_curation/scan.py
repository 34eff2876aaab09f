"""The two jobs that touch pixels, each for one source: measure it, and encode its clips. Both can run in a worker."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from worldloom import config as configs
from worldloom.errors import MissingPackage, WorldloomError
from worldloom_curation import pictures
from worldloom_curation.cache import Cache, key_of
from worldloom_curation.config import CurateConfig, build_stages, config_class
from worldloom_curation.quarantine import Failure, failure
from worldloom_curation.sources import load_episode
from worldloom_curation.stage import Observer, Source, Span, Stage
from worldloom_curation.stages import probe, write

if TYPE_CHECKING:
    import numpy as np

    from worldloom_curation.pictures import Frame

VERSION = 2


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
    traceback: str = ""
    """Where `error` came from, if no one expected it."""
    measured: tuple[str, ...] = ()
    """Stages whose observers watched now; empty if everything was cached."""
    broken: Mapping[str, Failure] = field(default_factory=dict[str, Failure])
    """Stages whose observers raised, and what; they are asked again in the next run."""


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
    how = [None] if span.source.exact else [config.crf, config.copy]
    faces = [face_blur()] if write.blurs_faces(span, config) else []
    return key_of(
        "clip", write.VERSION, span.source.key, span.start, span.end, span.step, span.fps, size, how, decoder(), *faces
    )


@functools.cache
def face_blur() -> str:
    """What blurs faces, and its version."""
    from worldloom.detectors import FaceGuard

    return FaceGuard().fingerprint


def scan_source(source: Source, job: Plan) -> Scan:
    """Probe a source, then decode it once for all the stages that have not measured it yet."""
    with contextlib.ExitStack() as opened:
        return _scan(source, job, opened)


def _scan(source: Source, job: Plan, opened: contextlib.ExitStack) -> Scan:
    from worldloom import media

    config, stages = prepare(job.config)
    cache = Cache(job.cache)
    limits = config.probe.limits()
    probe_key = key_of("probe", probe.VERSION, asdict(limits), source.key, decoder())
    video: str | bytes = b""  # read when it is first needed
    header: probe.Header
    known = cache.load("probe", probe_key)
    decoded: Iterator[Any] | None = None
    if known is None:
        try:
            video = _video(source)
            header, decoded = probe.probe(video, config.probe, opened)
        except MissingPackage:
            raise
        except Exception as error:
            why = failure(error, source, expected=isinstance(error, WorldloomError))
            return Scan(probe.Header(error=why.reason), traceback=why.traceback, probed=True)
        cache.save("probe", probe_key, asdict(header))
    else:
        header = probe.Header(**known)
    header = _as_declared(header, source)
    result = Scan(header, probed=known is None)
    if header.error or probe.too_small(header, config.probe):
        return result
    scan_key = key_of("scan", VERSION, asdict(limits), source.key, decoder())
    count: dict[str, Any] | None = cache.load("scan", scan_key)
    observers = _observers(source, header, stages, cache)
    if count is None or observers:
        watch = _Watch(source, observers)
        frames, why = 0, Failure("")
        try:
            first, last = source.window or (0, None)
            with pictures.one_thread():
                if decoded is None or source.window:
                    decoded = media.iter_decoded(video or _video(source), first, last, limits=limits)
                for frame in pictures.frames(decoded):
                    watch.add(frame)
                    frames += 1
        except MissingPackage:
            raise
        except Exception as problem:
            why = failure(problem, source, expected=isinstance(problem, WorldloomError | OSError))
        for stage in stages:
            if (signals := watch.result(stage.name)) is not None:
                cache.save_signals(stage.name, signals_key(stage, source), signals)
        count = {"frames": frames, "error": why.reason, "traceback": why.traceback}
        if not why.traceback:
            cache.save("scan", scan_key, count)
        result = replace(result, measured=("count", *observers), broken=watch.broken)
    return replace(result, frames=count["frames"], error=count["error"], traceback=count.get("traceback", ""))


class _Watch:
    """The observers of one decoding; one that raises is out, and the others go on."""

    def __init__(self, source: Source, observers: Mapping[str, Observer]) -> None:
        self._source, self._observers = source, dict(observers)
        self.broken: dict[str, Failure] = {}

    def add(self, frame: Frame) -> None:
        """Show every observer the next frame."""
        raised: dict[str, Exception] = {}
        for name, observer in self._observers.items():
            try:
                observer.add(frame)
            except Exception as error:
                raised[name] = error
        for name, error in raised.items():
            self._quarantine(name, error)

    def result(self, name: str) -> dict[str, np.ndarray] | None:
        """What an observer has collected; None if it raised, or if there is none."""
        if name not in self._observers:
            return None
        try:
            return self._observers[name].result()
        except Exception as error:
            self._quarantine(name, error)
            return None

    def _quarantine(self, name: str, error: Exception) -> None:
        if isinstance(error, MissingPackage):
            raise error
        del self._observers[name]
        self.broken[name] = failure(error, self._source)


def _observers(source: Source, header: probe.Header, stages: Sequence[Stage], cache: Cache) -> dict[str, Observer]:
    """The observers of the stages whose measurements are not cached."""
    observers: dict[str, Observer] = {}
    for stage in stages:
        observer = stage.observer(source, header.fps)
        if observer is not None and not cache.has_signals(stage.name, signals_key(stage, source)):
            observers[stage.name] = observer
    return observers


def encode_source(
    source: Source, spans: Sequence[Span], size: tuple[int, int], job: Plan
) -> dict[tuple[int, int], Failure]:
    """Encode spans of a source into the cache in one pass; returns those that failed, by (start, end), and why.

    After an unexpected exception the spans that follow are encoded in another pass. What is wrong with the file would
    be wrong again: it costs all that follow.
    """
    config, _ = prepare(job.config)
    cache = Cache(job.cache)

    saved = 0

    def save(span: Span, encoded: bytes) -> None:
        from worldloom.artifacts import atomic_write

        nonlocal saved
        atomic_write(cache.path("clips", clip_key(span, size, config.write), ".mp4"), encoded)
        saved += 1

    failed: dict[tuple[int, int], Failure] = {}
    todo = list(spans)
    while todo:
        saved = 0
        try:
            write.encode_spans(_video(source), todo, size, config.write, save, config.probe.limits())
            return failed
        except MissingPackage:
            raise
        except Exception as error:
            expected = isinstance(error, WorldloomError | OSError)
            why = failure(error, source, expected=expected)
            lost, todo = (todo[saved:], []) if expected else (todo[saved : saved + 1], todo[saved + 1 :])
            failed.update({(span.start, span.end): why for span in lost})
    return failed


def _as_declared(header: probe.Header, source: Source) -> probe.Header:
    """A file's header as that of the episode it holds: its rate and length where the dataset says them."""
    frames = source.window[1] - source.window[0] if source.window else header.frames
    return replace(header, fps=source.rate or header.fps, frames=frames)


def _video(source: Source) -> str | bytes:
    if not source.exact:
        return source.path
    video = load_episode(source).video
    assert video is not None, "open_dataset checked that the dataset holds clips"
    return video
