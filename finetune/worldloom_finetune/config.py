"""The configuration of a training run: frozen dataclasses, a sentence per field, no torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which part of the dataset a step sees."""

    batch_size: int = 8
    """Samples per process and micro-batch."""
    frames: int = 0
    """Video frames of a training window; 0 takes all that every sample has."""
    size: tuple[int, int] | None = None
    """Height and width that clips are fitted to before they are encoded or trained on; unset keeps their own."""
    crop: tuple[int, int] | None = None
    """Height and width of what is cut from the frames of a clip, at a random place in training; clips may then be of
    different sizes. Only the recipe "tokenizer" takes it."""
    stride: int = 0
    """Frames between the starts of windows cut from a clip; 0 means windows that do not overlap."""
    num_workers: int = 0
    """Worker processes that load samples; 0 loads in the training process."""
    val_fraction: float = 0.1
    """Share of the clips held out for validation, chosen by a hash of the clip id."""
    val_batches: int = 4
    """How many batches one validation measures."""
    weights: tuple[float, ...] = ()
    """How often each of several datasets (``--data A,B``) is drawn from, in any unit, e.g. [3, 1]; a dataset is
    shuffled anew when it is exhausted. Unset draws every sample equally often."""
    memory_gb: float = 4.0
    """A dataset up to this size is held in memory; a larger one is read from its shards as it is needed."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the two moments."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up; cosine falls to a tenth of `lr` at `trainer.max_steps`."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of training every weight."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 0.0
    """Scale: the adapter's output is multiplied by alpha / rank; 0 takes alpha = rank."""
    targets: tuple[str, ...] = ()
    """Endings of the names of the linear layers that get an adapter; empty takes those of the model's blocks."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the trained weights; what is exported when it is on."""

    decay: float = 0.0
    """Decay per step; 0 switches the average off. Early steps use min(decay, (1 + step) / (10 + step))."""


@dataclass(frozen=True)
class TrainerConfig:
    """How long, where, and what is written on the way."""

    max_steps: int = 1000
    """Optimizer steps of the whole run, resumed parts included."""
    devices: int = 1
    """Processes: one per GPU, or that many CPU processes."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["32", "bf16-mixed"] = "32"
    """Arithmetic of the forward and backward pass; weights and moments stay float32 in both."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    strategy: Literal["auto", "ddp", "deepspeed"] = "auto"
    """auto: one plain process, or DDP on several; deepspeed: ZeRO at `zero_stage`."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed's ZeRO stage (only with strategy deepspeed)."""
    threads: int = 0
    """torch threads per process on CPU; 0 shares the cores out."""
    compile: bool = False
    """Compile the network's blocks (torch.compile): about a minute at the start, then faster steps; for GPUs, and for
    data of one shape."""
    compile_comm: bool = False
    """On CPU: let DeepSpeed compile its shared-memory collectives (40 s at the first start, needs g++ and ninja)."""
    val_every: int = 100
    """Steps between validations; 0 validates at the end only."""
    checkpoint_every: int = 100
    """Steps between checkpoints of the training state; 0 writes one at the end only."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    sample_every: int = 0
    """Steps between sample strips; 0 makes one at the end only."""
    log_every: int = 10
    """Steps between lines of the log (every step is recorded in metrics.jsonl)."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the exported weights (adapters and statistics are always float32)."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""


@dataclass(frozen=True)
class TrackingConfig:
    """Experiment tracking by MLflow."""

    enabled: bool = True
    """Log to MLflow and register the result in its model registry."""
    uri: str = ""
    """Tracking server or store; empty takes the local default."""
    experiment: str = "worldloom"
    """MLflow experiment."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What every recipe can be told, apart from its inputs and output; a recipe adds its objective and its model."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data and batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Run."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking."""
