"""The Lightning module and the one callback that every recipe trains through."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn

from worldloom.artifacts import atomic_write
from worldloom_finetune import checkpointing
from worldloom_finetune.compiling import uncompiled
from worldloom_finetune.config import FinetuneConfig, OptimConfig
from worldloom_finetune.data import Items, Packed, noise_seed
from worldloom_finetune.ema import Ema
from worldloom_finetune.lora import trained


class Job(Protocol):
    """What a recipe provides; `worldloom_finetune.world`, `.tokenizer` and `.preview` are those that ship."""

    config: FinetuneConfig
    model: nn.Module
    train: Items
    val: Items
    digests: Mapping[str, str]
    """What the result is made from, by role; a run resumes only with the same."""
    inputs: tuple[str, ...]
    """The same as artifact ids, for lineage."""
    unused: bool
    """Whether some trained weights take no part in the loss, e.g. action layers on data without actions."""

    def loss(self, batch: Any, generator: torch.Generator, step: int | None) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch and further metrics; all randomness comes from `generator` (on the CPU).

        `step` is the optimizer step, from 0; None to validate.
        """
        ...

    def sample(self) -> np.ndarray | None:
        """A uint8 picture ``(h, w, 3)`` that shows what the model does now, or None."""
        ...


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (from 0), a pure function, so that nothing has to be restored."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    length = max(1, max_steps - config.warmup_steps)
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / length))
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * progress))


class FinetuneModule(lightning.LightningModule):
    """A job as Lightning wants it.

    Args:
        job: model, loss and data.
        start: optimizer steps that were taken before this process began.
    """

    def __init__(self, job: Job, start: int) -> None:
        super().__init__()
        self.model = job.model
        self.job, self.start, self.settings = job, start, job.config
        self.losses: list[Tensor] = []
        self.extra: dict[str, list[float]] = {}
        self.grad_norm: Tensor | float = 0.0
        self.lr = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; only matrices and kernels decay."""
        optim = self.settings.optim
        parameters = list(trained(self.model).values())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, fused=True)

    def cast(self, batch: Any) -> Any:
        """The batch where the weights are, and in their precision (DeepSpeed's bf16 engine converts the weights)."""
        p = next(self.model.parameters())
        return batch.to(p.device, p.dtype)

    def training_step(self, batch: Packed, index: int) -> Tensor:
        """Loss of micro-batch `index` of this process."""
        trainer = self.settings.trainer
        step, micro = self.start + index // trainer.accumulate, index % trainer.accumulate
        if micro == 0:
            self.lr = learning_rate(step, trainer.max_steps, self.settings.optim)
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.lr
        seed = noise_seed(trainer.seed, step, self.global_rank, micro)
        torch.manual_seed(seed)  # dropout
        loss, metrics = self.job.loss(self.cast(batch.content), torch.Generator().manual_seed(seed), step)
        self.losses.append(loss.detach())
        for name, value in metrics.items():
            self.extra.setdefault(name, []).append(float(value))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Measure the gradient norm and clip (ZeRO 1 to 3 do both themselves)."""
        trainer, parameters = self.settings.trainer, trained(self.model).values()
        if trainer.strategy != "deepspeed":
            limit = self.settings.optim.grad_clip or math.inf
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        elif trainer.zero_stage == 0:  # which clips, but does not say what the norm was
            self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@dataclass
class Line:
    """One optimizer step as it was recorded."""

    step: int
    values: dict[str, float]


@dataclass
class Hooks:
    """Where a run reports to; only the first rank's hooks are called."""

    line: Callable[[Line], None] = lambda line: None
    """Every step, in order, in groups of `trainer.log_every`."""
    picture: Callable[[np.ndarray, int], None] = lambda picture, step: None
    """A sample strip."""
    advance: Callable[[int, dict[str, float]], None] = lambda step, values: None
    """Progress: the step and the newest values."""


@dataclass
class Recorder(lightning.Callback):
    """After each optimizer step: average, record, validate, sample, checkpoint, in that order.

    Nothing here draws random numbers from torch's global state that training would see, so switching any of it off
    or on leaves the loss curve as it is.
    """

    module: FinetuneModule
    folder: Path
    facts: dict[str, Any]
    batches: Sequence[Any]
    """Validation batches."""
    ema: Ema | None
    hooks: Hooks
    place: Callable[[int], dict[str, Any]] = lambda step: {}
    """Where the data are after a step, for the checkpoint."""
    pending: list[tuple[int, Tensor, dict[str, float], float, Any]] = field(default_factory=list)
    validated: dict[int, float] = field(default_factory=dict)
    began: float = 0.0
    resumed: checkpointing.TrainState | None = None
    last: dict[str, float] = field(default_factory=dict)

    @property
    def _trainer(self) -> Any:
        return self.module.settings.trainer

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the resumed state into the optimizer that Lightning has just made."""
        if self.ema is not None:
            self.ema.follow()
        if self.resumed is not None:
            checkpointing.restore(self.resumed.groups, trained(self.module.model), trainer.optimizers[0])
            self.resumed = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock, and measure the untouched model at step 0."""
        if self.module.start == 0 and self.batches and self._trainer.val_every:
            self.validated[0] = self.validate()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Act when the batch completed an optimizer step."""
        module, settings = self.module, self._trainer
        if (batch_idx + 1) % settings.accumulate:
            return
        step = module.start + (batch_idx + 1) // settings.accumulate
        done = step >= settings.max_steps
        if self.ema is not None:
            self.ema.update()
        norm: Any = module.grad_norm
        if settings.strategy == "deepspeed" and settings.zero_stage:
            norm = trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0
        extra = {name: sum(values) / len(values) for name, values in module.extra.items()}
        self.pending.append((step, torch.stack(module.losses).mean(), extra, module.lr, norm))
        module.losses, module.extra = [], {}

        def due(every: int) -> bool:
            return done or (every > 0 and step % every == 0)

        if self.batches and due(settings.val_every):
            self.validated[step] = self.validate()
        if due(settings.log_every) or due(settings.val_every) or due(settings.checkpoint_every):
            self.flush(trainer)
        if due(settings.sample_every):
            self._sample(trainer, step)
        if due(settings.checkpoint_every):
            self.checkpoint(trainer, step)

    def flush(self, trainer: Any) -> None:
        """Average the waiting losses over ranks and hand the lines on."""
        if not self.pending:
            return
        losses = torch.stack([entry[1] for entry in self.pending])
        losses = trainer.strategy.reduce(losses, reduce_op="mean")
        elapsed = time.perf_counter() - self.began
        rate = (self.pending[-1][0] - self.module.start) / max(elapsed, 1e-9)
        for (step, _, extra, lr, norm), loss in zip(self.pending, losses.tolist(), strict=True):
            values = {"loss": loss, "lr": lr, "grad_norm": float(norm), **extra}
            if step in self.validated:
                values["val_loss"] = self.validated[step]
            values["steps_per_second"] = rate
            self.last |= values
            if trainer.is_global_zero:
                self.hooks.line(Line(step, values))
        if trainer.is_global_zero:
            self.hooks.advance(self.pending[-1][0], self.last)
        self.pending = []

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation batches with noise that is the same every time, of the averaged weights."""
        model, was = self.module.model, self.module.model.training
        model.eval()
        context = self.ema.applied() if self.ema is not None else nullcontext()
        with context:
            total = 0.0
            for i, batch in enumerate(self.batches):
                generator = torch.Generator().manual_seed(noise_seed(self._trainer.seed, 2**31, i))
                total += float(self.module.job.loss(self.module.cast(batch), generator, None)[0])
        model.train(was)
        return total / len(self.batches)

    def _sample(self, trainer: Any, step: int) -> None:
        if trainer.is_global_zero and self._trainer.zero_stage < 3:
            model, was = self.module.model, self.module.model.training
            model.eval()
            state = torch.get_rng_state()
            averaged = self.ema.applied() if self.ema is not None else nullcontext()
            with averaged, torch.no_grad(), uncompiled():  # it meets many shapes once
                picture = self.module.job.sample()
            torch.set_rng_state(state)
            model.train(was)
            if picture is not None:
                self.hooks.picture(picture, step)

    def checkpoint(self, trainer: Any, step: int) -> None:
        """Gather the state on every rank, write it on the first, and wait for it."""
        groups = checkpointing.capture(trained(self.module.model), trainer.optimizers[0])
        facts = {**self.facts, "data": self.place(step)}
        if self.ema is not None:
            groups["ema"] = {name: value.cpu().contiguous() for name, value in self.ema.averages.items()}
            facts["ema_updates"] = self.ema.updates
        if trainer.is_global_zero:
            state = checkpointing.TrainState(step, groups, facts)
            checkpointing.commit(self.folder / "checkpoints", state, self._trainer.keep)
        trainer.strategy.barrier("checkpoint")


@dataclass
class Curve:
    """``metrics.jsonl``: one JSON line per optimizer step, cut back to the checkpoint when a run resumes."""

    path: Path

    def rewind(self, step: int) -> list[Line]:
        """Drop the lines after `step` (and a torn last line); returns those that stay."""
        kept = [line for line in self.read() if line.step <= step]
        text = "".join(self._text(line) for line in kept)
        atomic_write(self.path, text)
        return kept

    def append(self, line: Line) -> None:
        """Add one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._text(line))

    def read(self) -> list[Line]:
        """All whole lines."""
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            try:
                record = json.loads(text)
            except ValueError:
                continue
            lines.append(Line(record.pop("step"), record))
        return lines

    @staticmethod
    def _text(line: Line) -> str:
        return json.dumps({"step": line.step, **line.values}) + "\n"
