"""3x3 convolutions of single frames by minimal filtering F(2x2, 3x3), with kernels transformed once and kept.

A tile of 2x2 outputs takes 16 multiplications for each pair of channels where the direct sum takes 36. `winograd` has
the larger tiles, F(4x4, 3x3), for kernels with taps in time. For one frame its 36 products have too few rows and its
kernels are four times as large as they were; here they are 16/9 as large, and one product takes `_STRIP` tiles. All
products of a strip run as one 1x1 convolution in 16 groups, whose kernels oneDNN keeps in the order it reads them in
(torch.ops.mkldnn, as torch's inductor calls it); where there is none, and in float64, as a batched matrix product.

In float32 the rounding error is about 3e-6 of the largest output.

Letters: n frames, h w size, c o channels, s tiles of a strip, p the 16 places of a tile. Tensors are channels-last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_TILE = 2  # outputs along an edge of a tile
_SIZE = _TILE + 2  # inputs along it
_PLACES = _SIZE * _SIZE
_STRIP = 64
"""Tiles at a time. Always as many, the last strip filled up: oneDNN's order of kernels goes by the number of rows, and
kernels in another order are brought into its own at every call, which takes 40 times as long as the product."""
_GRID = (8, 8)
"""The same as the frame of a convolution, which shows oneDNN that memory is channels-last."""

_INPUT = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
_KERNEL = [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]
_OUTPUT = [[1, 1, 1, 0], [0, 1, -1, -1]]


@dataclass(frozen=True)
class Kernels:
    """Transformed kernels."""

    values: Tensor
    """``(16*o, c, 1, 1)`` in oneDNN's order, or ``(16, c, o)``."""
    packed: bool
    channels: tuple[int, int]
    """Given and made."""


@lru_cache(maxsize=4)
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of a tile's rows and columns at once: input ``(16, 16)``, kernel ``(16, 9)``, output ``(4, 16)``."""
    found = [torch.tensor(m, dtype=torch.float64) for m in (_INPUT, _KERNEL, _OUTPUT)]
    rows, kernel, output = (torch.kron(m, m).to(dtype).contiguous() for m in found)
    return rows, kernel, output


def worthwhile(tiles: int, c: int, o: int) -> bool:
    """Whether this is faster than a direct convolution, as measured: ``tiles`` counts 2x2 outputs of all frames."""
    return min(c, o) >= 64 and tiles >= _STRIP * 3 // 4


def transform(weight: Tensor) -> Kernels:
    """``(o, c, 1, 3, 3)`` or ``(o, c, 3, 3)`` -> what `conv3x3` takes."""
    weight = weight.reshape(*weight.shape[:2], 3, 3) if weight.ndim == 5 else weight
    o, c = weight.shape[:2]
    of_kernel = _matrices(weight.dtype)[1]
    values = (of_kernel @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(_PLACES, o, c)
    if not _packs(weight.dtype):
        return Kernels(values.transpose(1, 2).contiguous(), packed=False, channels=(c, o))
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        values.view(_PLACES * o, c, 1, 1), [0, 0], [1, 1], [1, 1], _PLACES, [1, _PLACES * c, *_GRID]
    )
    return Kernels(packed, packed=True, channels=(c, o))


def conv3x3(x: Tensor, kernels: Kernels, bias: Tensor | None) -> Tensor:
    """``(n, h, w, c)`` -> ``(n, h, w, o)``, with zeros outside the frame. ``bias`` is ``(o,)``."""
    n, h, w, c = x.shape
    o = kernels.channels[1]
    rows, columns = -(-h // _TILE), -(-w // _TILE)
    high, wide = rows * _TILE, columns * _TILE
    padded = x.new_zeros(n, high + 2, wide + 2, c)
    padded[:, 1 : h + 1, 1 : w + 1] = x
    seen, made = _places(n, rows, columns)
    result = x.new_empty(n, high, wide, o)
    into, _, out_of = _matrices(x.dtype)
    pixels, flat = padded.view(-1, c), result.view(-1, o)
    for tiles, places in zip(seen.split(_STRIP * _PLACES), made.split(_STRIP * _TILE**2), strict=True):
        given = torch.matmul(into, pixels.index_select(0, tiles).view(-1, _PLACES, c))  # (s, p, c)
        product = _products(given, kernels)  # (s, p, o)
        values = out_of @ product if bias is None else torch.baddbmm(bias, out_of.expand(len(product), -1, -1), product)
        flat.index_copy_(0, places, values.view(-1, o))
    return result if (high, wide) == (h, w) else result[:, :h, :w]


def _products(given: Tensor, kernels: Kernels) -> Tensor:
    """A strip ``(s, p, c)`` times the kernels of each place -> ``(s, p, o)``."""
    c, o = kernels.channels
    if not kernels.packed:
        return torch.bmm(given.transpose(0, 1), kernels.values).transpose(0, 1)
    frame = given.view(1, *_GRID, _PLACES * c).permute(0, 3, 1, 2)
    made = torch.ops.mkldnn._convolution_pointwise(
        frame, kernels.values, None, [0, 0], [1, 1], [1, 1], _PLACES, "none", [], ""
    )
    return made.permute(0, 2, 3, 1).reshape(_STRIP, _PLACES, o)


@lru_cache(maxsize=16)
def _places(n: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where the tiles of ``n`` frames, in whole strips, find their pixels in padded frames, and leave them in new ones.

    Returns:
        Numbers of pixels, of 16 for each tile and of 4 for each tile. The last tile fills up the last strip.
    """
    total = n * rows * columns
    tile = torch.arange(-(-total // _STRIP) * _STRIP).clamp_max_(total - 1)
    frame, row, column = tile // (rows * columns), tile // columns % rows, tile % columns
    high, wide = rows * _TILE + 2, columns * _TILE + 2
    inside = torch.arange(_SIZE)
    corner = (frame * high + row * _TILE) * wide + column * _TILE
    seen = corner[:, None, None] + inside[:, None] * wide + inside
    inside = torch.arange(_TILE)
    corner = ((frame * rows + row) * _TILE * columns + column) * _TILE
    made = corner[:, None, None] + inside[:, None] * columns * _TILE + inside
    return seen.flatten(), made.flatten()


@lru_cache(maxsize=1)
def _packing() -> bool:
    """Whether torch has oneDNN with the two operators that `Kernels` in its order need."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _packs(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.mkldnn.enabled and _packing()
