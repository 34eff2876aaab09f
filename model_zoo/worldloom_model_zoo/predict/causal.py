"""Causal attention of the predict transformer: which frames may see which, and the cache of those already seen.

Letters: b batch, t latent frames, c channels, h w latent size, n tokens of a frame, k heads, e head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the frames already seen, per block ``(b, k, frames*n, e)``. Keys carry their rotation.

    With a window W and a sink S the cache holds at most the S first and the W-1 last frames: what the next may see.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    frames: int = 0
    """Latent frames committed since the start; the next frame has this position."""
    last: Tensor | None = None
    """The last committed latent frame ``(b, c, 1, h, w)``."""

    def append(self, x: Tensor, keys: list[Tensor], values: list[Tensor], window: int, sink: int = 0) -> None:
        """Commit latent frames ``(b, c, t, h, w)`` with their keys and values."""
        frames = x.shape[2]
        tokens = keys[0].shape[2] // frames  # of a frame
        if self.keys:
            keys = [torch.cat(pair, dim=2) for pair in zip(self.keys, keys, strict=True)]
            values = [torch.cat(pair, dim=2) for pair in zip(self.values, values, strict=True)]
        length = keys[0].shape[2]
        if window and length > (sink + window - 1) * tokens:
            first, last = sink * tokens, length - (window - 1) * tokens
            keys = [torch.cat([x[:, :, :first], x[:, :, last:]], dim=2) if sink else x[:, :, last:] for x in keys]
            values = [torch.cat([x[:, :, :first], x[:, :, last:]], dim=2) if sink else x[:, :, last:] for x in values]
        self.keys, self.values = keys, values
        self.frames += frames
        self.last = x[:, :, -1:]

    def positions(self, count: int, sink: int, device: torch.device) -> Tensor:
        """``(count,)`` positions of the frames that are held: the sink, then those up to the last committed."""
        held = torch.arange(self.frames - count, self.frames, device=device)
        return torch.where(torch.arange(count, device=device) < sink, torch.arange(count, device=device), held)


def causal_mask(rows: Tensor, columns: Tensor, tokens: int, window: int, sink: int) -> Tensor:
    """``(rows*tokens, columns*tokens)`` boolean: may the row's token see the column's?

    ``rows`` and ``columns`` are positions of frames. A frame sees its window and, besides, the first ``sink`` frames
    of the sequence (attention sinks, Xiao et al. 2024).
    """
    row, column = rows.repeat_interleave(tokens)[:, None], columns.repeat_interleave(tokens)[None, :]
    allowed = row >= column
    return allowed & ((row - column < window) | (column < sink)) if window else allowed


def forcing_mask(frames: int, tokens: int, window: int, sink: int, device: torch.device) -> Tensor:
    """``(2*frames*tokens, 2*frames*tokens)`` boolean, for frames of context followed by the same frames noisy.

    Context is causal. A noisy frame sees the context before it, within its window, and itself.
    """
    at = torch.arange(frames, device=device)
    seen, own = causal_mask(at, at, 1, window, sink), torch.eye(frames, dtype=torch.bool, device=device)
    mask = torch.cat([torch.cat([seen, torch.zeros_like(own)], dim=1), torch.cat([seen & ~own, own], dim=1)])
    return mask.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)
