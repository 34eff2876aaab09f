"""The commands ``worldloom generate`` and ``worldloom eval``."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(exists=True, dir_okay=False)
_device = click.option("--device", default="cpu", show_default=True, help="Where the model runs, e.g. cuda.")


@click.command()
@click.argument("model")
@click.option("--image", type=_FILE, help="Start from this image.")
@click.option("--video", type=_FILE, help="Continue this video; its last frames are the start.")
@click.option("--actions", type=_FILE, help="What is done: .npy, .json or .csv, one row between two frames.")
@click.option("--prompt", default="", help="Text, for models that take it.")
@click.option("--frames", type=int, help="Length of the result, start included.  [default: the actions', else 17]")
@click.option("--steps", type=int, help="Sampler steps a frame.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the model's]")
@click.option("--fps", type=float, help="Frames per second of the file.  [default: the model's]")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bits on the same device.")
@click.option("--out", default="out/generate", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@_device
def generate(
    model: str,
    image: str | None,
    video: str | None,
    actions: str | None,
    prompt: str,
    frames: int | None,
    steps: int | None,
    guidance: float | None,
    fps: float | None,
    seed: int,
    out: str,
    device: str,
) -> None:
    """Make a video with MODEL: a catalog name, a checkpoint or adapter folder, or the id of a model made here.

    Writes the video (.mp4, .gif), a strip of its frames (.png) and a sidecar (.json) with everything needed to make it
    again. The same request finds the finished sample.
    """
    import json

    from worldloom.artifacts import atomic_write
    from worldloom.generation import make_sample, require_generates
    from worldloom.loading import load_model
    from worldloom.progress import progress
    from worldloom.schema import GenerationRequest

    pipeline = require_generates(load_model(model, device=device), model)
    request = GenerationRequest(model, prompt, image, video, actions, frames, seed, steps, guidance, fps)
    with progress("sampling") as shown:
        outcome = make_sample(pipeline, request, out, progress=shown)
    sample = outcome.sample
    files = {"video": sample.path, "sidecar": sample.sidecar, "gif": _beside(sample.path, ".gif")}
    summary = {"id": sample.id, "reused": outcome.reused, "seconds": outcome.seconds, **files}
    atomic_write(Path(out) / "summary.json", json.dumps(summary, indent=1) + "\n")
    made = "found finished" if outcome.reused else f"made in {outcome.seconds:.1f} s"
    click.echo(f"{sample.id}  {sample.request.frames} frames at {sample.request.fps:g} fps, {made}")
    click.echo(sample.path)
    click.echo(f"worldloom lineage {sample.id}")


def _beside(path: str, suffix: str) -> str:
    return str(Path(path).with_suffix(suffix))


@click.command()
@click.argument("model")
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="Dataset of clips.")
@click.option("--horizon", default=8, show_default=True, help="Frames to predict.")
@click.option("--context", default=9, show_default=True, help="Frames given before them.")
@click.option("--clips", default=128, show_default=True, help="Test windows, spread over the dataset; 0 for all.")
@click.option("--steps", type=int, help="Sampler steps a frame.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the model's]")
@click.option("--batch-size", default=8, show_default=True, help="Windows at a time.")
@click.option("--seed", default=0, show_default=True, help="Of the noise and of the shuffled actions.")
@click.option("--out", default="out/eval", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@_device
def evaluate(
    model: str,
    data: str,
    horizon: int,
    context: int,
    clips: int,
    steps: int | None,
    guidance: float | None,
    batch_size: int,
    seed: int,
    out: str,
    device: str,
) -> None:
    """Measure MODEL on the clips of --data: PSNR and SSIM against repeating the last frame, and action sensitivity.

    Use clips that training never saw. Writes metrics.json, summary.json and report.html; run again it finds them.
    """
    from worldloom.loading import load_model
    from worldloom_model_zoo.evaluate import EvalConfig
    from worldloom_model_zoo.evaluate_report import print_table, run

    config = EvalConfig(horizon, context, clips, batch_size, seed, steps=steps, guidance_scale=guidance)
    pipeline = load_model(model, device=device)
    result = run(pipeline, model, data, config, out)
    print_table(result)
    click.echo(f"report {Path(out) / 'report.html'}  (figures in {Path(out) / 'metrics.json'})")
