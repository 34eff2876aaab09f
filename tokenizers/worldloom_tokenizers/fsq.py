"""Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505, section 3 and appendix A.1).

Each channel of a vector is squashed to an interval and rounded to one of a few levels; a vector of d channels is one of
``prod(levels)`` codes, with no codebook to learn and none to collapse. Rounding passes gradients straight through.

A code's values lie in [-1, 1]; its index counts in mixed radix, the first channel fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worldloom.errors import WorldloomError

_EPS = 1e-3


def check_levels(levels: Sequence[int]) -> None:
    """Refuse levels that make no code.

    Raises:
        WorldloomError: fewer than three levels in a channel, or more codes than an int32 counts.
    """
    if not levels or min(levels) < 3 or math.prod(levels) >= 2**31:
        raise WorldloomError("FSQ needs at least three levels per channel and fewer than 2^31 codes", got=tuple(levels))


def _per_channel(levels: Sequence[int], like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.ndim
    shape[dim] = len(levels)
    return torch.tensor(levels, dtype=like.dtype, device=like.device).view(shape)


def quantize(z: Tensor, levels: Sequence[int], dim: int = 1) -> Tensor:
    """Any values, ``len(levels)`` channels along ``dim`` -> codes in [-1, 1], same shape; differentiable."""
    assert z.shape[dim] == len(levels), "one level per channel"
    count = _per_channel(levels, z, dim)
    half = (count - 1) * (1 + _EPS) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).to(z)
    bounded = (z + torch.atanh(offset / half)).tanh() * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / (count // 2)


def codes_to_indices(codes: Tensor, levels: Sequence[int], dim: int = 1) -> Tensor:
    """Codes as `quantize` gives them -> int64 indices, without ``dim``."""
    half = _per_channel(levels, codes, dim) // 2
    digits = (codes * half + half).round().long()
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    return (digits * _per_channel(basis, digits, dim)).sum(dim=dim)


def indices_to_codes(indices: Tensor, levels: Sequence[int], dim: int = 1) -> Tensor:
    """Indices -> float32 codes in [-1, 1], with the channels at ``dim``.

    Raises:
        WorldloomError: an index outside the codebook.
    """
    size = math.prod(levels)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise WorldloomError(f"code indices are 0 to {size - 1}", got=(int(indices.min()), int(indices.max())))
    channels, rest = [], indices.long()
    for level in levels:
        channels.append((rest % level - level // 2) / (level // 2))
        rest = rest // level
    return torch.stack(channels, dim=dim).float()
