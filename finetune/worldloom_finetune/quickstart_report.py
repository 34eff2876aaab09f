"""The quickstart's one page: what went in, how training went, what it changed, what it makes, where it comes from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom_finetune.quickstart import Loop, result_rows

if TYPE_CHECKING:
    from worldloom.lineage import Node
    from worldloom.schema import Sample
    from worldloom_model_zoo.evaluate import EvalResult


def write_report(
    loop: Loop,
    before: EvalResult,
    after: EvalResult,
    trained: dict[str, Any],
    sample: Sample,
    strip: np.ndarray,
    tree: Node,
) -> Path:
    """Write OUT/report.html."""
    from worldloom.compare import side_by_side
    from worldloom.report import Report
    from worldloom_model_zoo.evaluate import MODEL

    c = loop.config
    source = f"your videos in {loop.videos}" if loop.videos else f"recorded episodes of {c.env_id}"
    report = Report("Worldloom quickstart", f"{loop.model}, fine-tuned on {source}")
    sensitivity = after.action_sensitivity
    report.facts(
        {
            "PSNR before": f"{before.psnr[MODEL]:.2f} dB",
            "PSNR after": f"{after.psnr[MODEL]:.2f} dB",
            "over repeating the last frame": f"{after.gain:+.2f} dB",
            "action sensitivity": "no actions" if sensitivity is None else f"{sensitivity:+.2f} dB",
            "time": f"{sum(loop.seconds.values()):.0f} s",
        }
    )
    report.section("What it learnt")
    report.table(
        ["", "before", "after", "repeat last frame"], [[label, *cells] for label, cells in result_rows(before, after)]
    )
    report.text(
        f"{after.windows} windows of {after.clips} clips that training never saw: {after.config.context} frames given, "
        f"{after.config.horizon} predicted. Each clip is shown as truth, model, repeated last frame."
    )
    if after.examples:
        videos = []
        for old, new in zip(before.examples, after.examples, strict=False):
            for when, example in (("before", old), ("after", new)):
                panels = (example.truth, example.model, example.baseline)
                videos.append((f"{when}: {example.caption}", side_by_side(panels, after.config.context)))
        report.videos(videos, columns=2)
    else:
        report.text("The evaluations were found finished; their videos are in eval-before and eval-after.")

    report.section("Training")
    curve = _losses(Path(loop.out) / "train" / "metrics.jsonl")
    report.line_chart("Loss", curve, "step", "mean squared error of the velocity")
    report.text(
        f"{trained['steps']} steps of {c.batch_size} windows of {c.frames} frames; LoRA of rank {c.lora_rank}, "
        f"strategy {'DeepSpeed ZeRO-2' if c.deepspeed else 'plain'}. The adapter is in `{trained['model']}`."
    )

    report.section("A sample")
    report.image(strip, "Top: what happened. Bottom: the model, given the first frames and the actions.")
    report.videos([(sample.id, Path(sample.path).read_bytes())], columns=3)

    report.section("Data")
    rows = []
    for name, part in loop.facts.get("curation", {}).items():
        frames = part["frames"]
        dropped = ", ".join(f"{stage} {n}" for stage, n in part["dropped"].items() if n) or "nothing"
        rows.append([name, part["sources"], part["clips"], frames["kept"], frames["frames"], dropped, part["failed"]])
    report.table(["part", "sources", "clips", "frames kept", "frames", "clips dropped by", "failed"], rows)

    report.section("Where the sample comes from")
    report.text("```\n" + _text_of(tree) + "\n```")
    report.text(f"The same at any time: `worldloom lineage {sample.id}`.")
    report.table(["step", "seconds"], [[name, seconds] for name, seconds in loop.seconds.items()], "Time")
    return report.save(loop.out / "report.html")


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
