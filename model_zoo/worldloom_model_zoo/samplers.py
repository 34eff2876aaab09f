"""Samplers as pure functions.

Rectified flow (Liu et al. 2022; Lipman et al. 2022): x_s = (1 - s) clean + s noise, so dx/ds = noise - clean, the
velocity. Sampling integrates it from s = 1 to s = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def shift_noise_level(s: Tensor, shift: float) -> Tensor:
    """``shift s / (1 + (shift - 1) s)`` (Esser et al. 2024, eq. 23): 0 and 1 stay; shift > 1 moves the middle up."""
    return shift * s / (1 + (shift - 1) * s)


def flow_levels(steps: int, shift: float = 1.0, *, device: torch.device | None = None) -> Tensor:
    """``steps + 1`` noise levels from 1 to 0."""
    return shift_noise_level(torch.linspace(1, 0, steps + 1, device=device), shift)


def flow_interpolate(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """``(b, c, t, h, w)`` at per-frame noise level ``(b, t)``."""
    level = level[:, None, :, None, None].to(clean.dtype)
    return (1 - level) * clean + level * noise


def flow_euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, levels: Tensor) -> Tensor:
    """Euler's method along ``levels`` (from `flow_levels`); ``velocity(x, level)`` sees x at that noise level."""
    x = noise
    points = levels.tolist()
    for level, following in itertools.pairwise(points):
        x = x + (following - level) * velocity(x, level)
    return x


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), ``uncond + scale (cond - uncond)``; 1 gives the conditional."""
    return unconditional + scale * (conditional - unconditional)
