"""``worldloom quickstart``: the whole loop on this machine, from video to a fine-tuned, measured, traced world model.

    record or take videos -> curate -> split -> tokenise -> fine-tune -> evaluate before and after -> generate -> report

Every step is one call of the component that does it, in its own folder under OUT, and resumes when run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from worldloom import config as configs
from worldloom.artifacts import Store, atomic_write
from worldloom.errors import WorldloomError
from worldloom.progress import progress

_MODEL = "loom-world-nano"


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart does; its defaults fit a laptop with two cores."""

    env_id: str = "VizdoomHealthGathering-v1"
    """Environment that is recorded where no videos are given; the shipped model has not seen it."""
    episodes: int = 32
    """Episodes recorded for training."""
    test_episodes: int = 6
    """Episodes recorded with other seeds, for evaluation."""
    episode_steps: int = 120
    """Actions of an episode."""
    frame_skip: int = 2
    """Simulator frames per action."""
    frames: int = 17
    """Length of a training window in video frames."""
    steps: int = 200
    """Fine-tuning steps."""
    batch_size: int = 8
    """Windows per step."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lr: float = 2e-3
    """Peak learning rate of the adapters."""
    deepspeed: bool = True
    """Train through DeepSpeed ZeRO-2; without it, by a plain loop."""
    test_windows: int = 32
    """Windows of the evaluation."""
    generate_frames: int = 33
    """Frames of the generated sample, its start included."""
    seed: int = 0
    """Seed of everything."""


@dataclass
class Loop:
    """One quickstart in progress."""

    out: Path
    videos: Path | None
    config: QuickstartConfig
    model: str = _MODEL
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Announce a step and time it."""
        click.echo(f"\n[{len(self.seconds) + 1}/7] {title}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)

    # -- the steps ------------------------------------------------------------------------------------------------

    def gather(self) -> tuple[Path, Path]:
        """Curated clips for training and for testing: recorded under different seeds, or split from the videos."""
        if self.videos is not None:
            return self._curate_videos(self.videos)
        from worldloom_curation.record import record

        c = self.config
        parts = {"train": (c.episodes, c.seed), "test": (c.test_episodes, c.seed + 50_000)}
        for part, (episodes, seed) in parts.items():
            record(
                c.env_id,
                episodes,
                self.out / "episodes" / part,
                seed=seed,
                size=(64, 64),
                max_steps=c.episode_steps,
                frame_skip=c.frame_skip,
                hold=6.0,
                depth=False,
                segmentation=False,
            )
            self._curate(self.out / "episodes" / part, self.out / "clips" / part)
        return self.out / "clips" / "train", self.out / "clips" / "test"

    def _curate_videos(self, videos: Path) -> tuple[Path, Path]:
        from worldloom_finetune.split import split_dataset

        whole = self.out / "clips" / "all"
        self._curate(videos, whole, "write.short_side=64", f"split.min_frames={self.config.frames}")
        return split_dataset(whole, self.out / "clips" / "train", self.out / "clips" / "test", self.config.frames)

    def _curate(self, source: Path, out: Path, *overrides: str) -> None:
        from worldloom_curation import config as curation
        from worldloom_curation.pipeline import run

        with progress(f"curating {source}") as shown:
            summary = run(source, out, curation.load(None, overrides), progress=_counted(shown))
        click.echo(
            f"{summary['sources']} sources -> {summary['clips']} clips, {summary['frames']['kept']} of "
            f"{summary['frames']['frames']} frames kept  (worldloom curate explain CLIP --out {out})"
        )
        self.facts.setdefault("curation", {})[out.name] = {
            key: summary[key] for key in ("sources", "clips", "dropped", "failed", "frames")
        }

    def finetune(self, train: Path) -> dict[str, Any]:
        """Encode the clips and train LoRA adapters."""
        from worldloom_finetune import train as training

        c = self.config
        overrides = {
            "data.frames": c.frames,
            "data.stride": 8,
            "data.batch_size": c.batch_size,
            "optim.lr": c.lr,
            "optim.warmup_steps": 10,
            "lora.rank": c.lora_rank,
            "ema.decay": 0.0,
            "trainer.max_steps": c.steps,
            "trainer.val_every": max(c.steps // 4, 1),
            "trainer.checkpoint_every": max(c.steps // 4, 1),
            "trainer.seed": c.seed,
            "trainer.strategy": "deepspeed" if c.deepspeed and _deepspeed() else "auto",
            "trainer.zero_stage": 2,
        }
        settings = training.load_config("world", None, tuple(f"{k}={v}" for k, v in overrides.items()))
        request = training.Request(
            "world", str(train), self.model, str(self.out / "train"), name=f"quickstart-{self.out.name}"
        )
        return training.run(request, settings)

    def evaluate(self, model: str, test: Path, name: str) -> Any:
        """Measure a model on the test clips; the report of its own stays in OUT/eval-NAME."""
        from worldloom.loading import load_model
        from worldloom_model_zoo.evaluate import EvalConfig
        from worldloom_model_zoo.evaluate_report import run

        config = EvalConfig(clips=self.config.test_windows, videos=6, seed=self.config.seed)
        return run(load_model(model), model, str(test), config, self.out / f"eval-{name}")

    def generate(self, model: str, test: Path) -> Any:
        """Continue a test clip with its own actions, and commit the sample with its provenance."""
        from worldloom import media
        from worldloom.generation import make_sample
        from worldloom.loading import load_model
        from worldloom.schema import GenerationRequest
        from worldloom.shards import open_dataset

        pipeline = load_model(model)
        dataset = open_dataset(test)
        clip = max(dataset.clips(), key=lambda clip: clip.frames)
        sample = dataset.load(clip.id)
        ratio, context = pipeline.frames_per_step, pipeline.sampler.context_frames
        frames = min(self.config.generate_frames, (clip.frames - 1) // ratio * ratio + 1)
        context = min(context, frames - ratio)
        folder = self.out / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = media.read_frames(sample.video or b"", size=(pipeline.config.height, pipeline.config.width))[:frames]
        media.write_video(folder / "start.mp4", pixels[:context], clip.fps, lossless=True)
        given = None
        if "actions" in sample.arrays and pipeline.action_dim:
            import torch

            names = tuple(str(name) for name in clip.metadata.get("action_names") or ())
            actions = pipeline.align(torch.from_numpy(sample.arrays["actions"][None, : frames - 1]), names)
            given = str(folder / "actions.npy")
            _save_array(Path(given), actions[0].numpy())
        request = GenerationRequest(
            model, video=str(folder / "start.mp4"), actions=given, frames=frames, seed=self.config.seed, fps=clip.fps
        )
        outcome = make_sample(pipeline, request, folder)
        made = media.read_frames(outcome.sample.path)
        strip = media.contact_sheet([pixels, made], every=max(1, frames // 11))
        media.write_image(folder / "truth-above-model.png", strip)
        return outcome.sample, strip


def _save_array(path: Path, array: np.ndarray) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(path, buffer.getvalue())


def _counted(shown: Any) -> Callable[[str, int, int, str], None]:
    """Curation's progress as one count per step."""
    return lambda step, done, total, last: shown(done, total, step)


def _deepspeed() -> bool:
    """Whether DeepSpeed is here; says so where it is not."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is not None:
        return True
    click.echo("DeepSpeed is not installed (pip install 'worldloom[finetune]'): training by a plain loop", err=True)
    return False


def run(out: Path, videos: Path | None, config: QuickstartConfig, model: str = _MODEL) -> dict[str, Any]:
    """The whole loop; returns what ``summary.json`` holds.

    Raises:
        WorldloomError: no usable video, or a step that cannot be done; what was finished stays and is found again.
    """
    from worldloom import lineage
    from worldloom_finetune.quickstart_report import Story, write_report

    began = time.monotonic()
    loop = Loop(out, videos, config, model)
    out.mkdir(parents=True, exist_ok=True)
    _check_same(out, videos, config, model)
    with loop.step("curate", f"Curate {videos}" if videos else f"Record {config.env_id} and curate the episodes"):
        train, test = loop.gather()
    with loop.step("before", f"Evaluate {model} on the test clips, before"):
        before = loop.evaluate(model, test, "before")
    how = "LoRA on DeepSpeed ZeRO-2" if config.deepspeed else "LoRA"
    with loop.step("finetune", f"Tokenise, then fine-tune {config.steps} steps: {how}"):
        trained = loop.finetune(train)
    tuned = str(trained["model"])
    with loop.step("after", "Evaluate on the same clips, after"):
        after = loop.evaluate(tuned, test, "after")
    with loop.step("generate", "Generate from a test clip"):
        sample, strip = loop.generate(tuned, test)
    with loop.step("lineage", "Trace the sample back to its sources"):
        store = Store()
        tree = lineage.walk(store, sample.id)
        _print_tree(tree)
    with loop.step("report", "Write the report"):
        source = f"your videos in {videos}" if videos else f"recorded episodes of {config.env_id}"
        story = Story(model, source, before, after, trained, loop.facts["curation"], sample, strip, tree, loop.seconds)
        report = write_report(story, out)
    summary = {
        "report": str(report),
        "seconds": {**loop.seconds, "all": round(time.monotonic() - began, 1)},
        "sample": sample.id,
        "model": tuned,
        "curation": loop.facts.get("curation", {}),
        "before": {"psnr": before.psnr, "ssim": before.ssim, "action_sensitivity": before.action_sensitivity},
        "after": {"psnr": after.psnr, "ssim": after.ssim, "action_sensitivity": after.action_sensitivity},
        "config": configs.to_dict(config),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    _print_results(before, after, summary)
    return summary


def _check_same(out: Path, videos: Path | None, config: QuickstartConfig, model: str) -> None:
    """Keep the settings beside the results, and refuse to mix two quickstarts in one folder."""
    record = {"videos": str(videos.resolve()) if videos else "", "model": model, **configs.to_dict(config)}
    file = out / "quickstart.json"
    if file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(record)):
        raise WorldloomError(
            "this folder holds a quickstart with another model, other videos or settings",
            got=str(out),
            do="give another --out",
        )
    atomic_write(file, json.dumps(record, indent=1) + "\n")


def _print_tree(tree: Any) -> None:
    from rich.console import Console

    from worldloom import lineage

    Console().print(lineage.render(tree))


def _print_results(before: Any, after: Any, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from worldloom.tracking import tracker
    from worldloom_finetune.quickstart_report import result_rows

    table = Table(title="On clips that training never saw", title_justify="left")
    for column in ("", "before", "after", "repeat last frame"):
        table.add_column(column, justify="left" if not column else "right")
    for label, cells in result_rows(before, after):
        table.add_row(label, *cells)
    Console().print(table)
    seconds = summary["seconds"]
    click.echo("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    click.echo(f"report   {summary['report']}")
    click.echo(f"lineage  worldloom lineage {summary['sample']}")
    click.echo(f"go on    worldloom eval {summary['model']} --data DIR; worldloom serve {summary['model']}")
    command = tracker().ui_command
    if command:
        click.echo(f"MLflow   {command}")


@click.command()
@click.option(
    "--videos",
    type=click.Path(exists=True, file_okay=True, path_type=Path),
    help="Your own videos: a folder, or one file. Without it, episodes of a simulator are recorded.",
)
@click.option("--model", default=_MODEL, show_default=True, help="What is fine-tuned: a catalog name or a folder.")
@click.option("--out", default="runs/quickstart", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. steps=200.")
@click.option("--help-config", is_flag=True, help="List every setting and its default.")
def quickstart(videos: Path | None, model: str, out: Path, overrides: tuple[str, ...], help_config: bool) -> None:
    """The whole loop on this machine: record or take videos, curate, tokenise, fine-tune, evaluate, generate, report.

    Takes a few minutes on two cores. Run again in the same folder it goes on where it was.
    """
    if help_config:
        for name, kind, default, sentence in configs.describe(QuickstartConfig):
            click.echo(f"{name} = {default}  ({kind})\n    {sentence}")
        return
    run(out, videos, configs.load(QuickstartConfig, overrides=overrides), model)
