"""The quickstart's one page: what went in, how training went, what it changed, what it makes, where it comes from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from worldloom.lineage import Node
    from worldloom.schema import Sample
    from worldloom_model_zoo.evaluate import EvalResult


@dataclass(frozen=True)
class Story:
    """Everything the page tells."""

    model: str
    """What was fine-tuned."""
    source: str
    """What it was fine-tuned on, in words."""
    before: EvalResult
    after: EvalResult
    trained: Mapping[str, Any]
    """Summary of the training run."""
    curation: Mapping[str, Any]
    """Part -> what curation kept and dropped."""
    sample: Sample
    strip: np.ndarray
    """Truth above the sample, uint8 ``(h, w, 3)``."""
    lineage: Node
    seconds: Mapping[str, float]
    """Step -> its time."""


def result_rows(before: Any, after: Any) -> list[tuple[str, tuple[str, str, str]]]:
    """The rows of the final table: label, then before, after, baseline."""
    from worldloom_model_zoo.evaluate import BASELINE, MODEL

    def db(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} dB"

    return [
        ("PSNR, 8 frames ahead", (db(before.psnr[MODEL]), db(after.psnr[MODEL]), db(after.psnr[BASELINE]))),
        (
            "mean PSNR of frames",
            tuple(db(r.psnr_per_frame[k]) for r, k in ((before, MODEL), (after, MODEL), (after, BASELINE))),
        ),
        ("SSIM", tuple(f"{r.ssim[k]:.3f}" for r, k in ((before, MODEL), (after, MODEL), (after, BASELINE)))),
        ("action sensitivity", (db(before.action_sensitivity), db(after.action_sensitivity), db(0.0))),
    ]  # pyright: ignore[reportReturnType]


def write_report(story: Story, out: Path) -> Path:
    """Write OUT/report.html."""
    from worldloom.compare import side_by_side
    from worldloom.report import Report
    from worldloom_model_zoo.evaluate import MODEL

    before, after, trained, sample = story.before, story.after, story.trained, story.sample
    report = Report("Worldloom quickstart", f"{story.model}, fine-tuned on {story.source}")
    sensitivity = after.action_sensitivity
    report.facts(
        {
            "PSNR before": f"{before.psnr[MODEL]:.2f} dB",
            "PSNR after": f"{after.psnr[MODEL]:.2f} dB",
            "over repeating the last frame": f"{after.gain:+.2f} dB",
            "action sensitivity": "no actions" if sensitivity is None else f"{sensitivity:+.2f} dB",
            "time": f"{sum(story.seconds.values()):.0f} s",
        }
    )
    report.section("What it learnt")
    rows = [[label, *cells] for label, cells in result_rows(before, after)]
    report.table(["", "before", "after", "repeat last frame"], rows)
    report.text(
        f"{after.windows} windows of {after.clips} clips that training never saw: {after.config.context} frames given, "
        f"{after.config.horizon} predicted. Each clip is shown as truth, model, repeated last frame."
    )
    if after.examples and before.examples:
        videos = []
        for old, new in zip(before.examples, after.examples, strict=True):
            for when, example in (("before", old), ("after", new)):
                panels = (example.truth, example.model, example.baseline)
                videos.append((f"{when}: {example.caption}", side_by_side(panels, after.config.context)))
        report.videos(videos, columns=2)
    else:
        report.text("The evaluations were found finished; their videos are in eval-before and eval-after.")

    report.section("Training")
    report.line_chart("Loss", _losses(out / "train" / "metrics.jsonl"), "step", "mean squared error of the velocity")
    report.text(f"{trained['steps']} steps. The adapter is in `{trained['model']}`, its settings beside it.")

    report.section("A sample")
    report.image(story.strip, "Top: what happened. Bottom: the model, given the first frames and the actions.")
    report.videos([(sample.id, Path(sample.path).read_bytes())], columns=3)

    report.section("Data")
    parts = []
    for name, part in story.curation.items():
        frames = part["frames"]
        dropped = ", ".join(f"{stage} {n}" for stage, n in part["dropped"].items() if n) or "nothing"
        parts.append([name, part["sources"], part["clips"], frames["kept"], frames["frames"], dropped, part["failed"]])
    report.table(["part", "sources", "clips", "frames kept", "frames", "clips dropped by", "failed"], parts)

    report.section("Where the sample comes from")
    report.text("```\n" + _text_of(story.lineage) + "\n```")
    report.text(f"The same at any time: `worldloom lineage {sample.id}`.")
    report.table(["step", "seconds"], [[name, seconds] for name, seconds in story.seconds.items()], "Time")
    return report.save(out / "report.html")


def _losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    curves: dict[str, list[tuple[float, float]]] = {"training": [(line["step"], line["loss"]) for line in lines]}
    held_out = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    if held_out:
        curves["held out"] = held_out
    return curves


def _text_of(tree: Node) -> str:
    from rich.console import Console

    from worldloom import lineage

    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(lineage.render(tree))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()
