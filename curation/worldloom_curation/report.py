"""`curate report`: one HTML page about a curated folder: funnel, measured values, clips, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.errors import WorldloomError
from worldloom.report import Report
from worldloom.schema import Decision
from worldloom_curation.ledger import accounts, load_ledger

if TYPE_CHECKING:
    from worldloom.shards import Dataset

_SIDE = 160
"""Height of a thumbnail, pixels."""
_SECONDS = 4.0
"""Longest thumbnail."""


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
    if clips and written:
        report.section("Clips")
        _show_clips(report, folder, clips)
    report.section("Sources")
    report.table(
        ["Source", "Frames", "Kept", "Dropped", "Failed"],
        [[name, a.frames, a.kept, a.dropped, a.failed] for name, a in every.items()],
    )
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
    return report.save(folder / "report.html")


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
    report.videos([_thumbnail(dataset, number) for number in chosen])


def _thumbnail(dataset: Dataset, number: int) -> tuple[str, bytes]:
    from worldloom import media

    sample = dataset.load(number)
    clip = sample.clip
    assert sample.video is not None, "a curated dataset holds clips"
    height = min(_SIDE, clip.height // 2 * 2)
    width = max(2, round(clip.width * height / clip.height / 2) * 2)
    frames = media.read_frames(sample.video, 0, max(1, round(_SECONDS * clip.fps)), size=(height, width))
    small = media.write_video(None, frames, clip.fps, crf=26)
    assert small is not None
    caption = f"{clip.source} [{clip.start}, {clip.end})"
    return (f"{caption}: {clip.caption}" if clip.caption else caption), small
