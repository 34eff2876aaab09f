"""Latents of a world driven by actions: a soft spot on a torus, pushed along both axes by -1, 0 or 1 a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from worldloom.schema import LatentBatch


def _spots(places: Tensor, size: int) -> Tensor:
    """Positions ``(b, t, 2)`` -> pictures ``(b, t, size, size)``."""
    distance = (torch.arange(size)[:, None] - places[..., None, :]).abs()  # (b, t, size, 2)
    profile = torch.exp(-torch.minimum(distance, size - distance).square() / 1.2)
    return profile[..., 0][..., :, None] * profile[..., 1][..., None, :]


def driven_squares(samples: int, frames: int, seed: int, *, size: int = 8, free: bool = False) -> LatentBatch:
    """Latents ``(b, c, frames, size, size)`` of unit variance, one action ``(2,)`` between two frames.

    Args:
        free: a second channel with a spot that moves by itself, which no action foretells.
    """
    generator = torch.Generator().manual_seed(seed)

    def walk() -> Tensor:
        return torch.randint(-1, 2, (samples, frames - 1, 2), generator=generator)

    start = torch.randint(size, (samples, 1, 2), generator=generator)
    actions = walk()
    moves = [actions, walk()] if free else [actions]
    places = [torch.cat([start, start + way.cumsum(dim=1)], dim=1) % size for way in moves]
    latents = torch.stack([_spots(place, size) for place in places], dim=1)
    return LatentBatch((latents - latents.mean()) / latents.std(), actions.float(), None, ())
