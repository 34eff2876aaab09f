"""Noise that a seed decides: drawn where it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a shape, on the device and in the type of ``like``.

    Args:
        generator: on the CPU. On another device a generator there draws them, from a seed that this one gives: a CPU
            would need longer for the noise of a large batch than a GPU for the step.
    """
    if like.device.type == "cpu":
        return torch.randn(shape, generator=generator).to(like)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    there = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=there, device=like.device).to(like)
