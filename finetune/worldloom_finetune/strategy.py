"""DeepSpeed under Lightning, on GPUs as Lightning has it and on CPUs as well."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from worldloom.errors import missing_extra
from worldloom_finetune.config import TrainerConfig


class AnyDeviceDeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy without its CUDA-only gate.

    On CUDA every method is Lightning's own, with one correction: Lightning divides the loss by the number of
    accumulated micro-batches and DeepSpeed does so again (2.6.6 with 0.19.8), which clips at the wrong norm. On CPU
    three steps differ: the environment is set up as DDP does it, no device index is looked up, and
    ``deepspeed.initialize`` gets device rank 0 (the CPU has no index).
    """

    @property
    def _on_cuda(self) -> bool:
        return isinstance(self.accelerator, CUDAAccelerator)

    def setup_environment(self) -> None:
        if self._on_cuda:
            super().setup_environment()
        else:
            DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if self._on_cuda:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        for p in model.parameters():
            # DeepSpeed looks at weights by their storage, where channels-last ones are out of order.
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        if self._on_cuda:
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        import deepspeed

        engine, ds_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=0),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],  # type: ignore[arg-type]
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, ds_optimizer

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, **{**kwargs, "scale_wrt_gas": False})


def build(config: TrainerConfig, batch_size: int, *, cpu: bool, unused: bool = False) -> Strategy | str:
    """The Lightning strategy that `config` asks for.

    Args:
        cpu: train on the CPU.
        unused: some trained weights take no part in the loss (DDP must be told; ZeRO copes).

    Raises:
        WorldloomError: DeepSpeed was asked for and is not installed.
    """
    if config.strategy == "deepspeed":
        return _deepspeed(config, batch_size, cpu=cpu)
    if config.strategy == "ddp" or config.devices > 1:
        return DDPStrategy(find_unused_parameters=unused, process_group_backend="gloo" if cpu else None)
    return "auto"


def _deepspeed(config: TrainerConfig, batch_size: int, *, cpu: bool) -> AnyDeviceDeepSpeed:
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for each accelerator it knows, and says so
    try:
        import deepspeed
    except ImportError as error:
        raise missing_extra("deepspeed", "finetune") from error
    if cpu and not config.compile_comm:
        # Without this DeepSpeed compiles a C++ extension at its first start (and fails where there is no compiler);
        # gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage >= 2:
        # One bucket size for all machines: sums are grouped alike, so a run can be repeated elsewhere.
        zero |= {"contiguous_gradients": True, "overlap_comm": not cpu, "reduce_scatter": True}
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        # torch.optim.AdamW, which compiles nothing, in place of DeepSpeed's fused one.
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": batch_size,
        "wall_clock_breakdown": False,
    }
    return AnyDeviceDeepSpeed(
        config=settings, logging_level=logging.WARNING, process_group_backend="gloo" if cpu else None
    )
