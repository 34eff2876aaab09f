"""`curate run`: sources -> probe -> scan -> the stages -> write, with a ledger row for every decision.

What depends on pixels (headers, what observers collect, encoded clips) and what is decided from it are cached apart,
each under the digest of exactly what it depends on (see `cache`), so a run that was killed goes on where it was, and a
run with one changed threshold decides again without decoding. What is written holds neither time nor run: equal input
and config give equal bytes, however often the run was interrupted and however many workers it had.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom import config as configs
from worldloom.artifacts import Store, atomic_write
from worldloom.errors import WorldloomError
from worldloom.schema import Decision
from worldloom.shards import commit_dataset
from worldloom_curation.additions import Stored, add_to_clips, adding, load_added, stored_key
from worldloom_curation.cache import Cache, key_of
from worldloom_curation.config import CurateConfig
from worldloom_curation.derived import check_derived, commit_derived, replace_derived
from worldloom_curation.executor import executor
from worldloom_curation.ledger import NAME, accounts, reconcile, save_ledger
from worldloom_curation.packing import Packed, clip_of, is_copied, pack_shards
from worldloom_curation.quarantine import Failure, decide
from worldloom_curation.remote import is_url
from worldloom_curation.robot import Statistics, statistics_table
from worldloom_curation.scan import (
    Plan,
    Scan,
    clip_key,
    encode_source,
    plan,
    prepare,
    scan_source,
    signals_key,
)
from worldloom_curation.sources import discover
from worldloom_curation.stage import Adds, Derives, Source, Span, Stage, Verdict
from worldloom_curation.stages import probe, write

if TYPE_CHECKING:
    import numpy as np

HOW = ("executor", "workers")
"""Settings that say how a run is done and not what it makes."""

_PATIENCE = 2.0
"""Seconds to wait for the output folder: a run killed while it started a program holds it until that has begun."""

Progress = Callable[[str, int, int, str], None]
"""Called with (what is done, how many are finished, of how many, the last one's name)."""


@dataclass
class Work:
    """How much of a stage was taken from the cache, and how much was done now."""

    cached: int = 0
    computed: int = 0
    copied: int = 0
    """Recorded episodes that were taken as they are."""

    def add(self, cached: bool, count: int = 1) -> None:
        """Count `count` items."""
        if cached:
            self.cached += count
        else:
            self.computed += count


@dataclass
class Run:
    """One run in progress: what every step needs, and what the steps have found."""

    out: Path
    config: CurateConfig
    stages: list[Stage]
    cache: Cache
    job: Plan
    progress: Progress
    work: dict[str, Work] = field(default_factory=dict[str, Work])
    rows: dict[tuple[str, int], list[Decision]] = field(default_factory=dict[tuple[str, int], "list[Decision]"])
    """Ledger rows by (source, position of the stage)."""
    source_sizes: dict[str, tuple[int, int]] = field(default_factory=dict[str, "tuple[int, int]"])
    """``(h, w)`` of each source, by name."""
    broken: dict[str, dict[str, Failure]] = field(default_factory=dict[str, "dict[str, Failure]"])
    """Stage -> source key -> why the stage's observer has collected nothing there."""
    statistics: dict[str, tuple[Sequence[str], Statistics]] = field(
        default_factory=dict[str, "tuple[Sequence[str], Statistics]"]
    )
    """Of the written clips' arrays of numbers: names of their components, and statistics."""

    def note(self, position: int, stage: str, verdict: Verdict, failed: bool = False) -> None:
        """Add a ledger row."""
        span = verdict.span
        self.rows.setdefault((span.source.name, position), []).append(
            Decision(
                clip_id=span.id,
                source=span.source.name,
                start=span.start,
                end=span.end,
                stage=stage,
                kept=verdict.kept,
                measure=verdict.measure,
                value=verdict.value,
                threshold=verdict.threshold,
                reason=verdict.reason,
                failed=failed or verdict.failed,
                like=verdict.like,
                traceback=verdict.traceback,
            )
        )

    def ledger(self, sources: Sequence[Source]) -> list[Decision]:
        """All rows: by source, then by stage, then by span."""
        positions = range(len(self.stages) + 2)
        return [
            row for source in sources for position in positions for row in self.rows.get((source.name, position), [])
        ]


def run(
    src: str | Path,
    out: str | Path,
    config: CurateConfig | None = None,
    *,
    progress: Progress = lambda *_: None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Curate `src` into the dataset folder `out`, or bring that folder up to date.

    Args:
        src: a folder, a video file, a dataset made by the recorder or by LeRobot, or a URL (see `remote`).
        out: gets ``shards/``, ``dataset.json``, ``ledger.parquet``, ``config.toml`` and, last, ``summary.json``.
        config: None for the defaults.
        progress: told what is going on.
        store: where the dataset is recorded; None for the default store.

    Returns:
        The summary. Its ``work`` says for every step how much was cached and how much was computed.

    Raises:
        WorldloomError: nothing to curate, nothing kept (the ledger is written and says why), or another run is at work
            in `out`. A bad source does not raise: it is a row of the ledger.
    """
    config = config or CurateConfig()
    out = Path(out)
    if not is_url(str(src)) and Path(src).resolve() == out.resolve():
        raise WorldloomError("the output folder is the source folder", got=out, do="give another --out")
    sources, inputs = discover(src, out, config.sources)
    cache = Cache(out / ".cache")
    job = plan(config, cache)
    config, stages = prepare(job.config)
    with _alone(out):
        _sweep(out)
        this = Run(out, config, stages, cache, job, progress)
        check_derived(this)
        scans = _scan(this, sources)
        spans = _probe_verdicts(this, sources, scans)
        for position, stage in enumerate(stages, start=1):
            spans = _decide(this, position, stage, spans)
        this.source_sizes = {
            source.name: (scan.header.height, scan.header.width) for source, scan in zip(sources, scans, strict=True)
        }
        sizes = {
            source.name: write.stored_size(scan.header.height, scan.header.width, source.exact, config.write)
            for source, scan in zip(sources, scans, strict=True)
            if scan.frames
        }
        frames = {source.name: scan.frames for source, scan in zip(sources, scans, strict=True)}
        failures = _encode(this, spans, sizes, frames)
        _add(this, spans, sizes, frames, failures)
        packed = pack_shards(this, spans, sizes, frames, failures)
        return _commit(this, src, sources, inputs, packed, store)


def _scan(this: Run, sources: Sequence[Source]) -> list[Scan]:
    """Probe and measure every source that can be opened; equal content is looked at once."""
    todo = list({source.key: source for source in sources if not source.error}.values())
    jobs = [(source, this.job) for source in todo]
    done = executor(this.config.executor, this.config.workers)(
        scan_source,
        jobs,
        lambda n, i: this.progress("scan", n, len(todo), todo[i].name),
        lambda _: Scan(probe.Header(error="the process that decoded it died, of the file or for want of memory")),
    )
    by_key = {source.key: scan for source, scan in zip(todo, done, strict=True)}
    for number, scan in enumerate(done):
        this.work.setdefault("probe", Work()).add(not scan.probed)
        if scan.frames or scan.error:
            this.work.setdefault("scan", Work()).add(not scan.measured)
        for stage, why in scan.broken.items():
            this.broken.setdefault(stage, {})[todo[number].key] = why
    return [Scan(probe.Header(error=source.error)) if source.error else by_key[source.key] for source in sources]


def _probe_verdicts(this: Run, sources: Sequence[Source], scans: Sequence[Scan]) -> list[Span]:
    """Ledger rows of the sources themselves; returns a span over every usable one."""
    spans: list[Span] = []
    for source, scan in zip(sources, scans, strict=True):
        header = scan.header
        whole = Span(source, 0, scan.frames or header.frames, header.fps)
        small = probe.too_small(header, this.config.probe)
        if header.error:
            this.note(0, "probe", Verdict(whole, False, reason=header.error, traceback=scan.traceback), failed=True)
        elif small:
            this.note(0, "probe", Verdict(whole, False, **small))
        elif not scan.frames or "over the limit" in scan.error:
            reason = scan.error or "no frame decodes"
            this.note(0, "probe", Verdict(whole, False, reason=reason, traceback=scan.traceback), failed=True)
        else:
            about = f"{header.codec} {header.width}x{header.height}, {header.fps:.4g} fps, {scan.frames} frames"
            if header.frames > scan.frames:
                about += f" (the header promises {header.frames})"
            side = float(min(header.width, header.height))
            this.note(0, "probe", Verdict(whole, True, "short side", side, float(this.config.probe.min_side), about))
            if scan.error:
                broken = replace(whole, start=scan.frames, end=scan.frames)
                reason = f"decoding stopped here: {scan.error}"
                this.note(0, "probe", Verdict(broken, False, reason=reason, traceback=scan.traceback), failed=True)
            spans.append(whole)
    return spans


def _decide(this: Run, position: int, stage: Stage, spans: Sequence[Span]) -> list[Span]:
    """One stage over all spans, from its cached verdicts where input, config and code are the same."""
    work = this.work.setdefault(stage.name, Work())
    batches: list[list[Span]] = [list(spans)] if stage.scope == "run" and spans else []
    if stage.scope == "source":
        by_source: dict[str, list[Span]] = {}
        for span in spans:
            by_source.setdefault(span.source.name, []).append(span)
        batches = list(by_source.values())
    kept: list[Span] = []
    for number, batch in enumerate(batches, start=1):
        described = [[span.source.name, span.source.key, *_describe(span)] for span in batch]
        key = key_of(
            "verdicts 2",
            stage.name,
            stage.version,
            asdict(stage.config),
            described,
            signals_key(stage, batch[0].source),
        )
        sources = {span.source.name: span.source for span in batch}
        known = this.cache.load("verdicts", key)
        if known is None:
            verdicts = decide(stage, batch, _Signals(this.cache, stage, batch), this.broken.get(stage.name, {}))
            if not any(verdict.failed for verdict in verdicts):
                this.cache.save("verdicts", key, [_pack(verdict) for verdict in verdicts])
        else:
            verdicts = [_unpack(row, sources) for row in known]
        if not isinstance(stage, Adds):  # whose work is what they add
            work.add(known is not None, len(batch))
        for verdict in verdicts:
            this.note(position, stage.name, verdict)
        kept += [verdict.span for verdict in verdicts if verdict.kept]
        this.progress(stage.name, number, len(batches), "")
    return kept


class _Signals(Mapping[str, "Mapping[str, np.ndarray]"]):
    """What a stage's observer collected, by source key; read from the cache when asked for, one source at a time."""

    def __init__(self, cache: Cache, stage: Stage, spans: Sequence[Span]) -> None:
        self._cache, self._stage = cache, stage
        self._sources = {span.source.key: span.source for span in spans}
        self._last: tuple[str, Mapping[str, np.ndarray]] = ("", {})

    def __getitem__(self, key: str) -> Mapping[str, np.ndarray]:
        if self._last[0] != key:
            signals = self._cache.load_signals(self._stage.name, signals_key(self._stage, self._sources[key]))
            if signals is None:
                raise KeyError(key)
            self._last = (key, signals)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _describe(span: Span) -> list[Any]:
    return [span.start, span.end, span.fps, span.step, span.caption, dict(span.notes)]


def _pack(verdict: Verdict) -> list[Any]:
    return [
        verdict.span.source.name,
        _describe(verdict.span),
        [verdict.kept, verdict.measure, verdict.value, verdict.threshold, verdict.reason, verdict.like],
    ]


def _unpack(row: list[Any], sources: Mapping[str, Source]) -> Verdict:
    name, span, decision = row
    return Verdict(Span(sources[name], *span), *decision)


def _encode(
    this: Run, spans: Sequence[Span], sizes: Mapping[str, tuple[int, int]], frames: Mapping[str, int]
) -> dict[tuple[str, int, int], Failure]:
    """Encode the clips that are not cached, source by source; returns why, by source key and span, for what failed."""
    jobs: dict[str, tuple[Source, list[Span], tuple[int, int], Plan]] = {}
    asked: set[str] = set()
    work = this.work.setdefault("write", Work())
    for span in spans:
        if is_copied(span, frames[span.source.name]):
            work.copied += 1
            continue
        size = sizes[span.source.name]
        key = clip_key(span, size, this.config.write)
        if key in asked:  # a copy of a file, with duplicates allowed
            continue
        asked.add(key)
        found = this.cache.path("clips", key, ".mp4").exists()
        work.add(found)
        if not found:
            jobs.setdefault(span.source.key, (span.source, [], size, this.job))[1].append(span)
    todo = list(jobs.values())
    died = Failure("the process that encoded it died, of the file or for want of memory")
    errors = executor(this.config.executor, this.config.workers)(
        encode_source,
        todo,
        lambda n, i: this.progress("write", n, len(todo), todo[i][0].name),
        lambda i: {(span.start, span.end): died for span in todo[i][1]},
    )
    return {(key, *span): why for key, failed in zip(jobs, errors, strict=True) for span, why in failed.items()}


def _add(
    this: Run,
    spans: Sequence[Span],
    sizes: Mapping[str, tuple[int, int]],
    frames: Mapping[str, int],
    failures: dict[tuple[str, int, int], Failure],
) -> None:
    """Let the stages that add to clips look at those they have not, source by source; what fails joins `failures`."""
    stages = adding(this.stages)
    if not stages:
        return
    jobs: dict[str, tuple[Source, list[Stored], Plan]] = {}
    asked: set[tuple[str, str]] = set()
    for span in spans:
        size, copied = sizes[span.source.name], is_copied(span, frames[span.source.name])
        key = stored_key(span, size, this.config, copied)
        if (key, span.caption) in asked or (span.source.key, span.start, span.end) in failures:
            continue
        asked.add((key, span.caption))
        missing = tuple(stage.name for stage in stages if load_added(this.cache, stage, span, key) is None)
        for stage in stages:
            this.work[stage.name].add(stage.name not in missing)
        if missing:
            stored = Stored(span, clip_of(this, span, size), key, copied, missing)
            jobs.setdefault(span.source.key, (span.source, [], this.job))[1].append(stored)
    todo = list(jobs.values())
    died = Failure("the process that looked at it died, for want of memory perhaps")
    errors = executor(this.config.executor, this.config.workers)(
        add_to_clips,
        todo,
        lambda n, i: this.progress("add", n, len(todo), todo[i][0].name),
        lambda i: {stored.clip.id: died for stored in todo[i][1]},
    )
    for (source, clips, _), failed in zip(todo, errors, strict=True):
        failures.update(
            ((source.key, stored.span.start, stored.span.end), failed[stored.clip.id])
            for stored in clips
            if stored.clip.id in failed
        )


def _commit(
    this: Run,
    src: str | Path,
    sources: Sequence[Source],
    inputs: Sequence[str],
    packed: Packed,
    store: Store | None,
) -> dict[str, Any]:
    """Put the new results in the place of the old. In between there is no dataset.json: half-new never looks whole."""
    out, rows, shards = this.out, this.ledger(sources), packed.clips
    for name in ("summary.json", "dataset.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "shards", ignore_errors=True)
    if shards:
        (out / ".cache" / "next" / "shards").replace(out / "shards")
    replace_derived(this, packed)
    save_ledger(rows, out / NAME)
    configs.save(this.config, out / "config.toml")
    summary = _summary(this, src, rows)
    if not shards:
        raise WorldloomError(
            "no clip was kept",
            got=f"{len(sources)} sources: " + _tally(summary),
            do=f"worldloom curate explain FILE --out {out} says why",
        )
    settings = {key: value for key, value in configs.to_dict(this.config).items() if key not in HOW}
    place = str(src) if is_url(str(src)) else str(Path(src).absolute())
    index = commit_dataset(
        out,
        shards,
        inputs=inputs,
        config=settings,
        metadata={"source": place, **statistics_table(this.statistics), **_facts(this)},
        store=store,
    )
    summary = {"dataset": index.id, **summary, "derived": commit_derived(this, index, packed, store)}
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _facts(this: Run) -> dict[str, Any]:
    """What ``dataset.json`` says about that which stages have added to the clips."""
    stages = [stage for stage in adding(this.stages) if not isinstance(stage, Derives)]
    return {name: fact for stage in stages for name, fact in stage.facts().items()}


def _summary(this: Run, src: str | Path, rows: Sequence[Decision]) -> dict[str, Any]:
    every = accounts(rows)
    stages = ["probe", *(stage.name for stage in this.stages), "write"]
    return {
        "source": str(src),
        "out": str(this.out),
        "sources": len(every),
        "clips": sum(row.stage == "write" and row.kept for row in rows),
        "dropped": {
            stage: sum(row.stage == stage and not row.kept and not row.failed for row in rows) for stage in stages
        },
        "failed": sum(row.failed for row in rows),
        "unaccounted": sum(gap.end - gap.start for gap in reconcile(rows)),
        "quarantined": sum(bool(row.traceback) for row in rows),
        "frames": {
            what: sum(getattr(account, what) for account in every.values())
            for what in ("frames", "kept", "dropped", "failed")
        },
        "work": {name: asdict(work) for name, work in this.work.items()},
    }


def _tally(summary: Mapping[str, Any]) -> str:
    parts = [f"{count} dropped by {stage}" for stage, count in summary["dropped"].items() if count]
    return ", ".join([*parts, f"{summary['failed']} failed"] if summary["failed"] else parts)


def _sweep(out: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for torn in (*out.glob("*.worldloom-tmp*"), *(out / ".cache").rglob("*.worldloom-tmp*")):
        torn.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the output folder; the operating system lets go of it when the process ends, however it ends."""
    (out / ".cache").mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: no lock, and so no protection
        yield
        return
    deadline = time.monotonic() + _PATIENCE
    with open(out / ".cache" / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WorldloomError(
                        "another run is at work in this folder", got=out, do="wait for it to end"
                    ) from None
                time.sleep(0.05)
        yield
