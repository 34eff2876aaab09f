"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308, section 4).

A tile of 4x4 outputs takes 36 multiplications for each pair of channels where the direct sum takes 144. Here a tile's
36 values become 36 matrix products over channels, and the taps of a kernel that is also 3 long in time add up in
them, so the transforms, which are themselves small matrix products, are paid once per frame. On CPUs, where torch's
convolutions are direct, that is about twice as fast from 96 channels on (benchmarks/tokenizers.py).

In float32 the rounding error is about 1e-5 of the largest output, ten times that of a direct sum.

Letters: b batch, T frames given, t frames made, h w size, c o channels, k taps in time, n tiles. Tensors are
channels-last: ``(b, t, h, w, c)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_TILE = 4  # outputs along an edge of a tile
_STRIP = 1 << 20  # transformed values held at a time, per frame: they should stay in the cache

_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_KERNEL = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
_KERNEL += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


@lru_cache(maxsize=4)
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of a tile's rows and columns at once: input ``(36, 36)``, kernel ``(36, 9)``, output ``(16, 36)``."""
    found = [torch.tensor(m, dtype=torch.float64) for m in (_INPUT, _KERNEL, _OUTPUT)]
    rows, kernel, output = (torch.kron(m, m).to(dtype).contiguous() for m in found)
    return rows, kernel, output


def worthwhile(tiles: int, channels: int, taps: int) -> bool:
    """Whether this is faster than a direct convolution, as measured: ``tiles`` counts 4x4 outputs of all frames.

    One tap in time leaves too little work between the transforms; few tiles leave the kernel's transform unpaid.
    """
    return taps > 1 and channels >= 64 and tiles >= 256


def conv3x3(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """Convolve with zero padding of 1 in space, and causally in time.

    Args:
        parts: ``(b, T, h, w, c)`` in consecutive parts, which are not copied together: a past and what follows it.
        weight: ``(o, c, k, 3, 3)``; the last tap in time sees the frame that is made.
        bias: ``(o,)``.
        outputs: make the last t of the T frames. Taps that reach before the first one given see zeros.

    Returns:
        ``(b, t, h, w, o)``.
    """
    frames = [frame for part in parts for frame in part.unbind(1)]  # of (b, h, w, c) each
    b, h, w, c = frames[0].shape
    o, _, taps, _, _ = weight.shape
    into, of_kernel, out_of = _matrices(weight.dtype)
    size = _TILE + 2
    rows, columns = -(-h // _TILE), -(-w // _TILE)
    # (o, c, k, 3, 3), as a rule channels-last in memory -> (36, k, o, c), of which products take the transpose
    kernels = (of_kernel @ weight.permute(3, 4, 2, 0, 1).reshape(9, -1)).view(36, taps, o, c).transpose(2, 3)
    result = weight.new_empty(b, outputs, rows * _TILE, columns * _TILE, o)
    tiled = result.view(b, outputs, rows, _TILE, columns, _TILE, o)
    strip = max(1, _STRIP // (36 * columns * max(c, o)))  # rows of tiles
    for row in range(b):
        for top in range(0, rows, strip):
            high = min(strip, rows - top)
            n = high * columns
            start = top * _TILE - 1  # the first row of pixels that the strip sees
            seen = slice(max(start, 0), min(start + high * _TILE + 2, h))
            padded = weight.new_zeros(high * _TILE + 2, columns * _TILE + 2, c)
            inside = padded[seen.start - start : seen.stop - start, 1 : w + 1]
            sy, sx = padded.stride(0), padded.stride(1)
            tiles = padded.as_strided((size, size, high, columns, c), (sy, sx, sy * _TILE, sx * _TILE, 1))
            past: list[Tensor] = []
            for number, frame in enumerate(frames):
                inside.copy_(frame[row, seen])
                past.append((into @ tiles.reshape(size * size, n * c)).view(36, n, c))
                made = number - (len(frames) - outputs)
                if made < 0:
                    continue
                past = past[-taps:]
                product = torch.bmm(past[-1], kernels[:, -1])
                for back in range(1, len(past)):
                    product.baddbmm_(past[-1 - back], kernels[:, taps - 1 - back])
                values = (out_of @ product.view(36, n * o)).view(_TILE, _TILE, high, columns, o)
                target = tiled[row, made, top : top + high]  # (high, 4, columns, 4, o)
                if bias is None:
                    target.copy_(values.permute(2, 0, 3, 1, 4))
                else:
                    torch.add(values.permute(2, 0, 3, 1, 4), bias, out=target)
    return result[:, :, :h, :w]
