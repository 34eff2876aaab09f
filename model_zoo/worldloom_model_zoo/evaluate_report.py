"""An evaluation as a command: run once, found again, shown as a table and as an HTML page with videos."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.artifacts import Store, atomic_write, code_version
from worldloom.compare import side_by_side
from worldloom.errors import WorldloomError
from worldloom.progress import progress
from worldloom.shards import Dataset, open_dataset
from worldloom_model_zoo.evaluate import (
    BASELINE,
    DERIVED,
    MODEL,
    SHUFFLED,
    TOKENIZER,
    EvalConfig,
    EvalResult,
    evaluate,
    identity,
)

if TYPE_CHECKING:
    from worldloom.report import Report
    from worldloom_model_zoo.predict.pipeline import PredictPipeline


def run(pipeline: Any, name: str, data: str | Path, config: EvalConfig, out: str | Path) -> EvalResult:
    """What ``worldloom eval`` does: measure, or find the finished measurement; write it, and record it.

    Raises:
        WorldloomError: as `evaluate`; also a model of another family.
    """
    from worldloom.generation import model_origin
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

    if not isinstance(pipeline, PredictPipeline):
        raise WorldloomError("eval measures models that predict video", got=name, do="give one of the predict family")
    out, dataset = Path(out), open_dataset(data)
    key = _key(pipeline, dataset, config)
    if (found := _finished(out, key)) is not None:
        return found
    started = time.monotonic()
    with progress("evaluating") as shown:
        result = evaluate(pipeline, dataset, config, progress=shown)
    plain = {"key": key, **result.to_dict()}
    atomic_write(out / "metrics.json", json.dumps(plain, indent=1) + "\n")
    store, inputs = Store(), [dataset.index.id]
    if pipeline.ref is not None:
        inputs.insert(0, model_origin(store, dataclasses.asdict(pipeline.ref)))
    artifact = store.put(
        out / "metrics.json", kind="evaluation", inputs=inputs, config=dataclasses.asdict(config), seed=config.seed
    )
    write_report(result, out / "report.html", name)
    summary = {
        "id": artifact.id,
        "key": key,
        "model": name,
        "data": str(data),
        **{k: plain[k] for k in ("psnr", "psnr_per_frame", "ssim", *DERIVED, "windows", "clips", "notes")},
        "seconds": round(time.monotonic() - started, 2),
        "report": str(out / "report.html"),
        "code_version": code_version(),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: the evaluation is whole
    return result


def _key(pipeline: PredictPipeline, dataset: Dataset, config: EvalConfig) -> str:
    facts = identity(pipeline)
    model = (facts["model"] or {}).get("digest", "")
    decides = [model, facts["tokenizer"], facts["sampler"], dataset.index.id, dataclasses.asdict(config)]
    text = json.dumps([*decides, code_version(), str(pipeline.device)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(out: Path, key: str) -> EvalResult | None:
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        if summary["key"] != key or metrics.pop("key") != key or not (out / "report.html").is_file():
            return None
        return EvalResult.from_dict(metrics)
    except (OSError, ValueError, KeyError, TypeError):
        return None


_COLUMNS = ("", "PSNR dB", "mean of frames dB", "SSIM")


def table_rows(result: EvalResult) -> list[tuple[str, float, float, float]]:
    """Rows under ("", PSNR, mean PSNR of frames, SSIM), the model first."""
    kinds = [kind for kind in (MODEL, BASELINE, SHUFFLED, TOKENIZER) if kind in result.psnr]
    return [(kind, result.psnr[kind], result.psnr_per_frame[kind], result.ssim[kind]) for kind in kinds]


def print_table(result: EvalResult) -> None:
    """The result on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for kind, *values in table_rows(result):
        table.add_row(kind, *(f"{value:.3f}" for value in values))
    console = Console(highlight=False, markup=False)
    console.print(table)
    per_frame = _signed(result.gain_per_frame)
    console.print(f"\nmodel minus repeat last frame  {_signed(result.gain)}  (mean of frames {per_frame})")
    if result.action_sensitivity is not None and result.action_sensitivity_per_frame is not None:
        per_frame = _signed(result.action_sensitivity_per_frame)
        console.print(
            f"action sensitivity             {_signed(result.action_sensitivity)}  (mean of frames {per_frame})"
        )
    console.print(
        f"{result.windows} windows of {result.clips} clips, {result.config.context} frames given, "
        f"{result.config.horizon} predicted, {result.frames_per_second:.3g} frames/s"
    )
    for note in result.notes:
        console.print(note)


# -- the report ------------------------------------------------------------------------------------------------------


def write_report(result: EvalResult, path: str | Path, name: str) -> Path:
    """A self-contained HTML page of one evaluation."""
    from worldloom.report import Report

    report = Report(f"Evaluation of {name}", f"{result.dataset['path']} ({result.dataset['id']})")
    add_to_report(report, result)
    return report.save(path)


def add_to_report(report: Report, result: EvalResult, columns: int = 2) -> None:
    """Figures, table, curve and videos of an evaluation, as blocks of a report."""
    sensitivity = result.action_sensitivity
    report.facts(
        {
            "PSNR of the model": f"{result.psnr[MODEL]:.2f} dB",
            "over repeating the last frame": _signed(result.gain),
            "action sensitivity": "no actions" if sensitivity is None else _signed(sensitivity),
            "SSIM": f"{result.ssim[MODEL]:.3f}",
        }
    )
    config = result.config
    report.table(
        _COLUMNS,
        table_rows(result),
        f"{result.windows} windows of {result.clips} clips: {config.context} frames given, {config.horizon} predicted",
    )
    for note in result.notes:
        report.text(note)
    curves = {kind: list(enumerate(values, start=1)) for kind, values in result.curves.items()}
    report.line_chart("PSNR by distance", curves, "frames ahead", "dB")
    if result.examples:
        report.text(
            "Truth, model, repeated last frame, from left to right. The bar above is grey over given frames and blue "
            "over predicted ones."
        )
        videos = [
            (shown.caption, side_by_side((shown.truth, shown.model, shown.baseline), config.context))
            for shown in result.examples
        ]
        report.videos(videos, columns=columns)
    report.text(
        "PSNR is that of the mean error over all predicted frames (8-bit, all pixels and channels), as torchmetrics "
        "has it. The mean of frames averages each frame's own PSNR, its error floored at 1/12; still frames, which "
        "repeating gets exactly, weigh heavily there. Action sensitivity is the PSNR with the true actions minus that "
        "with another clip's. "
        "The tokenizer row reconstructs the true frames: what the latents can express at best."
    )


def _signed(value: float) -> str:
    """A difference in dB; one that rounds to zero has no minus sign."""
    return f"{round(value, 2) + 0.0:+.2f} dB"
