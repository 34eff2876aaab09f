"""Cosmos-Tokenizer for video: Haar patches, factorised causal convolutions, attention in the middle.

Before the first frame a convolution sees the first frame again. Norms take a whole frame at a time. Attention is within
each frame, then along time from each place to the frames up to its own; that attention is over the whole past, so a
stream's state grows by each latent frame, held once: the input that keys and values are made of (see `.past`).

Letters: b batch, t frames at the layer, h w size at the layer, c o channels, H W pixels.
Inside, tensors are ``(b, t, h, w, c)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers import winograd_frames
from worldloom_tokenizers.codec import State, VideoCodec
from worldloom_tokenizers.cosmos import haar
from worldloom_tokenizers.cosmos.config import CosmosConfig
from worldloom_tokenizers.cosmos.past import Past
from worldloom_tokenizers.kept import Kept
from worldloom_tokenizers.layers import (
    CausalConv,
    add_,
    attention,
    channels_last,
    conv_down,
    enlarge3x3,
    enlarging_kernels,
    filters_fit,
    silu_,
)

_PLACES = 1 << 20
"""Values of the past that attention along time brings together at a time."""


class FrameNorm(nn.Module):
    """Zero mean and unit variance over each frame, then a factor and an offset for each channel."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[2:], eps=1e-6)
        return torch.addcmul(self.bias, normed, self.weight, out=None if torch.is_grad_enabled() else normed)


class Conv(nn.Module):
    """3x3 within a frame, then 3 along time."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        self.space = CausalConv(c, o, (1, 3, 3), past="first")
        self.time = CausalConv(o, o, (3, 1, 1), past="first")
        self.joined = Kept(_join)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        for step in self.steps(x, state):
            x = step(x, state)
        return x

    def steps(self, x: Tensor, state: State | None) -> tuple[Callable[[Tensor, State | None], Tensor], ...]:
        """What to apply, one after another, so that a caller who does frees each result when the next is there.

        One frame alone goes through both kernels as one.
        """
        b, t, h, w, c = x.shape
        alone = self.joined.keeps(self.training, *self._of_both()) and state is None and t == 1
        tiles = b * -(-h // 2) * -(-w // 2)
        if alone and filters_fit(x) and winograd_frames.worthwhile(tiles, c, self.space.weight.shape[0]):
            return (self._alone,)
        return self.space, self.time

    def _alone(self, x: Tensor, state: State | None) -> Tensor:
        kernels, bias = self.joined.value(False, *self._of_both())
        return winograd_frames.conv3x3(x[:, 0], kernels, bias)[:, None]

    def _of_both(self) -> tuple[Tensor, ...]:
        return self.space.weight, self.space.bias, self.time.weight, self.time.bias


def _join(space: Tensor, bias: Tensor, time: Tensor, offset: Tensor) -> tuple[winograd_frames.Kernels, Tensor]:
    """A kernel ``(m, c, 1, 3, 3)``, then ``(o, m, 3, 1, 1)`` whose taps all see one frame, as one kernel; its bias."""
    taps = time.double().sum(dim=(2, 3, 4))  # (o, m)
    both = torch.tensordot(taps, space.double(), 1).to(space.dtype)
    return winograd_frames.transform(both), (taps @ bias.double() + offset).to(bias.dtype)


def point(c: int, o: int) -> CausalConv:
    """A map of channels."""
    return CausalConv(c, o, (1, 1, 1))


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c), Conv(c, o)
        self.norm2, self.conv2 = FrameNorm(o), Conv(o, o)
        self.shortcut = point(c, o) if c != o else None

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        y = silu_(self.norm1(x))
        for step in self.conv1.steps(y, state):
            y = step(y, state)
        y = silu_(self.norm2(y))
        for step in self.conv2.steps(y, state):
            y = step(y, state)
        return add_(y, x if self.shortcut is None else self.shortcut(x, state))


class Attention(nn.Module):
    """One head, within each frame or, at each place, along time."""

    def __init__(self, c: int, along_time: bool) -> None:
        super().__init__()
        self.norm, self.along_time = FrameNorm(c), along_time
        self.q, self.k, self.v, self.out = point(c, c), point(c, c), point(c, c), point(c, c)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        normed = self.norm(x).flatten(2, 3)  # (b, t, h*w, c)
        y = self._along_time(normed, state) if self.along_time else self._within_frames(normed)
        return add_(self.out(y.view(x.shape), None), x)

    def _within_frames(self, x: Tensor) -> Tensor:
        """``(b, t, h*w, c)`` to values of the same shape."""
        q, k, v = (F.linear(x, part.weight.flatten(1), part.bias) for part in (self.q, self.k, self.v))
        return attention(*(part.flatten(0, 1) for part in (q, k, v))).view(x.shape)

    def _along_time(self, x: Tensor, state: State | None) -> Tensor:
        """``(b, t, h*w, c)`` to values of the same shape.

        The past is remembered as it was given, once, not as keys and values: a query meets the key of x as the query
        times the key's matrix meets x, and values, whose weights add up to one, are made of the weighted sum of x.
        """
        t, places, c = x.shape[1:]
        past = Past({} if state is None else state, self)
        total = past.frames + t
        if total == 1 and not torch.is_grad_enabled():  # all weight is on the only frame
            if state is not None:
                past.append(x)
            return F.linear(x, self.v.weight.flatten(1), self.v.bias)
        q = F.linear(x, self.q.weight.flatten(1), self.q.bias) * c**-0.5
        constant = F.linear(q, self.k.bias[None])  # (b, t, h*w, 1): softmax takes it away; the bias keeps a gradient
        q = F.linear(q, self.k.weight.flatten(1).T)
        unseen = torch.ones(t, total, dtype=torch.bool, device=x.device).triu(total - t + 1)
        width = places if torch.is_grad_enabled() else max(1, _PLACES // (total * c))
        made = []
        for start in range(0, places, width):
            place = slice(start, start + width)
            seen = torch.cat([*past.read(place), x[:, :, place]], dim=1).transpose(1, 2)  # (b, places, total, c)
            scores = q[:, :, place].transpose(1, 2) @ seen.transpose(2, 3) + constant[:, :, place].transpose(1, 2)
            weights = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1)  # (b, places, t, total)
            made.append((weights @ seen).transpose(1, 2))
        if state is not None:
            past.append(x)
        return F.linear(torch.cat(made, dim=2), self.v.weight.flatten(1), self.v.bias)


class Middle(nn.Module):
    """Block, attention within frames, attention along time, block."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = Block(c, c), Block(c, c)
        self.space, self.time = Attention(c, along_time=False), Attention(c, along_time=True)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        return self.block_2(self.time(self.space(self.block_1(x, state), state), state), state)


class Down(nn.Module):
    """Halve the frame, then time: a strided convolution beside the average."""

    def __init__(self, c: int, space: bool, time: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(c, c, (1, 3, 3)) if space else None
        self.conv2 = nn.Conv3d(c, c, (3, 1, 1)) if time else None
        self.conv3 = point(c, c)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        if self.conv1 is not None:
            assert self.conv1.bias is not None
            y = conv_down(x, self.conv1.weight[:, :, 0], self.conv1.bias)
            b, t, h, w, c = y.shape
            x = add_(y, x.view(b, t, h, 2, w, 2, c).mean(dim=(3, 5)))
        if self.conv2 is not None:
            past = state.get(self) if state is not None else None
            if state is not None:
                state[self] = x[:, -1:].detach().clone()
            if past is None:  # the first frame stands for the two before it
                x = torch.cat([x[:, :1].expand(-1, 2, -1, -1, -1), x], dim=1)
            else:
                x = torch.cat([past, x], dim=1)
            weight = self.conv2.weight.flatten(2)  # (o, c, 3)
            before, odd, even = x[:, :-2:2], x[:, 1::2], x[:, 2::2]
            y = F.linear(before, weight[..., 0], self.conv2.bias)
            y = y + F.linear(odd, weight[..., 1]) + F.linear(even, weight[..., 2])
            x = y + (odd + even) / 2
        return self.conv3(x, state)


class Up(nn.Module):
    """Double time, then the frame: repeated values with a convolution of them added."""

    def __init__(self, c: int, space: bool, time: bool) -> None:
        super().__init__()
        self.conv1 = CausalConv(c, c, (3, 1, 1), past="first") if time else None
        self.conv2 = nn.Conv3d(c, c, (1, 3, 3)) if space else None
        self.conv3 = point(c, c)
        self.kernels = Kept(enlarging_kernels)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        if self.conv1 is not None:
            first = state is None or self.conv1 not in state
            x = x.repeat_interleave(2, dim=1)[:, int(first) :]  # the first frame stays one
            x = add_(self.conv1(x, state), x)
        if self.conv2 is not None:
            kernels = self.kernels.value(self.training, self.conv2.weight)
            y = enlarge3x3(x, kernels, self.conv2.bias)
            b, t, h, w, c = x.shape
            repeated = x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c)
            x = add_(y.view(b, t, h, 2, w, 2, c), repeated).view(b, t, 2 * h, 2 * w, c)
        return self.conv3(x, state)


class Stage(nn.Module):
    """Blocks at one resolution, then the way to the next."""

    def __init__(self, c: int, o: int, blocks: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(c if i == 0 else o, o) for i in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x if self.resample is None else self.resample(x, state)


def down_plan(config: CosmosConfig) -> list[tuple[bool, bool]]:
    """Which of (space, time) the encoder halves after each stage but the last."""
    space, time = (round(math.log2(ratio / config.patch)) for ratio in (config.spatial_ratio, config.temporal_ratio))
    return [(i < space, i < time) for i in range(len(config.multipliers) - 1)]


def up_plan(config: CosmosConfig) -> list[tuple[bool, bool]]:
    """Which of (space, time) the decoder doubles after each stage but the last."""
    space, time = (round(math.log2(ratio / config.patch)) for ratio in (config.spatial_ratio, config.temporal_ratio))
    in_time = [0 < i <= time for i in range(len(config.decoder_multipliers) - 1)]
    return [(t or (i < space and space > time), t) for i, t in enumerate(in_time)]


class Encoder(nn.Module):
    """Frames to z."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in (1, *config.multipliers)]
        plan = down_plan(config)
        self.conv_in = Conv(3 * config.patch**3, widths[0])
        self.stages = nn.ModuleList(
            Stage(c, o, config.blocks, Down(o, *plan[i]) if i < len(plan) and any(plan[i]) else None)
            for i, (c, o) in enumerate(itertools.pairwise(widths))
        )
        self.middle = Middle(widths[-1])
        self.norm_out, self.conv_out = FrameNorm(widths[-1]), Conv(widths[-1], config.z_channels)


class Decoder(nn.Module):
    """z to frames."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        multipliers = config.decoder_multipliers
        widths = [config.width * m for m in (multipliers[-1], *multipliers[::-1])]
        plan = up_plan(config)
        self.conv_in = Conv(config.z_channels, widths[0])
        self.middle = Middle(widths[0])
        self.stages = nn.ModuleList(
            Stage(c, o, config.blocks + 1, Up(o, *plan[i]) if i < len(plan) and any(plan[i]) else None)
            for i, (c, o) in enumerate(itertools.pairwise(widths))
        )
        self.norm_out, self.conv_out = FrameNorm(widths[-1]), Conv(widths[-1], 3 * config.patch**3)


class CosmosTokenizer(VideoCodec):
    """Continuous or discrete video tokenizer; the released continuous ones are plain autoencoders."""

    pixels = 1 << 18

    def __init__(self, config: CosmosConfig | None = None) -> None:
        config = config or CosmosConfig()
        assert not config.image, "an image tokenizer is CosmosImageTokenizer"
        super().__init__(config, config.temporal_ratio, config.spatial_ratio, config.latent_channels, config.levels)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = point(config.z_channels, config.latent_channels)
        self.post_quant = point(config.latent_channels, config.z_channels)
        self.encode_reach, self.decode_reach = _reach(config)
        channels_last(self)

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        if not state:  # frame 0 fills a patch of its own
            video = torch.cat([video[:, :, :1].expand(-1, -1, self.config.patch - 1, -1, -1), video], dim=2)
        x = self.encoder.conv_in(haar.forward(video.movedim(1, -1), self.config.patch, haar.VIDEO), state)
        for stage in self.encoder.stages:
            x = stage(x, state)
        return x.movedim(-1, 1)

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        x = self.encoder.middle(features.movedim(1, -1), state)
        x = self.encoder.conv_out(silu_(self.encoder.norm_out(x)), state)
        return self.quant(x, state).movedim(-1, 1)

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        x = self.decoder.conv_in(self.post_quant(latents.movedim(1, -1), state), state)
        return self.decoder.middle(x, state).movedim(-1, 1)

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        first = state is None or self.decoder not in state
        if state is not None:
            state[self.decoder] = torch.ones(())
        x = features.movedim(1, -1)
        for stage in self.decoder.stages:
            x = stage(x, state)
        x = self.decoder.conv_out(silu_(self.decoder.norm_out(x)), state)
        video = haar.inverse(x, self.config.patch, haar.VIDEO).movedim(-1, 1)
        return video[:, :, self.config.patch - 1 :] if first else video


def _reach(config: CosmosConfig) -> tuple[int, int]:
    """How far the convolutions of the stages see to each side, in positions of the latents: (encoder, decoder)."""
    edge = config.patch / config.spatial_ratio  # a position behind the patches, in latent positions
    encode, size = edge, edge  # conv_in
    for i in range(len(config.multipliers)):
        encode += 2 * config.blocks * size
        if i < len(config.multipliers) - 1 and down_plan(config)[i][0]:
            encode, size = encode + size, 2 * size
    decode, size = edge, 1.0  # conv_out
    for i in range(len(config.decoder_multipliers)):
        decode += 2 * (config.blocks + 1) * size
        if i < len(config.decoder_multipliers) - 1 and up_plan(config)[i][0]:
            size /= 2
            decode += size
    return math.ceil(encode), math.ceil(decode)
