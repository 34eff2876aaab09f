"""One training run from request to registered model: prepare, resume, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom import config as configs
from worldloom import registry
from worldloom.errors import WorldloomError
from worldloom.progress import progress
from worldloom_finetune import launch
from worldloom_finetune.config import FinetuneConfig, TrainerConfig

# What may differ when a run resumes: how long it runs, what it writes on the way, how its data reach it, and how many
# processes and micro-batches share a step.
_FREE = {
    "trainer": {
        *("max_steps", "val_every", "checkpoint_every", "sample_every", "keep", "log_every", "threads"),
        *("devices", "accumulate", "compile"),
    },
    "data": {"num_workers", "memory_gb", "val_batches"},
    "tracking": {"enabled", "uri", "experiment"},
}


@dataclass(frozen=True)
class Request:
    """What a run is asked for, apart from its configuration."""

    recipe: str
    """Name in the catalog."""
    data: str
    """Dataset folder or URL, or several, separated by commas."""
    model: str
    """Checkpoint name or folder to start from, or a preset such as ``predict/nano`` to start from scratch."""
    out: str
    """Folder of the run; the same folder resumes it."""
    name: str = ""
    """Name in the model registry; empty takes the folder's name."""
    tokenizer: str = ""
    """Tokenizer name or folder for clips that are not encoded yet; empty takes the base model's, else the default."""
    command: str = ""
    """The command line, for the model card."""
    quiet: bool = False
    """No progress on stderr."""


def load_config(recipe: str, file: str | Path | None = None, overrides: tuple[str, ...] = ()) -> FinetuneConfig:
    """The configuration of a recipe: its defaults, under `file`, under `overrides`.

    Raises:
        WorldloomError: unknown recipe or key, or a value that does not fit.
    """
    entry = registry.entry("recipes", recipe)
    job = registry.load("recipes", recipe)
    base: Mapping[str, Any] = {}
    if "defaults" in entry.meta:
        module = sys.modules[entry.target.split(":")[0].split(".")[0]]
        base = configs.read_toml(Path(str(module.__file__)).parent / entry.meta["defaults"])
    return configs.load(job.config_class, file, overrides, base)


def run(request: Request, config: FinetuneConfig) -> dict[str, Any]:
    """Train as asked, on as many processes as `config` says, and return what ``summary.json`` holds.

    Run again with the same request it resumes from the newest checkpoint, or returns at once when all is done.

    Raises:
        WorldloomError: bad input, or an output folder that holds a different run.
    """
    out = Path(request.out)
    request = dataclasses.replace(request, command=request.command or _command())
    devices = config.trainer.devices
    if launch.rank_and_world() is None and devices > 1:
        job = registry.load("recipes", request.recipe)
        out.mkdir(parents=True, exist_ok=True)
        job.prepare(request, config)  # once, before there are several processes
        launch.spawn(to_json(request, config), devices, out, _threads(config.trainer))
    else:
        fit(request, config)
    return _read_json(out / "summary.json")


def fit(request: Request, config: FinetuneConfig) -> None:
    """This process's part of a run: everything if it is alone or rank 0, training only otherwise."""
    import torch

    rank, world = launch.rank_and_world() or (0, 1)
    if world != config.trainer.devices:
        raise WorldloomError(
            "the launcher started another number of processes than trainer.devices",
            got=f"{world} processes, trainer.devices = {config.trainer.devices}",
            do=f"add --devices {world}",
        )
    _check(config)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(_threads(config.trainer))
    with _lock(out) if rank == 0 else contextlib.nullcontext(), _kept_environment():
        _Run(request, config, rank, world, out).go()


def _check(config: FinetuneConfig) -> None:
    """Refuse settings that exclude each other.

    Raises:
        WorldloomError: naming them.
    """
    settings = config.trainer
    if settings.strategy == "deepspeed" and settings.zero_stage == 3 and config.ema.decay:
        raise WorldloomError(
            "ZeRO-3 keeps no whole weight anywhere, so there is nothing to average",
            got=f"ema.decay = {config.ema.decay}",
            do="set ema.decay = 0, or use ZeRO 2",
        )


class _Run:
    def __init__(self, request: Request, config: FinetuneConfig, rank: int, world: int, out: Path) -> None:
        self.request, self.config, self.rank, self.world, self.out = request, config, rank, world, out
        self.recipe = registry.load("recipes", request.recipe)

    def go(self) -> None:
        import torch

        from worldloom_finetune import checkpointing, lora
        from worldloom_finetune.data import noise_seed
        from worldloom_finetune.module import Curve

        config, out = self.config, self.out
        began = time.perf_counter()
        if self.rank == 0:
            checkpointing.sweep(out / "checkpoints")
            self.recipe.prepare(self.request, config)
        torch.manual_seed(noise_seed(config.trainer.seed, 2**32 - 1))  # initial weights
        job = self.recipe.open(self.request, config)
        trained, total = lora.count(job.model)
        facts = {
            "recipe": self.request.recipe,
            "world": self.world,
            "config": configs.to_dict(config),
            "digests": dict(job.digests),
        }
        state = checkpointing.read_latest(out / "checkpoints")
        start = 0
        if state is not None:
            check_same_run(state.facts, facts, configs.to_dict(type(config)()), out)
            facts["tracking_run"] = state.facts.get("tracking_run")
            start = state.step
        if self.rank == 0:
            configs.save(config, out / "config.toml")
            self._say(
                f"{self.request.recipe}: {len(job.train)} training and {len(job.val)} validation samples, "
                f"{trained:,} of {total:,} parameters trained" + (f", resuming at step {start}" if start else "")
            )
        curve = Curve(out / "metrics.jsonl")
        seconds = 0.0
        if start < config.trainer.max_steps:
            if self.rank == 0:
                curve.rewind(start)
            seconds = self._train(job, start, state, facts, curve)
            state = checkpointing.read_latest(out / "checkpoints") if self.rank == 0 else None
        elif (out / "summary.json").is_file():
            self._say(f"nothing left to do: {out} holds {start} of {config.trainer.max_steps} steps")
            return
        if self.rank == 0:
            from worldloom_finetune.export import finish

            assert state is not None
            if config.trainer.strategy == "deepspeed" and config.trainer.zero_stage == 3:
                job = self.recipe.open(self.request, config)  # the trained one is in pieces
            self._load_final(job, state)
            finish(job, self.request, config, state, curve, {"training": seconds, "all": time.perf_counter() - began})

    def _load_final(self, job: Any, state: Any) -> None:
        import torch

        from worldloom_finetune.lora import trained

        final = state.groups.get("ema") or state.groups["weights"]
        with torch.no_grad():
            for name, p in trained(job.model).items():
                p.data = p.data.cpu().copy_(final[name])
        job.model.cpu().eval()

    def _train(self, job: Any, start: int, state: Any, facts: Any, curve: Any) -> float:
        import lightning.pytorch as lightning
        import torch
        from lightning.pytorch.plugins.environments import LightningEnvironment

        from worldloom_finetune import data, strategy
        from worldloom_finetune.compiling import compile_blocks
        from worldloom_finetune.ema import Ema
        from worldloom_finetune.export import Tracking
        from worldloom_finetune.lora import trained
        from worldloom_finetune.module import FinetuneModule, Hooks, Recorder

        config, settings = self.config, self.config.trainer
        module = FinetuneModule(job, start)
        averaged = trained(job.model)
        ema = Ema(averaged, config.ema.decay) if config.ema.decay else None
        if state is not None and ema is not None:
            ema.load(state.groups["ema"], state.facts["ema_updates"])
        batches = data.fixed_batches(job.val, config.data.batch_size, config.data.val_batches) if len(job.val) else []
        recorder = Recorder(module, self.out, facts, batches, ema, Hooks(), resumed=state)
        loader = data.loader(
            job.train,
            config.data,
            settings.seed,
            rank=self.rank,
            world=self.world,
            batches=(settings.max_steps - start) * settings.accumulate,
        )
        if state is not None:
            # A checkpoint of before the place was kept had as many batches as steps, micro-batches and ranks say.
            loader.load_state_dict(state.facts.get("data") or loader.state_dict(start * settings.accumulate))
        # The trainer may have taken batches that it has not used yet, so the place is told by the step.
        recorder.place = lambda step: loader.state_dict((step - start) * settings.accumulate)
        cpu = accelerator(settings) == "cpu"
        deepspeed = settings.strategy == "deepspeed"
        job.model.train()
        if settings.compile:
            for network in (job.model, getattr(job, "teacher", None)):
                if isinstance(network, torch.nn.Module):
                    compile_blocks(network)
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_libraries())
            trainer = lightning.Trainer(
                accelerator=accelerator(settings),
                devices=self.world,
                strategy=strategy.build(settings, config.data.batch_size, cpu=cpu, unused=job.unused),
                plugins=[LightningEnvironment()] if self.world > 1 or deepspeed else None,
                precision="32-true" if settings.precision == "32" else "bf16-mixed",
                accumulate_grad_batches=settings.accumulate,
                gradient_clip_val=(config.optim.grad_clip or None) if deepspeed else None,
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                callbacks=[recorder],
                default_root_dir=str(self.out),
            )
            if self.rank == 0:
                shown = stack.enter_context(progress(self.request.recipe, quiet=self.request.quiet))
                tracking = stack.enter_context(Tracking(self.request, config, self.out, facts))
                facts["tracking_run"] = tracking.run_id

                def advance(step: int, values: dict[str, float]) -> None:
                    keys = ("loss", "val_loss", "steps_per_second")
                    note = "  ".join(f"{k} {values[k]:.4g}" for k in keys if k in values)
                    shown(step, settings.max_steps, note)
                    tracking.log(values, step)

                recorder.hooks = Hooks(line=curve.append, picture=tracking.picture, advance=advance)
            began = time.perf_counter()
            try:
                trainer.fit(module, loader)
            except SystemExit:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            return time.perf_counter() - began

    def _say(self, text: str) -> None:
        if not self.request.quiet and self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], out: Path) -> None:
    """Refuse to resume a run that was started with other inputs or settings.

    Args:
        defaults: of the configuration; what settings were that did not exist yet when the run was started.

    Raises:
        WorldloomError: naming each difference.
    """
    before, now = _flat(_fixed(old)), _flat(_fixed(new))
    before = {k: v for k, v in _flat(_fixed({**new, "config": defaults})).items() if k in now} | before
    different = [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise WorldloomError(
            f"{out} holds a run with other settings",
            got="; ".join(different),
            do="give the settings it was started with (they are in its config.toml), or another --out",
        )


def _fixed(facts: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        section: {k: v for k, v in values.items() if k not in _FREE.get(section, ())}
        if isinstance(values, Mapping)
        else values
        for section, values in facts["config"].items()
    }
    return {"recipe": facts["recipe"], "digests": facts["digests"], **config}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
    return {prefix: list(value) if isinstance(value, tuple) else value}


def accelerator(settings: TrainerConfig) -> str:
    """``cuda`` or ``cpu``.

    Raises:
        WorldloomError: CUDA asked for and not there.
    """
    import torch

    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise WorldloomError("trainer.accelerator is cuda, and torch sees no GPU", do="use auto or cpu")
    if settings.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.accelerator


def _threads(settings: TrainerConfig) -> int:
    if settings.threads:
        return settings.threads
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // settings.devices)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Lightning's and DeepSpeed's advice on how to use them is not for our users; their errors are."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning", "DeepSpeed")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for module in ("lightning", "deepspeed", "torch.distributed"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs in one folder would tear each other's files."""
    try:
        import fcntl
    except ImportError:  # no flock on this system
        yield
        return
    with open(out / ".lock", "w") as file:
        deadline = time.monotonic() + 10  # a run that was just killed may still be going down
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise WorldloomError(
                        "another run is training in this folder", got=out, do="wait for it, or use another --out"
                    ) from None
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def _kept_environment() -> Iterator[None]:
    """Lightning and DeepSpeed set these for a single process too; a later run must not think that it was launched."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def to_json(request: Request, config: FinetuneConfig) -> dict[str, Any]:
    """A request and its configuration as JSON, for another process."""
    return {"request": dataclasses.asdict(request), "config": configs.to_dict(config)}


def from_json(record: Mapping[str, Any]) -> tuple[Request, FinetuneConfig]:
    """The inverse of `to_json`."""
    request = Request(**record["request"])
    job = registry.load("recipes", request.recipe)
    return request, configs.load(job.config_class, base=record["config"])


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text())


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
