"""An evaluation as a command: run once, found again, shown as a table and as an HTML page with videos."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.artifacts import Store, atomic_write, code_version
from worldloom.compare import side_by_side
from worldloom.errors import WorldloomError
from worldloom.progress import progress
from worldloom.shards import Dataset, open_dataset
from worldloom_model_zoo.evaluate import (
    BASELINE,
    DERIVED,
    MEASURES,
    MODEL,
    SHUFFLED,
    TOKENIZER,
    EvalConfig,
    EvalResult,
    evaluate,
    identity,
)
from worldloom_model_zoo.suite import REAL, reference_id

if TYPE_CHECKING:
    from worldloom.report import Report
    from worldloom_model_zoo.action_following import FollowingResult
    from worldloom_model_zoo.drift import DriftResult
    from worldloom_model_zoo.frechet import FrechetResult
    from worldloom_model_zoo.physics import PhysicsResult
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
    store, inputs = Store(), [dataset.index.id, *filter(None, [reference_id(config.reference)])]
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
        **{k: plain[k] for k in MEASURES if k in plain},
        "seconds": round(time.monotonic() - started, 2),
        "report": str(out / "report.html"),
        "code_version": code_version(),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: the evaluation is whole
    return result


def _key(pipeline: PredictPipeline, dataset: Dataset, config: EvalConfig) -> str:
    facts = identity(pipeline)
    model = (facts["model"] or {}).get("digest", "")
    asked = {**dataclasses.asdict(config), "reference": reference_id(config.reference)}
    decides = [model, facts["tokenizer"], facts["sampler"], dataset.index.id, asked]
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


_COLUMNS = ("", "PSNR dB", "mean of frames dB", "SSIM", "flicker")
_HORIZONS = ("first frames", "PSNR dB", "over repeating dB", "at the last of them dB", "action sensitivity dB")


def table_rows(result: EvalResult) -> list[tuple[str, float, float, float, float | None]]:
    """Rows under ("", PSNR, mean PSNR of frames, SSIM, flicker), the model first."""
    kinds = [kind for kind in (MODEL, BASELINE, SHUFFLED, TOKENIZER) if kind in result.psnr]
    return [
        (kind, result.psnr[kind], result.psnr_per_frame[kind], result.ssim[kind], result.flicker.get(kind))
        for kind in kinds
    ]


def horizon_rows(result: EvalResult) -> list[tuple[int, float, float, float, float | None]]:
    """Rows under (frames, PSNR, gain over them, gain at the last, action sensitivity)."""
    return [dataclasses.astuple(horizon) for horizon in result.horizons]


def following_rows(found: FollowingResult) -> list[tuple[str, float]]:
    """(whose videos, how well their actions are read), real ones first."""
    names = {
        REAL: "real clips, held out",
        TOKENIZER: "real clips through the tokenizer",
        MODEL: "model, true actions",
        SHUFFLED: "model, another clip's actions",
    }
    rows = [(name, found.score[kind]) for kind, name in names.items() if kind in found.score]
    return [*rows, ("guessing", found.chance)]


def frechet_rows(found: FrechetResult) -> list[tuple[str, float, float, float]]:
    """(whose videos, distance, of appearance, of motion), the floor first."""
    names = {REAL: "real clips, held out (floor)", TOKENIZER: "real clips through the tokenizer"}
    return [
        (names.get(kind, kind), found.distance[kind], found.appearance[kind], found.motion[kind])
        for kind in (REAL, TOKENIZER, MODEL, BASELINE)
        if kind in found.distance
    ]


def drift_rows(found: DriftResult) -> list[list[object]]:
    """(statistic, ranges of real frames and of those as trained on, mean of each stretch, shares inside at the end)."""
    return [
        [
            name,
            f"{s.low:.3g} to {s.high:.3g}",
            f"{s.trained[0]:.3g} to {s.trained[1]:.3g}",
            *s.means,
            f"{s.inside[-1]:.0%}",
            f"{s.inside_trained[-1]:.0%}",
        ]
        for name, s in found.statistics.items()
    ]


def physics_rows(found: PhysicsResult) -> list[tuple[str, int, float, float, float, float]]:
    """(quantity, frames ahead, error of the model, floor, of standing still, of the middle of all states)."""
    rows = []
    for name, errors in found.errors.items():
        count = len(errors.model)
        ahead = [frames for frames in (1, 2, 4, 8, 16, 32, 64) if frames < count]
        for frames in [*ahead, count]:
            at = frames - 1
            label = f"{name}, {errors.unit}"
            rows.append((label, frames, errors.model[at], errors.floor[at], errors.still[at], errors.spread))
    return rows


_FRECHET = ("videos of", "distance", "appearance", "motion")
_FOLLOWING = ("videos of", "actions read right")
_PHYSICS = ("error of", "frames ahead", "model", "reader on true frames (floor)", "nothing moved", "always the middle")


def print_table(result: EvalResult) -> None:
    """The result on the terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    _print(console, _COLUMNS, table_rows(result))
    per_frame = _signed(result.gain_per_frame)
    console.print(f"\nmodel minus repeat last frame  {_signed(result.gain)}  (mean of frames {per_frame})")
    if result.action_sensitivity is not None and result.action_sensitivity_per_frame is not None:
        per_frame = _signed(result.action_sensitivity_per_frame)
        console.print(
            f"action sensitivity             {_signed(result.action_sensitivity)}  (mean of frames {per_frame})"
        )
    console.print()
    _print(console, _HORIZONS, horizon_rows(result))
    if result.frechet is not None:
        console.print(f"\nFréchet video distance on {result.frechet.encoder}; not comparable with I3D figures")
        _print(console, _FRECHET, frechet_rows(result.frechet))
    if result.following is not None:
        console.print(f"\naction following ({result.following.measure} of an inverse dynamics model)")
        _print(console, _FOLLOWING, following_rows(result.following))
    if result.drift is not None:
        drift = result.drift
        console.print(f"\ndrift over {drift.frames} frames of {drift.worlds} worlds: {_verdict(drift)}")
        _print(console, _drift_columns(drift), drift_rows(drift))
        if drift.variety:
            console.print("variety  " + "  ".join(f"{value:.2f}" for value in drift.variety))
    if result.physics is not None:
        console.print(
            f"\nphysics against {result.physics.env_id}, {result.physics.episodes} episodes of a random policy"
        )
        _print(console, _PHYSICS, physics_rows(result.physics))
    console.print(
        f"\n{result.windows} windows of {result.clips} clips, {result.config.context} frames given, "
        f"{result.config.horizon} predicted, {result.frames_per_second:.3g} frames/s"
    )
    for note in _notes(result):
        console.print(note)


def _print(console: Any, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(
            *(f"{cell:.3f}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row)
        )
    console.print(table)


def _notes(result: EvalResult) -> list[str]:
    return [
        *result.notes,
        *(result.drift.notes if result.drift else ()),
        *(result.frechet.notes if result.frechet else ()),
    ]


# -- the report ------------------------------------------------------------------------------------------------------


def write_report(result: EvalResult, path: str | Path, name: str) -> Path:
    """A self-contained HTML page of one evaluation."""
    from worldloom.report import Report

    report = Report(f"Evaluation of {name}", f"{result.dataset['path']} ({result.dataset['id']})")
    add_to_report(report, result)
    return report.save(path)


def add_to_report(report: Report, result: EvalResult, columns: int = 2) -> None:
    """Figures, tables, curves and videos of an evaluation, as blocks of a report."""
    sensitivity = result.action_sensitivity
    report.facts(
        {
            "PSNR of the model": f"{result.psnr[MODEL]:.2f} dB",
            "over repeating the last frame": _signed(result.gain),
            "action sensitivity": "no actions" if sensitivity is None else _signed(sensitivity),
            "SSIM": f"{result.ssim[MODEL]:.3f}",
            **_facts(result),
        }
    )
    config = result.config
    report.section("Prediction")
    report.table(
        _COLUMNS,
        table_rows(result),
        f"{result.windows} windows of {result.clips} clips: {config.context} frames given, {config.horizon} predicted",
    )
    for note in _notes(result):
        report.text(note)
    report.table(_HORIZONS, horizon_rows(result), "How far ahead")
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
        "with another clip's. Flicker is how much the error changes from frame to frame, in grey levels; repeating a "
        "frame shows how much moved. "
        "The tokenizer row reconstructs the true frames: what the latents can express at best."
    )
    if result.following is not None:
        _add_following(report, result.following)
    if result.frechet is not None:
        _add_frechet(report, result.frechet)
    if result.physics is not None:
        _add_physics(report, result.physics)
    if result.drift is not None:
        _add_drift(report, result.drift)


def _facts(result: EvalResult) -> dict[str, str]:
    """The figures of the measures on request."""
    facts = {}
    if (found := result.following) is not None and found.measure == "accuracy":
        facts["actions read off its videos"] = f"{found.score[MODEL]:.0%} (real {found.score[REAL]:.0%})"
    elif found is not None:
        facts["actions read off its videos, R²"] = f"{found.score[MODEL]:.2f} (real {found.score[REAL]:.2f})"
    if result.frechet is not None:
        facts["Fréchet distance (not I3D)"] = f"{result.frechet.distance[MODEL]:.3g}"
    if result.drift is not None:
        facts[f"{result.drift.frames} frames"] = _stability(result.drift)
    return facts


def _add_following(report: Report, found: FollowingResult) -> None:
    report.section("Does it do what it is told?")
    what = "Share of actions read right" if found.measure == "accuracy" else "R² of the actions read"
    report.table(
        ("videos of", what.lower()),
        following_rows(found),
        f"{found.actions} actions of each kind, read by a network fitted to {found.fitted} actions of other real clips",
    )
    kinds = [kind for kind in (REAL, TOKENIZER, MODEL, SHUFFLED) if kind in found.score]
    rows = [[name, *(each.get(kind) for kind in kinds)] for name, each in found.by_action.items()]
    report.table(("action", *kinds), rows, what + ", by action")
    report.text(
        "A small inverse dynamics network learns from real clips to tell from four frames which action was taken, and "
        "then looks at the model's videos. What it reads off held-out real clips is the most to be expected; guessing "
        "is the least. Under another clip's actions the video must show those actions. What a wall or an edge keeps "
        "from happening cannot be read in real clips either."
    )


def _add_frechet(report: Report, found: FrechetResult) -> None:
    report.section("Fréchet video distance")
    report.table(_FRECHET, frechet_rows(found), f"To {found.videos} other real videos of {found.frames} frames")
    report.text(
        f"How far the made videos, as a set, are from real ones, in features of `{found.encoder}`. **Not comparable "
        "with published Fréchet video distances**, which use an I3D network, nor with figures of other numbers or "
        "lengths of videos. With few videos even real ones are far from each other: the first row says how far."
    )


def _add_physics(report: Report, found: PhysicsResult) -> None:
    report.section("Physics")
    report.table(
        _PHYSICS,
        physics_rows(found),
        f"{found.episodes} episodes of a random policy in {found.env_id} and in the model",
    )
    for name, errors in found.errors.items():
        series = {
            "model": errors.model,
            "reader on true frames (floor)": errors.floor,
            "nothing moved": errors.still,
        }
        curves = {label: list(enumerate(values, start=1)) for label, values in series.items()}
        report.line_chart(f"Error of {name}", curves, "frames ahead", errors.unit)
    if found.shown:
        report.text("The true simulator on the left, the model on the right, under the same actions.")
        report.videos(
            [(f"episode {i + 1}", side_by_side(pair, found.given)) for i, pair in enumerate(found.shown)], columns=3
        )
    report.text(
        "A random policy acts in the true simulator and, from the same first frames, in the model. Where things are is "
        "known in the simulator; in the model's frames a small network reads it, which was fitted to "
        f"{found.fitted} frames of other episodes. Its error on the simulator's own frames is the floor: a model at "
        "the floor cannot be told from the truth; one that does worse than claiming that nothing moved has no physics."
    )


def _add_drift(report: Report, found: DriftResult) -> None:
    report.section("Drift")
    report.table(
        _drift_columns(found),
        drift_rows(found),
        f"{found.worlds} worlds stepped for {found.frames} frames: {_verdict(found)}",
    )
    if found.variety:
        columns = ["", *(f"frames {first} to {last}" for first, last in found.stretches)]
        report.table(columns, [["variety", *found.variety]], "Difference between worlds; that of real clips is 1")
    for name, statistic in found.statistics.items():
        ends = statistic.curve[0][0], statistic.curve[-1][0]
        lines = {"model": statistic.curve}
        levels = {"real frames: low": statistic.low, "mean": statistic.real, "high": statistic.high}
        lines |= {label: [(end, level) for end in ends] for label, level in levels.items()}
        report.line_chart(f"Drift of {name}", lines, "frame", "")
    if found.shown:
        picked = np.linspace(0, found.frames, 11).round().astype(int)
        sheet = media.contact_sheet([world[picked] for world in found.shown])
        report.image(sheet, f"A row for each world: frames {', '.join(map(str, picked))}.")
    report.text(
        "Worlds are started from test clips and stepped with actions that really occurred. Each statistic is held "
        f"against the central 99 % of {found.real_frames} real frames, as they are and as the model's tokenizer shows "
        "them (it was trained on those), and is inside if 95 % of the frames of the last stretch lie there. Sharpness "
        "falls with blur and rises with noise; distance is that to the nearest real frame "
        "in features of a frozen image network. A world that ends before a plain wall can be inside everywhere: "
        "variety near 0 says that all worlds have become one, motion near 0 that they have stopped."
    )


def _drift_columns(found: DriftResult) -> list[str]:
    spans = [f"{first}-{last}" for first, last in found.stretches]
    return ["statistic", "real frames", "through the tokenizer", *spans, "in range at the end", "as trained"]


def _stability(found: DriftResult) -> str:
    return "stable" if found.stable else "stable as trained" if found.stable_as_trained else "drifts"


def _verdict(found: DriftResult) -> str:
    said = []
    for what, stable in (("real frames", "stable"), ("real frames through the tokenizer", "stable_as_trained")):
        outside = [name for name, statistic in found.statistics.items() if not getattr(statistic, stable)]
        said.append(f"outside the range of {what}: {', '.join(outside)}" if outside else f"inside the range of {what}")
    said = "; ".join(said)
    return f"{said}; the worlds have become alike" if found.alike else said


def _signed(value: float) -> str:
    """A difference in dB; one that rounds to zero has no minus sign."""
    return f"{round(value, 2) + 0.0:+.2f} dB"
