"""The commands ``worldloom generate`` and ``worldloom eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from worldloom.guardrails import Guardrails
    from worldloom.protocols import Generates
    from worldloom.schema import GenerationRequest
    from worldloom.specs import SampleSpec

_FILE = click.Path(exists=True, dir_okay=False)
_device = click.option("--device", default="cpu", show_default=True, help="Where the model runs, e.g. cuda.")


@click.command()
@click.argument("model")
@click.option("--image", type=_FILE, help="Start from this image.")
@click.option("--video", type=_FILE, help="Continue this video; its last frames are the start.")
@click.option("--view", type=_FILE, multiple=True, help="Start of a camera, for models of several. Repeat it in order.")
@click.option("--actions", type=_FILE, help="What is done: .npy, .json or .csv, one row between two frames.")
@click.option("--prompt", default="", help="Text, for models that take it.")
@click.option("--negative-prompt", default="", help="Text to keep away from, for models that take it.")
@click.option("--frames", type=int, help="Length of the result, start included.  [default: the actions', else 17]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels, for models of several sizes.  [default: the model's]")
@click.option("--steps", type=int, help="Sampler steps a frame.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the model's]")
@click.option("--shift", type=float, help="Timestep shift of the sampler.  [default: the model's]")
@click.option("--fps", type=float, help="Frames per second of the file.  [default: the model's]")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bits on the same device.")
@click.option("--spec", type=_FILE, help="Make the samples of a batch file: .json, .jsonl, .yaml or .toml.")
@click.option(
    "--guardrails",
    type=click.Choice(["on", "off", "require"]),
    help="Checks before and after: those installed, none, or all or nothing.  [default: on]",
)
@click.option("--blocklist", type=_FILE, help="More words and phrases to refuse in a prompt, one a line.")
@click.option("--skip-guard", multiple=True, metavar="NAME", help="Leave out one guard, e.g. faces. Repeatable.")
@click.option("--upsample", metavar="URL|MODEL", help="Rewrite prompts: an OpenAI-compatible API, or a model here.")
@click.option("--upsample-model", default="", help="Name of the model at that URL.")
@click.option("--upsample-timeout", default=60.0, show_default=True, help="Seconds to wait for its answer.")
@click.option("--out", default="out/generate", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@_device
@click.pass_context
def generate(
    ctx: click.Context,
    model: str,
    image: str | None,
    video: str | None,
    view: tuple[str, ...],
    actions: str | None,
    prompt: str,
    negative_prompt: str,
    frames: int | None,
    size: str | None,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    fps: float | None,
    seed: int,
    spec: str | None,
    guardrails: str | None,
    blocklist: str | None,
    skip_guard: tuple[str, ...],
    upsample: str | None,
    upsample_model: str,
    upsample_timeout: float,
    out: str,
    device: str,
) -> None:
    """Make a video with MODEL: a catalog name, a checkpoint or adapter folder, or the id of a model made here.

    Writes the video (.mp4, .gif), a strip of its frames (.png) and a sidecar (.json) with everything needed to make it
    again. The same request finds the finished sample.

    With --spec, makes every sample of a batch file, each in a folder of its own; exits with 1 if one failed.
    """
    from worldloom.generation import require_generates
    from worldloom.guardrails import Guardrails
    from worldloom.loading import load_model
    from worldloom.schema import GenerationRequest
    from worldloom.specs import guardrail_config, read_batch

    _refuse_beside_spec(ctx, spec)
    batch = read_batch(spec) if spec else None
    guards = Guardrails(
        guardrail_config(
            batch.guardrails if batch else None,
            Path(spec or ".").absolute().parent,
            mode=guardrails,
            blocklist=blocklist,
            skip=skip_guard or None,
        )
    )
    upsampler = _upsampler(upsample, upsample_model, upsample_timeout, device)
    height, width = _pixels(size)
    loaded = load_model(model, device=device)
    if batch is not None:
        ctx.exit(_run_batch(loaded, model, batch.samples, out, guards, upsampler))
    pipeline = require_generates(loaded, model)
    request = GenerationRequest(
        model, prompt, image, video, actions, frames, seed, steps, guidance, fps, negative_prompt, shift, height, width,
        view,
    )  # fmt: skip
    _run_one(pipeline, request, out, guards, upsampler)


def _run_one(pipeline: Generates, request: GenerationRequest, out: str, guards: Guardrails, upsampler: Any) -> None:
    import json

    from worldloom.artifacts import atomic_write
    from worldloom.generation import make_sample
    from worldloom.progress import progress

    with progress("sampling") as shown:
        outcome = make_sample(pipeline, request, out, progress=shown, guardrails=guards, upsampler=upsampler)
    sample = outcome.sample
    files = {"video": sample.path, "sidecar": sample.sidecar, "gif": _beside(sample.path, ".gif")}
    summary = {"id": sample.id, "reused": outcome.reused, "seconds": outcome.seconds, **files}
    atomic_write(Path(out) / "summary.json", json.dumps(summary, indent=1) + "\n")
    made = "found finished" if outcome.reused else f"made in {outcome.seconds:.1f} s"
    click.echo(f"{sample.id}  {sample.request.frames} frames at {sample.request.fps:g} fps, {made}")
    click.echo(sample.path)
    click.echo(f"worldloom lineage {sample.id}")
    for finding in outcome.findings:
        if finding["outcome"] == "changed" or (finding["outcome"] == "skipped" and finding["detail"] not in _QUIET):
            click.echo(f"guard {finding['guard']}: {finding['outcome']}, {finding['detail']}", err=True)


_QUIET = ("there is no text", "there is no video", "switched off by the caller")  # nobody needs to be told


def _run_batch(
    model: Any, name: str, samples: Sequence[SampleSpec], out: str, guards: Guardrails, upsampler: Any
) -> int:
    """Make the samples of a batch; the exit code."""
    from worldloom.batch import run_batch
    from worldloom.progress import progress

    with progress("samples") as shown:
        results = run_batch(model, samples, out, name=name, guardrails=guards, upsampler=upsampler, progress=shown)
    for result in results:
        if result.status == "error":
            click.echo(f"failed  {result.name}: {result.error.splitlines()[0]}", err=True)
        else:
            made = "found finished" if result.reused else f"made in {result.seconds:.1f} s"
            click.echo(f"{result.id}  {result.name}, {made}")
    failed = sum(result.status == "error" for result in results)
    click.echo(
        f"{len(results) - failed} of {len(results)} samples in {out}  (all of them: {Path(out) / 'summary.json'})"
    )
    return 1 if failed else 0


def _refuse_beside_spec(ctx: click.Context, spec: str | None) -> None:
    """What a batch file says of its samples is not said again on the command line."""
    start = ("image", "video", "view", "actions", "prompt", "negative_prompt")
    for name in (*start, "frames", "size", "steps", "guidance", "shift", "fps", "seed") if spec else ():
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise WorldloomError(
                "beside --spec this option has no sample to go to",
                got=f"--{name.replace('_', '-')}",
                do="write it in the batch file, under defaults for all samples",
            )


def _upsampler(where: str | None, name: str, timeout: float, device: str) -> Any:
    """What rewrites prompts: an endpoint by its URL, or a model on this machine."""
    if where is None:
        if name:
            raise WorldloomError("--upsample-model needs the endpoint", got=name, do="give --upsample URL too")
        return None
    from worldloom.prompts import ChatEndpoint, LocalUpsampler
    from worldloom.protocols import Answers

    if "://" in where:
        if not name:
            raise WorldloomError(
                "the endpoint needs to be told which model", got=where, do="give --upsample-model NAME"
            )
        return ChatEndpoint(where, name, timeout=timeout)
    from worldloom.loading import load_model

    model = load_model(where, device=device)
    if not isinstance(model, Answers):
        raise WorldloomError("this model does not answer in words", got=where, do="give a URL, or a reason model")
    return LocalUpsampler(model, where)


def _pixels(size: str | None) -> tuple[int | None, int | None]:
    """Height and width of WIDTHxHEIGHT."""
    if size is None:
        return None, None
    width, cross, height = size.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise WorldloomError("a size is WIDTHxHEIGHT in pixels", got=size, do="for example --size 320x192")
    return int(height), int(width)


def _beside(path: str, suffix: str) -> str:
    return str(Path(path).with_suffix(suffix))


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(exists=True, file_okay=False), help="Dataset of clips.")
@click.option("--prompts", metavar="DATA,DATA...", help="Does the model show what it is told? By datasets' captions.")
@click.option("--samples", default=10, show_default=True, help="Videos for each dataset of --prompts.")
@click.option("--horizon", default=16, show_default=True, help="Frames to predict; shorter ones are tabulated too.")
@click.option("--context", default=9, show_default=True, help="Frames given before them.")
@click.option("--clips", default=128, show_default=True, help="Test windows, spread over the dataset; 0 for all.")
@click.option("--steps", type=int, help="Sampler steps a frame.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the model's]")
@click.option("--batch-size", default=8, show_default=True, help="Windows at a time.")
@click.option("--seed", default=0, show_default=True, help="Of the noise and of the shuffled actions.")
@click.option("--frechet", is_flag=True, help="Fréchet video distance (offline encoder; not comparable with I3D's).")
@click.option("--following", is_flag=True, help="Can the actions be read off the made videos? Takes a minute or two.")
@click.option("--drift", type=int, is_flag=False, flag_value=500, default=0, metavar="[FRAMES]",
              help="Statistics of long rollouts against real frames.  [500 frames if none are given]")  # fmt: skip
@click.option("--physics", is_flag=False, flag_value="data", default="", metavar="[ENV_ID]",
              help="Where objects end up, against the true simulator.  [the one --data was recorded in]")  # fmt: skip
@click.option("--reference", type=click.Path(exists=True, file_okay=False),
              help="Real clips to compare with and learn from.  [default: every other of --data]")  # fmt: skip
@click.option("--out", default="out/eval", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@_device
def evaluate(
    model: str,
    data: str | None,
    prompts: str | None,
    samples: int,
    horizon: int,
    context: int,
    clips: int,
    steps: int | None,
    guidance: float | None,
    batch_size: int,
    seed: int,
    frechet: bool,
    following: bool,
    drift: int,
    physics: str,
    reference: str | None,
    out: str,
    device: str,
) -> None:
    """Measure MODEL on the clips of --data: PSNR and SSIM against repeating the last frame, and action sensitivity.

    --frechet, --following, --drift and --physics measure more, and take longer. Use clips that training never saw.
    Writes metrics.json, summary.json and report.html; run again it finds them. --prompts, instead of --data, has the
    model make videos from the captions of several datasets, and a classifier of their clips tell which it shows.
    """
    if bool(data) == bool(prompts):
        raise click.UsageError("give --data or --prompts, one of them")
    if prompts:
        _follow_prompts(model, prompts.split(","), samples, seed, steps, guidance, out, device)
        return
    assert data is not None
    from worldloom.loading import load_model
    from worldloom_model_zoo.evaluate import EvalConfig
    from worldloom_model_zoo.evaluate_report import print_table, run

    config = EvalConfig(
        horizon, context, clips, batch_size, seed, steps=steps, guidance_scale=guidance, reference=reference or "",
        frechet=frechet, following=following, drift=drift, physics=physics,
    )  # fmt: skip
    pipeline = load_model(model, device=device)
    result = run(pipeline, model, data, config, out)
    print_table(result)
    click.echo(f"report {Path(out) / 'report.html'}  (figures in {Path(out) / 'metrics.json'})")


def _follow_prompts(
    model: str,
    datasets: list[str],
    samples: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    out: str,
    device: str,
) -> None:
    import dataclasses
    import json

    from worldloom import media
    from worldloom.artifacts import atomic_write
    from worldloom.loading import load_model
    from worldloom.progress import progress
    from worldloom_model_zoo.prompt_following import PromptConfig, measure

    pipeline = load_model(model, device=device)
    given = {"steps": steps, "guidance_scale": guidance}
    pipeline.sampler = dataclasses.replace(pipeline.sampler, **{k: v for k, v in given.items() if v is not None})
    with progress("prompting") as shown:
        result = measure(pipeline, datasets, PromptConfig(samples, seed=seed), progress=shown)
    plain = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "videos"}
    atomic_write(Path(out) / "prompts.json", json.dumps(plain, indent=1) + "\n")
    media.write_image(Path(out) / "prompts.png", media.contact_sheet(list(result.videos)))
    for name, share in result.per_world.items():
        click.echo(f"{name:20s} {share:.0%}")
    click.echo(f"prompted worlds recognised {result.generated:.1%}, real clips {result.real:.1%}")
    click.echo(f"{Path(out) / 'prompts.json'}  {Path(out) / 'prompts.png'}")
