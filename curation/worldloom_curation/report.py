"""`curate report`: one HTML page about a curated folder: funnel, measured values, clips, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.errors import WorldloomError
from worldloom.report import Report
from worldloom.schema import Decision
from worldloom_curation.ledger import accounts, load_ledger, reconcile

if TYPE_CHECKING:
    from worldloom.shards import Dataset

_SIDE = 160
"""Height of a thumbnail, pixels."""
_SECONDS = 4.0
"""Longest thumbnail."""
_BYTES = 16 << 20
"""Most bytes of thumbnails in one report."""
_PAIRS = 24
"""Most duplicates shown beside what they repeat."""


def make_report(folder: str | Path, clips: int = 24) -> Path:
    """Write ``report.html`` into a curated folder; returns its path.

    Args:
        clips: how many clips to show, spread evenly over the dataset.

    Raises:
        WorldloomError: `folder` holds no ledger.
    """
    folder = Path(folder)
    rows = load_ledger(folder)
    every = accounts(rows)
    written = [row for row in rows if row.stage == "write" and row.kept]
    failed = [row for row in rows if row.failed]
    frames, kept = (sum(getattr(a, name) for a in every.values()) for name in ("frames", "kept"))
    report = Report("Curation report", str(folder.resolve()))
    report.facts(
        {
            "Sources": len(every),
            "Clips kept": len(written),
            "Frames kept": kept,
            "Share of all frames": f"{100 * kept / frames:.1f} %" if frames else "–",
            "Failures": len(failed),
        }
    )
    report.section("Funnel")
    report.text("Every span a stage looked at, in order. Frames of dropped and failed spans leave here.")
    report.table(
        ["Stage", "Spans in", "Kept", "Dropped", "Failed", "Frames lost"], _funnel(rows), caption="From ledger.parquet"
    )
    report.section("Measured values")
    for title, values, threshold in _histograms(rows):
        report.histogram(title, values, threshold)
    _statistics(report, folder)
    if clips and written:
        report.section("Clips")
        _show_clips(report, folder, clips)
    _duplicates(report, folder, rows, bool(clips))
    report.section("Sources")
    _sources(report, rows)
    report.section("Dropped and failed")
    lost = [row for row in rows if not row.kept]
    if lost:
        report.table(
            ["Source", "Frames", "Stage", "Outcome", "Value", "Threshold", "Reason"],
            [
                [
                    row.source,
                    f"{row.start}-{row.end}",
                    row.stage,
                    "failed" if row.failed else "dropped",
                    row.value,
                    row.threshold,
                    row.reason,
                ]
                for row in sorted(lost[:500], key=lambda row: not row.failed)
            ],
            caption=f"The first 500 of {len(lost)}" if len(lost) > 500 else "",
        )
    else:
        report.text("Nothing was dropped, and nothing failed.")
    traces = {row.traceback: row for row in rows if row.traceback}
    if traces:
        report.section("Exceptions")
        report.text("A stage raised on these spans; they are left out, and the next run tries them again.")
        for trace, row in traces.items():
            report.text(f"{row.stage} on {row.source} [{row.start}, {row.end})\n\n```\n{trace}\n```")
    return report.save(folder / "report.html")


def _sources(report: Report, rows: Sequence[Decision]) -> None:
    """A row for each source: what became of its frames, and the mean of everything that was measured in it."""
    gaps = reconcile(rows)
    if gaps:
        report.text("**The ledger does not account for these frames exactly once.**")
        report.table(["Source", "Frames", "Times"], [[g.source, f"{g.start}-{g.end}", g.times] for g in gaps])
    else:
        report.text("Kept, dropped and failed spans together have every frame of every source exactly once.")
    measures = list(dict.fromkeys((row.stage, row.measure) for row in rows if row.value is not None))
    values: dict[tuple[str, str, str], list[float]] = {}
    clips: dict[str, int] = {}
    for row in rows:
        clips[row.source] = clips.get(row.source, 0) + (row.stage == "write" and row.kept)
        if row.value is not None:
            values.setdefault((row.source, row.stage, row.measure), []).append(row.value)
    table: list[list[object]] = []
    for name, a in accounts(rows).items():
        means = [values.get((name, *measure)) for measure in measures]
        share = a.kept / a.frames if a.frames else None
        table.append(
            [name, a.frames, a.kept, a.dropped, a.failed, share, clips[name]]
            + [sum(found) / len(found) if found else None for found in means]
        )
    columns = ["Source", "Frames", "Kept", "Dropped", "Failed", "Share kept", "Clips"]
    columns += [f"{stage}: {measure}" for stage, measure in measures]
    report.table(columns, table, caption="Of a measure: the mean over the spans of the source")


def _duplicates(report: Report, folder: Path, rows: Sequence[Decision], show: bool) -> None:
    """Every dropped copy beside the clip that it repeats, from the source files where those are still there."""
    by_id = {row.clip_id: row for row in rows}
    pairs = [(by_id[row.like], row) for row in rows if row.like in by_id and not row.kept]
    if not pairs:
        return
    report.section("Duplicates")
    shown: list[tuple[str, bytes]] = []
    root = _source_folder(folder) if show else None
    for first, copy in pairs[:_PAIRS]:
        both = [_span_thumbnail(root, row, what) for row, what in ((first, "kept"), (copy, "dropped"))]
        if all(both) and sum(len(data) for _, data in shown) < _BYTES // 2:
            shown += [thumbnail for thumbnail in both if thumbnail is not None]
    if shown:
        report.text("What was kept on the left, its copy on the right.")
        report.videos(shown, columns=2)
    report.table(
        ["Kept", "Frames", "Copy", "Frames", "Measure", "Value", "Threshold"],
        [
            [a.source, f"{a.start}-{a.end}", b.source, f"{b.start}-{b.end}", b.measure, b.value, b.threshold]
            for a, b in pairs[:500]
        ],
        caption=f"The first 500 of {len(pairs)}" if len(pairs) > 500 else "",
    )


def _source_folder(folder: Path) -> Path | None:
    """Where the sources are; None if they are gone, or were never on this machine."""
    from worldloom.shards import open_dataset

    try:
        root = Path(str(open_dataset(folder).index.metadata.get("source", "")))
    except WorldloomError:
        return None
    return root if root.exists() else None


def _span_thumbnail(root: Path | None, row: Decision, what: str) -> tuple[str, bytes] | None:
    """A thumbnail of frames of a source file; None where there is no such file (an episode, or a file since moved)."""
    from worldloom import media

    if root is None:
        return None
    file = root if root.is_file() else root / row.source
    try:
        info = media.probe(file)
        return f"{what}: {row.source} [{row.start}, {row.end})", _small(
            file, row.start, row.end, info.height, info.width, float(info.fps)
        )
    except WorldloomError:
        return None


def _small(video: str | bytes | Path, start: int, end: int, height: int, width: int, fps: float) -> bytes:
    """The first seconds of frames ``[start, end)``, at most `_SIDE` pixels high, as an mp4."""
    from worldloom import media

    low = max(2, min(_SIDE, height) // 2 * 2)
    size = (low, max(2, round(width * low / height / 2) * 2))
    frames = media.read_frames(video, start, min(end, start + max(1, round(_SECONDS * fps))), size=size)
    encoded = media.write_video(None, frames, fps, crf=26)
    assert encoded is not None
    return encoded


def _statistics(report: Report, folder: Path) -> None:
    """What ``dataset.json`` says about actions, states and rewards, a row for each component."""
    from worldloom.shards import open_dataset

    try:
        tables = open_dataset(folder).index.metadata.get("statistics", {})
    except WorldloomError:
        return
    for what, table in tables.items():
        columns = ["min", "q01", "mean", "q50", "q99", "max", "std"]
        report.section(f"Statistics: {what}")
        report.table(
            ["Component", *columns],
            [[name, *(table[column][i] for column in columns)] for i, name in enumerate(table["names"])],
            caption=f"{table['count']} rows",
        )


def _stages(rows: Sequence[Decision]) -> list[str]:
    """The stages in the order of the pipeline; a source that got far shows it."""
    longest: list[str] = []
    by_source: dict[str, list[str]] = {}
    for row in rows:
        seen = by_source.setdefault(row.source, [])
        if row.stage not in seen:
            seen.append(row.stage)
            longest = max(longest, seen, key=len)
    return list(longest)


def _funnel(rows: Sequence[Decision]) -> list[list[object]]:
    table: list[list[object]] = []
    for stage in _stages(rows):
        of_stage = [row for row in rows if row.stage == stage]
        kept = sum(row.kept for row in of_stage)
        failed = sum(row.failed for row in of_stage)
        lost = sum(row.end - row.start for row in of_stage if not row.kept)
        table.append([stage, len(of_stage), kept, len(of_stage) - kept - failed, failed, lost])
    return table


def _histograms(rows: Sequence[Decision]) -> list[tuple[str, list[float], float | None]]:
    """(title, values, threshold) of every measure that has more than one value; the strictest threshold is drawn."""
    found: dict[tuple[str, str], list[Decision]] = {}
    for row in rows:
        if row.value is not None:
            found.setdefault((row.stage, row.measure), []).append(row)
    charts: list[tuple[str, list[float], float | None]] = []
    for (stage, measure), measured in found.items():
        values = [row.value for row in measured if row.value is not None]
        thresholds = [row.threshold for row in measured if row.threshold is not None]
        if len(set(values)) > 1 and measure != "earlier copies":
            charts.append((f"{stage}: {measure}", values, max(thresholds, default=None)))
    return charts


def _show_clips(report: Report, folder: Path, count: int) -> None:
    from worldloom.shards import open_dataset

    try:
        dataset = open_dataset(folder)
    except WorldloomError as error:
        report.text(f"The clips cannot be shown: {error.what}.")
        return
    total = len(dataset)
    chosen = sorted({i * total // count for i in range(count)}) if total > count else list(range(total))
    report.text(f"{len(chosen)} of {total} clips, small and at most {_SECONDS:g} s of each. Click stops and starts.")
    shown: list[tuple[str, bytes]] = []
    for number in chosen:
        if sum(len(data) for _, data in shown) >= _BYTES // 2:
            report.text(f"Only {len(shown)} are shown: more would make this page larger than it should be.")
            break
        shown.append(_thumbnail(dataset, number))
    report.videos(shown)


def _thumbnail(dataset: Dataset, number: int) -> tuple[str, bytes]:
    sample = dataset.load(number)
    clip = sample.clip
    assert sample.video is not None, "a curated dataset holds clips"
    small = _small(sample.video, 0, clip.frames, clip.height, clip.width, clip.fps)
    caption = f"{clip.source} [{clip.start}, {clip.end})"
    return (f"{caption}: {clip.caption}" if clip.caption else caption), small
