"""``worldloom curate``: run, record, explain, report, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from worldloom_curation.pipeline import Progress


class _Curate(click.Group):
    """Imports the recorder and the search only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", "record", "explain", "diff", "report", "export", "search"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "record":
            from worldloom_curation.record import record_command

            return record_command
        if cmd_name == "search":
            from worldloom_curation.search import search_command

            return search_command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Curate, name="curate")
def curate() -> None:
    """Turn videos or recorded episodes into a dataset of clips, with a reason for every decision."""


@curate.command("run")
@click.argument("src", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Dataset folder to make, or to bring up to date.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="One setting, e.g. motion.threshold=0.3.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; the result does not depend on it.")
@click.option("--executor", type=click.Choice(["local", "ray"]), help="Where they run; nor does it depend on that.")
@click.option("--camera", "cameras", multiple=True, help="Robot datasets: only this camera; may be given again.")
@click.option("--help-config", is_flag=True, help="List every setting and its default.")
def run_command(
    src: str | None,
    out: Path | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
    workers: int | None,
    executor: str | None,
    cameras: tuple[str, ...],
    help_config: bool,
) -> None:
    """Curate SRC: a folder, a video file, a dataset made by `curate record` or by LeRobot, or a URL that is allowed.

    Run again after a change, or after an interruption: only what is not done yet is done.

    The exit code is 3 if a stage raised on some clips, which it leaves out: `worldloom curate explain` says why.
    """
    from worldloom.errors import WorldloomError
    from worldloom_curation import config as curation_config

    if help_config:
        _print_settings()
        return
    if src is None or out is None:
        raise click.UsageError("give SRC and --out DIR")
    if workers is not None:
        overrides = (*overrides, f"workers={workers}")
    if executor is not None:
        overrides = (*overrides, f"executor='{executor}'")
    if cameras:
        overrides = (*overrides, f"sources.cameras={json.dumps(cameras)}")
    settings = curation_config.load(config_file, overrides)
    from worldloom_curation.pipeline import run

    with _Display() as display:
        try:
            summary = run(src, out, settings, progress=display)
        except WorldloomError:
            display.stop()
            raise
    click.echo(_said(summary))
    if summary["quarantined"]:
        click.get_current_context().exit(3)


def _print_settings() -> None:
    from worldloom import config as configs
    from worldloom_curation.config import config_class

    for name, kind, default, sentence in configs.describe(config_class()):
        click.echo(f"{name} = {default!r}  ({kind})\n    {sentence}")


def _said(summary: Mapping[str, Any]) -> str:
    """The last words of a run: what came from the cache, what was dropped, where the results are."""
    lines, width = [], max(map(len, summary["work"]))
    for stage, work in summary["work"].items():
        copied = f", {work['copied']} copied" if work["copied"] else ""
        lines.append(f"{stage:<{width}}  {work['cached']} cached, {work['computed']} computed{copied}")
    frames = summary["frames"]
    dropped = ", ".join(f"{stage} {count}" for stage, count in summary["dropped"].items() if count)
    lines.append(
        f"{summary['sources']} sources, {frames['frames']} frames -> {summary['clips']} clips, {frames['kept']} frames"
    )
    lines.append(f"dropped: {dropped or 'nothing'}; failed: {summary['failed']}")
    if count := summary["quarantined"]:
        clips = "1 clip" if count == 1 else f"{count} clips"
        lines.append(f"{clips} in quarantine: a stage raised an exception there; see {summary['out']}/ledger.parquet")
    lines.append(f"{summary['dataset']} in {summary['out']}")
    lines += [f"{identity} in {summary['out']}/{name}" for name, identity in summary["derived"].items()]
    lines.append(f"look at it: worldloom curate report --out {summary['out']}")
    return "\n".join(lines)


class _Display:
    """Progress on stderr: bars on a terminal, otherwise one plain line when a step is done."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<11}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars off the terminal."""
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, step: str, done: int, total: int, last: str) -> None:
        if self._bars is None:
            if done == total:
                click.echo(f"{step}: {done} of {total}", err=True)
            return
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total, last="")
        self._bars.update(self._tasks[step], completed=done, last=last)


if TYPE_CHECKING:
    _: Progress = _Display()


@curate.command("explain")
@click.argument("clip_or_file")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The curated folder.")
def explain_command(clip_or_file: str, out: Path) -> None:
    """Print every decision about CLIP_OR_FILE: a clip id (or its beginning) or a source file."""
    from rich.console import Console
    from rich.table import Table

    from worldloom_curation.ledger import load_ledger, rows_about

    rows = rows_about(load_ledger(out), clip_or_file)
    table = Table(show_lines=False)
    for name in ("clip", "source", "frames", "stage", "decision", "measured", "reason"):
        table.add_column(name, overflow="fold", no_wrap=name in ("clip", "frames", "stage", "decision"))
    for row in rows:
        decision = "failed" if row.failed else "kept" if row.kept else "dropped"
        measured = ""
        if row.value is not None:
            measured = f"{row.measure} {row.value:.4g}"
            measured += f" (threshold {row.threshold:.4g})" if row.threshold is not None else ""
        style = "red" if row.failed else "yellow" if not row.kept else ""
        cells = (row.clip_id, row.source, f"{row.start}-{row.end}", row.stage, decision, measured, row.reason)
        table.add_row(*(_literal(cell) for cell in cells), style=style)
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)
    for trace in dict.fromkeys(row.traceback for row in rows if row.traceback):
        click.echo(f"\n{trace.rstrip()}")


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@curate.command("diff")
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, for a program.")
def diff_command(run_a: Path, run_b: Path, as_json: bool) -> None:
    """Which clips met another fate in the curated folder RUN_B than in RUN_A: by which stage, value and threshold."""
    from worldloom_curation import diff as differ
    from worldloom_curation.ledger import load_ledger

    before, after = load_ledger(run_a), load_ledger(run_b)
    if as_json:
        click.echo(json.dumps(differ.report(before, after), indent=1))
        return
    changes = differ.diff(before, after)
    if not changes:
        click.echo("every frame met the same fate in both runs")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False)
    for name in ("source", "frames", "before", "after", "why"):
        table.add_column(name, overflow="fold", no_wrap=name != "source" and name != "why")
    for change in changes:
        cells = (change.source, f"{change.start}-{change.end}", *change.fate, change.why)
        table.add_row(*(_literal(cell) for cell in cells))
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)
    for name, count in differ.tally(changes).items():
        click.echo(f"{name}: {count['changes']} changes, {count['frames']} frames")


@curate.command("report")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The curated folder.")
@click.option("--clips", default=24, type=click.IntRange(min=0), help="How many clips to show.")
def report_command(out: Path, clips: int) -> None:
    """Make DIR/report.html, one file: funnel, histograms with their thresholds, clips, failures."""
    from worldloom_curation.report import make_report

    click.echo(make_report(out, clips=clips))


@curate.command("export")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; run again to go on.")
@click.option("--format", "form", default="plain", show_default=True, help="One of those listed below.")
@click.option("--camera", default="", help="lerobot: only clips of this camera.")
@click.option("--caption-model", default="worldloom", show_default=True, help="cosmos-*: captions are NAME_caption.")
@click.option("--clips-per-tar", default=256, show_default=True, type=click.IntRange(min=1), help="Clips in one tar.")
@click.option("--tar-mb", default=1024, show_default=True, type=click.IntRange(min=1), help="MiB in one tar.")
def export_command(
    dataset: Path, out: Path, form: str, camera: str, caption_model: str, clips_per_tar: int, tar_mb: int
) -> None:
    """Write the clips of DATASET in another program's format.

    \b
    plain              ID.mp4, ID.json, and an episode's arrays as they are
    webdataset         a dataset of ours for each bin of resolution, aspect and duration
    lerobot            a LeRobot v3.0 dataset
    cosmos-curate      cosmos-curate's clips/ and metas/v0/
    cosmos-shards      cosmos-curate's v0/resolution_*/aspect_ratio_*/duration_*/ tars
    cosmos3            videos/ and cosmos3_sft.jsonl, which Cosmos 3 trains on
    cosmos-predict2.5  videos/ID.mp4 and metas/ID.txt
    """
    from worldloom.shards import open_dataset
    from worldloom_curation.export import ExportOptions, export

    options = ExportOptions(camera, caption_model, clips_per_tar, tar_mb)
    with _Display() as display:
        opened = open_dataset(dataset)
        counts = export(opened, out, form, options, lambda done, total, last: display("export", done, total, last))
    for name, count in counts.items():
        if isinstance(count, dict):
            click.echo("\n".join(f"  {count[key]:>6} {key}" for key in count))
        elif count and name != "clips":
            click.echo(f"{name}: {', '.join(count) if isinstance(count, list) else count}")
    click.echo(f"{counts['clips']} of {len(opened)} clips in {out}")
