"""Haar wavelets as Cosmos-Tokenizer cuts patches: each level halves the axes and leaves sums and differences.

A level applied to ``(..., c)`` gives bands times channels, the channels fastest; the next level takes all of them.
Values are scaled so that the lowest band is the mean of the patch.

Letters: b batch, t h w positions, c channels. Tensors are channels-last.
"""

from __future__ import annotations

import torch
from torch import Tensor

VIDEO = (1, 2, 3)
"""Axes of a level in the order of its bands: time, rows, columns."""
IMAGE = (3, 2)
"""The same for images: columns before rows."""


def forward(x: Tensor, patch: int, axes: tuple[int, ...]) -> Tensor:
    """``(b, t, h, w, c)`` -> patches of ``patch`` along each of ``axes`` as channels."""
    for _ in range(patch.bit_length() - 1):
        bands = [x]
        for axis in axes:
            pairs = [band.unflatten(axis, (-1, 2)).unbind(axis + 1) for band in bands]
            bands = [band for a, b in pairs for band in ((a + b) / 2, (a - b) / 2)]
        x = torch.cat(bands, dim=-1)
    return x


def inverse(x: Tensor, patch: int, axes: tuple[int, ...]) -> Tensor:
    """The reverse of `forward`."""
    for _ in range(patch.bit_length() - 1):
        bands = list(x.chunk(2 ** len(axes), dim=-1))
        for axis in reversed(axes):
            pairs = zip(bands[::2], bands[1::2], strict=True)
            bands = [torch.stack([low + high, low - high], dim=axis + 1).flatten(axis, axis + 1) for low, high in pairs]
        (x,) = bands
    return x
