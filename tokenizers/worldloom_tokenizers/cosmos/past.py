"""What attention along time remembers of a stream: each latent frame once, float32 in three bytes a value.

A frame in float32 is kept as whole numbers of 24 bits and the scale that they are multiplied by: off by at most
2**-23 of its largest value, a unit in the last place there, in three quarters of the memory. Frames of other types are
kept as they are.

Letters: b batch, t frames, n places of a frame, c channels.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from worldloom_tokenizers.codec import State

_BLOCK = 1 << 25
"""Values of a block of remembered frames: so large that a CPU's allocator maps it apart, where it takes memory only as
it is filled and leaves no holes between what is freed at each chunk."""
_LARGEST = (1 << 23) - 4
"""The whole number that a frame's largest value becomes: not the very last, as the division may round up by one."""


class Past:
    """The frames of one layer in a stream's state, in blocks that are filled as frames come and never copied.

    Args:
        key: the layer; its entries in the state have keys that begin with it.
    """

    def __init__(self, state: State, key: Hashable) -> None:
        self._state, self._key = state, key

    @property
    def frames(self) -> int:
        """How many there are."""
        return int(self._state.get((self._key, "frames"), torch.zeros(())))

    def read(self, places: slice) -> list[Tensor]:
        """Some places of all frames, ``(b, t, n', c)`` in consecutive parts."""
        left, parts = self.frames, []
        while left:
            high, low, scale = self._block(len(parts))
            count = min(left, high.shape[1])
            part = high[:, :count, places]
            if low.numel():  # whole numbers of 24 bits are exact in float32
                part = part.float().mul_(256).add_(low[:, :count, places]).mul_(scale[:, :count])
            parts.append(part)
            left -= count
        return parts

    @torch.no_grad()
    def append(self, x: Tensor) -> None:
        """Remember frames ``(b, t, n, c)``."""
        b, t, places, c = x.shape
        size, frames = max(1, _BLOCK // x[:, 0].numel()), self.frames
        packed = x.dtype == torch.float32
        self._state[self._key, "frames"] = torch.tensor(frames + t)
        for frame in x.unbind(1):
            number, place = divmod(frames, size)
            if not place:
                with torch.inference_mode(False):  # later steps write to it, whether in inference mode or not
                    shape = (b, size, places, c)
                    self._state[self._key, number, "high"] = x.new_empty(
                        shape, dtype=torch.int16 if packed else x.dtype
                    )
                    self._state[self._key, number, "low"] = x.new_empty(shape if packed else 0, dtype=torch.uint8)
                    self._state[self._key, number, "scale"] = x.new_empty(b, size, 1, 1)
            high, low, scale = (self._state[self._key, number, name] for name in ("high", "low", "scale"))
            if packed:
                each = frame.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30) / _LARGEST
                whole = (frame / each).round_().int()
                high[:, place], low[:, place], scale[:, place] = whole >> 8, whole & 255, each
            else:
                high[:, place] = frame
            frames += 1

    def _block(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(b, size, n, c)`` upper 16 bits or whole values, lower 8 or nothing, and scales ``(b, size, 1, 1)``."""
        high, low, scale = (self._state[self._key, number, name] for name in ("high", "low", "scale"))
        return high, low, scale
