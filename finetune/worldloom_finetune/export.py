"""What a finished run leaves: a checkpoint folder with its card, an artifact, a registered model, a summary."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldloom import config as configs
from worldloom.artifacts import Store, atomic_dir, atomic_write, code_version, file_digest
from worldloom.errors import WorldloomError
from worldloom_finetune import lora
from worldloom_finetune.config import FinetuneConfig


class Tracking:
    """The tracker of a run (a context manager); a resumed run goes on in the MLflow run it began in."""

    def __init__(self, request: Any, config: FinetuneConfig, out: Path, facts: Mapping[str, Any]) -> None:
        from worldloom.tracking import tracker

        self._tracker = tracker(config.tracking.enabled, config.tracking.uri or None)
        self._config, self._out, self._facts = config, out, facts
        self._name = request.name or out.resolve().name
        self._params = {"recipe": request.recipe, "model": request.model, "data": request.data}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run."""
        return self._tracker.run_id

    def __enter__(self) -> Tracking:
        params = {**self._params, **self._facts["config"], "digests": self._facts["digests"]}
        experiment, known = self._config.tracking.experiment, self._facts.get("tracking_run")
        try:
            self._tracker.start(experiment, self._name, params, run_id=known)
        except WorldloomError:
            if known is None:
                raise
            self._tracker.start(experiment, self._name, params)  # that run is in another store
        return self

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the newest values."""
        self._tracker.log(values, step)

    def picture(self, picture: np.ndarray, step: int) -> None:
        """Keep a sample strip in the run's folder and in the tracker."""
        from worldloom import media

        path = self._out / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        media.write_image(path, picture)
        self._tracker.log_artifact(path, "samples")

    def finish(self, model: Path, figures: Mapping[str, float], tags: Mapping[str, str], step: int) -> str | None:
        """Log the final figures and register the model, alias ``current`` (MLflow reserves ``latest``)."""
        self._tracker.log({f"final/{key}": value for key, value in figures.items()}, step)
        return self._tracker.register_model(model, self._name, "current", tags)


def rounded(model: nn.Module, config: FinetuneConfig) -> dict[str, Tensor]:
    """The weights in the precision that is exported; latent statistics, few and decisive, stay float32."""
    dtype = getattr(torch, config.trainer.export_dtype)
    return {
        name: value if name.startswith("latent_") else value.to(dtype) for name, value in model.state_dict().items()
    }


def finish(
    job: Any, request: Any, config: FinetuneConfig, state: Any, curve: Any, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Export the trained model, store and register it, and write ``summary.json`` last.

    Args:
        job: the recipe's job; its model holds the final (averaged) weights, on the CPU.
        state: the final training state.
        curve: the recorded steps.
        seconds: wall-clock times of this process by what they were spent on.
    """

    out = Path(request.out)
    job.finish()
    figures = dict(job.figures())
    lines = curve.read()
    validation = [(line.step, line.values["val_loss"]) for line in lines if "val_loss" in line.values]
    tail = lines[-min(50, max(1, len(lines) // 5)) :]
    figures |= {
        "loss_first": lines[0].values["loss"],
        "loss_last": sum(line.values["loss"] for line in tail) / len(tail),
    }
    if validation:
        figures |= {"val_loss_first": validation[0][1], "val_loss_last": validation[-1][1]}
    model = out / "model"
    shutil.rmtree(model, ignore_errors=True)  # a run killed after its export, before its summary
    with atomic_dir(model) as folder:
        weights = job.export(folder)
        (folder / "README.md").write_text(card(job, request, config, state, figures), encoding="utf-8")
    digest = file_digest(model / weights)
    artifact = Store().put(
        model,
        kind=job.kind,
        name=request.name or out.resolve().name,
        inputs=job.inputs,
        config=configs.to_dict(config),
        seed=config.trainer.seed,
        metadata={"figures": figures, "steps": state.step, "recipe": request.recipe},
    )
    tags = {**{k: str(v) for k, v in job.digests.items()}, "sha256": digest, "artifact": artifact.id}
    with Tracking(request, config, out, state.facts) as tracking:
        version = tracking.finish(model, figures, tags, state.step)
        run_id = tracking.run_id
    trained, total = lora.count(job.model)
    summary = {
        "recipe": request.recipe,
        "model": str(model),
        "artifact": artifact.id,
        "sha256": digest,
        "steps": state.step,
        "seconds": dict(seconds),
        "steps_per_second": tail[-1].values.get("steps_per_second"),
        "parameters": {"trained": trained, "all": total},
        "figures": figures,
        "digests": dict(job.digests),
        "inputs": list(job.inputs),
        "tracking": {"run": run_id, "version": version},
        "command": request.command,
        "code_version": code_version(),
    }
    write_summary(out, summary)
    return summary


def card(job: Any, request: Any, config: FinetuneConfig, state: Any, figures: Mapping[str, float]) -> str:
    """The model card: what it is, what it was made from and how, what was measured."""
    name = request.name or Path(request.out).resolve().name
    rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in figures.items())
    digests = "\n".join(f"| {key} | `{value}` |" for key, value in job.digests.items())
    return f"""# {name}

{job.describe()}

## Training

```
{request.command}
```

{state.step} steps of {config.data.batch_size * config.trainer.accumulate * config.trainer.devices} samples, seed \
{config.trainer.seed}, {code_version()}, torch {torch.__version__}, Python {platform.python_version()}, \
{platform.machine()}.

| Made from | Digest |
| --- | --- |
{digests}

## Measured

| Figure | Value |
| --- | --- |
{rows}

`loss_last` is the mean over the last 50 steps (the last fifth of a shorter run); `val_loss` uses clips held out by a
hash of their id, and noise that is the same every time.

## Effective configuration

```toml
{configs.dumps(config).strip()}
```
"""


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``; its presence says that the run is complete."""
    import json

    atomic_write(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
