"""Causal convolutions and norms that the Cosmos and Wan tokenizers are made of, on channels-last videos.

Released checkpoints keep kernels as ``(o, c, k, h, w)``; here activations are ``(b, t, h, w, c)``, so that norms over
channels and products with 1x1 kernels run over contiguous memory. What is computed is the same; how, depends on the
size: 3x3 kernels go through `winograd` on a CPU where that is faster, taps in time that would only meet zeros are
skipped, and enlarging twice before a convolution is folded into it. With gradients, and on other devices, torch's own
convolutions run.

Letters: b batch, t frames, h w size, c o channels, k taps in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers import winograd, winograd_frames
from worldloom_tokenizers.codec import State
from worldloom_tokenizers.kept import Kept

Past = Literal["zeros", "first"]
"""What a causal convolution sees before the first frame: zeros, or the first frame again."""


class CausalConv(nn.Module):
    """A convolution that sees the present frame and those before it; stride 1, size kept.

    Args:
        kernel: (taps in time, height, width); height and width are 3 or 1.
        past: what is before the first frame.
    """

    def __init__(self, c: int, o: int, kernel: tuple[int, int, int] = (3, 3, 3), past: Past = "zeros") -> None:
        super().__init__()
        conv = nn.Conv3d(c, o, kernel)  # its initialisation
        assert conv.bias is not None
        self.weight, self.bias, self.past = conv.weight, conv.bias, past
        self.frames = Kept(winograd_frames.transform)
        self.summed = Kept(_sum_of_taps)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """``(b, t, h, w, c)`` -> ``(b, t, h, w, o)``."""
        past, weight = self._past(x, state), self.weight
        frames, summed = (kept.keeps(self.training, weight) for kept in (self.frames, self.summed))
        if weight.shape[3] == 3:
            y = conv3x3(past, x, weight, self.bias, self.frames if frames else None)
        else:
            if self.past == "first" and past is None and weight.shape[2] > 1:
                weight = self.summed.value(not summed, weight)  # every tap sees the same frame
            y = along_time(past, x, weight.flatten(2), self.bias)
        if state is not None and self.weight.shape[2] > 1:
            self._remember(x, past, state)
        return y

    def _past(self, x: Tensor, state: State | None) -> Tensor | None:
        """The frames before ``x`` that the taps need, as far as there are any."""
        taps = self.weight.shape[2]
        past = state.get(self) if state is not None else None
        if past is None and self.past == "first" and min(taps, x.shape[1]) > 1:
            past = x[:, :1].expand(-1, taps - 1, -1, -1, -1)
        return past

    def _remember(self, x: Tensor, past: Tensor | None, state: State) -> None:
        """Keep what ``x`` leaves to the taps; where frames are kept already, in their place."""
        taps = self.weight.shape[2]
        held, kept = x[:, -(taps - 1) :].detach(), state.get(self)
        if held.shape[1] < taps - 1 and past is not None:
            held = torch.cat([past[:, held.shape[1] - (taps - 1) :], held], dim=1)
        elif held.shape[1] < taps - 1 and self.past == "first":
            held = held.expand(-1, taps - 1, -1, -1, -1)
        if kept is None or kept.shape != held.shape or torch.is_grad_enabled():  # gradients may go through those kept
            state[self] = writable(held)
        else:
            kept.copy_(held)


def _sum_of_taps(weight: Tensor) -> Tensor:
    """``(o, c, k, 1, 1)`` -> ``(o, c, 1, 1, 1)``."""
    return weight.sum(dim=2, keepdim=True)


def writable(x: Tensor) -> Tensor:
    """A copy to keep in a state, that later steps can write to whether in inference mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def along_time(past: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x (b, t, h, w, c)`` after ``past``, convolved along time by ``weight (o, c, k)`` -> ``(b, t, h, w, o)``.

    Taps that reach before the first frame given see zeros. Without gradients nothing is copied together.
    """
    t, taps = x.shape[1], weight.shape[2]
    y = F.linear(x, weight[..., -1], bias)
    parts = [x] if past is None else [past, x]
    if torch.is_grad_enabled():
        parts = [torch.cat(parts, dim=1)]
    for back in range(1, taps):
        frame = t - sum(part.shape[1] for part in parts)  # the number of a part's first frame; that of x is 0
        for part in parts:
            first, last = max(frame + back, 0), min(frame + part.shape[1] + back, t)  # what sees it through this tap
            if first < last:
                y = _add_product(y, first, part[:, first - back - frame : last - back - frame], weight[..., -1 - back])
            frame += part.shape[1]
    return y


def _add_product(y: Tensor, first: int, x: Tensor, weight: Tensor) -> Tensor:
    """``y`` with the products of ``x`` and ``weight`` added to as many of its frames, from ``first`` on."""
    last = first + x.shape[1]
    if torch.is_grad_enabled():
        return y + F.pad(F.linear(x, weight), (0, 0, 0, 0, 0, 0, first, y.shape[1] - last))
    for row in range(len(y)):  # frames of one video lie one behind the other
        y[row, first:last].flatten(0, 2).addmm_(x[row].flatten(0, 2), weight.T)
    return y


def conv3x3(
    past: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frames: Kept[winograd_frames.Kernels] | None = None,
) -> Tensor:
    """``x (b, t, h, w, c)`` after ``past``, convolved as `winograd.conv3x3` says -> ``(b, t, h, w, o)``.

    Args:
        frames: keeps what `winograd_frames` makes of a ``weight`` of one tap in time; in inference alone.
    """
    b, t, h, w, c = x.shape
    o, _, taps = weight.shape[:3]
    parts = [x] if past is None else [past, x]
    total = sum(part.shape[1] for part in parts)
    if filters_fit(x):
        tiles = b * t * -(-h // 2) * -(-w // 2)
        if taps == 1 and frames is not None and winograd_frames.worthwhile(tiles, c, o):
            return winograd_frames.conv3x3(x.flatten(0, 1), frames.value(False, weight), bias).unflatten(0, (b, t))
        # the first frame alone meets one tap
        if total > 1 and winograd.worthwhile(b * t * -(-h // 4) * -(-w // 4), min(c, o), taps):
            return winograd.conv3x3(parts, weight, bias, t)
    if taps == 1 or total == 1:  # only the last tap sees a frame
        flat = x.flatten(0, 1).permute(0, 3, 1, 2)  # (b*t, c, h, w), channels-last in memory
        return F.conv2d(flat, weight[:, :, -1], bias, padding=1).permute(0, 2, 3, 1).unflatten(0, (b, t))
    given = torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)  # (b, c, T, h, w), channels-last in memory
    missing = taps - 1 - (total - t)
    if missing:
        given = F.pad(given, (0, 0, 0, 0, missing, 0))
    return conv3d(given, weight, bias, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)


def filters_fit(x: Tensor) -> bool:
    """Whether minimal filtering, of `winograd` and `winograd_frames`, may take the place of torch's convolutions."""
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return exact and x.device.type == "cpu" and not torch.is_grad_enabled()


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0
) -> Tensor:
    """torch's, but for bfloat16 on a CPU, where it computes in float32, and for float32 there without gradients.

    In bfloat16, over frames of a few pixels, torch 2.13 takes values from memory that was never written into the
    gradient of the kernel; it is not a number now and then, and wrong more often (tests/tokenizers/test_layers.py).
    In float32 it multiplies unfolded matrices for a single video whose channels, frames and rows multiply to 20,480 or
    less. oneDNN, which it takes for more, was 2 to 11 times as fast there with 3 to 64 channels.
    """
    stride, padding = (list(v) if isinstance(v, Sequence) else [v] * 3 for v in (stride, padding))
    autocast = torch.is_autocast_enabled("cpu")
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not autocast
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
    ):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, [1, 1, 1], 1)
    if x.device.type != "cpu" or x.dtype == torch.float64 or not (x.dtype == torch.bfloat16 or autocast):
        return F.conv3d(x, weight, bias, stride, padding)
    made = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    with torch.autocast("cpu", enabled=False):
        bias = bias if bias is None else bias.float()
        return F.conv3d(x.float(), weight.float(), bias, stride, padding).to(made)


_ENLARGED = ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
"""For even and for odd rows of an enlarged image: which of a kernel's three rows meet the same row of the small one."""


def enlarging_kernels(weight: Tensor) -> list[Tensor]:
    """``(o, c, 3, 3)`` -> four of ``(o, c, 2, 2)``, for the places within an output pair, row by row."""
    weight = weight.reshape(*weight.shape[:2], 3, 3)
    sums = torch.tensor(_ENLARGED, dtype=weight.dtype, device=weight.device)  # (place, 2 taps, 3 taps)
    return [
        torch.einsum("ip,jq,ocpq->oijc", sums[row], sums[column], weight).permute(0, 3, 1, 2)
        for row in (0, 1)
        for column in (0, 1)
    ]


def enlarge3x3(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Enlarge twice by repeating pixels, then a 3x3 convolution: ``(b, t, h, w, c)`` -> ``(b, t, 2h, 2w, o)``.

    Nine taps on repeated pixels meet four pixels: each of the four places within an output pair is a 2x2 convolution of
    the small image, whose taps are sums of the kernel's, `enlarging_kernels`.
    """
    b, t, h, w, _ = x.shape
    o = kernels[0].shape[0]
    flat = x.flatten(0, 1).permute(0, 3, 1, 2)  # (b*t, c, h, w)
    made = x.new_empty(b * t, h, 2, w, 2, o)
    for place, kernel in enumerate(kernels):
        row, column = divmod(place, 2)
        y = F.conv2d(flat, kernel, bias, padding=1).permute(0, 2, 3, 1)
        made[:, :, row, :, column] = y[:, row : row + h, column : column + w]
    return made.view(b, t, 2 * h, 2 * w, o)


def conv_down(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of stride 2, zeros to the right and below: ``(b, t, h, w, c)`` -> ``(b, t, h/2, w/2, o)``."""
    b, t = x.shape[:2]
    flat = F.pad(x.flatten(0, 1), (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)  # (b*t, c, h+1, w+1)
    return F.conv2d(flat, weight, bias, stride=2).permute(0, 2, 3, 1).unflatten(0, (b, t))


def channels_last(module: nn.Module) -> None:
    """Keep kernels as ``(o, k, h, w, c)`` in memory, as the activations are: none is copied at each call."""
    for parameter in module.parameters():
        if parameter.ndim in (4, 5):
            form = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=form)


def silu_(x: Tensor) -> Tensor:
    """SiLU, in place where no gradients are recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add_(x: Tensor, y: Tensor) -> Tensor:
    """The sum, into ``x`` where no gradients are recorded."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One head of softmax attention; ``(n, tokens, c)`` each."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]


def slices(t: int, frame: int, first: int, step: int) -> list[int]:
    """Lengths of the parts in which a network is run over ``t`` frames, so that memory stays bounded.

    Args:
        frame: values of one frame.
        first: the first part has this many frames more than a multiple of ``step``; 0 in a stream that goes on.
        step: every other part is a multiple of this.
    """
    if torch.is_grad_enabled():
        return [t]
    n = max(_SLICE // frame // step, 1) * step
    sizes = [min(t, first + n - step)] if first else []
    while (rest := t - sum(sizes)) > 0:
        sizes.append(min(n, rest))
    return sizes


_SLICE = 1 << 22  # values of an activation at a time
