"""The Wan video autoencoder, 2.1 and 2.2: causal 3x3x3 convolutions with zeros before the first frame.

The first frame goes through alone: halving and doubling in time leave it as it is, and begin with the second. The
doubling's convolution does not see it either. Attention is within a frame, at the resolution of the latents.

Letters: b batch, t frames at the layer, h w size at the layer, c o channels, r temporal ratio, H W pixels.
Inside, tensors are ``(b, t, h, w, c)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers.codec import State, VideoCodec
from worldloom_tokenizers.kept import Kept
from worldloom_tokenizers.layers import (
    CausalConv,
    add_,
    attention,
    channels_last,
    conv_down,
    enlarge3x3,
    enlarging_kernels,
    silu_,
    slices,
)
from worldloom_tokenizers.wan.config import WanVAEConfig


class RMSNorm(nn.Module):
    """The vector of channels at a position scaled to length sqrt(c), times a learnt factor for each."""

    def __init__(self, c: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        scale = self.gamma.flatten() * self.gamma.shape[0] ** 0.5
        return x / length * scale if torch.is_grad_enabled() else (x / length).mul_(scale)


class Block(nn.Module):
    """Norm, SiLU, 3x3x3, twice, beside a shortcut."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(c, 3), CausalConv(c, o)
        self.norm2, self.conv2 = RMSNorm(o, 3), CausalConv(o, o)
        self.shortcut = CausalConv(c, o, (1, 1, 1)) if c != o else None

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        y = silu_(self.norm1(x))
        y = self.conv1(y, state)  # y is freed when the next one is there
        y = silu_(self.norm2(y))
        y = self.conv2(y, state)
        return add_(y, x if self.shortcut is None else self.shortcut(x, state))


class Attention(nn.Module):
    """One head within each frame."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = RMSNorm(c, 2)
        self.to_qkv, self.proj = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2, 3).flatten(0, 1)  # (b*t, h*w, c)
        q, k, v = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        y = F.linear(attention(q, k, v), self.proj.weight.flatten(1), self.proj.bias)
        return x + y.view(x.shape)


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.block_1, self.attention, self.block_2 = Block(c, c), Attention(c), Block(c, c)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        return self.block_2(self.attention(self.block_1(x, state)), state)


class Down(nn.Module):
    """Halve the frame, and time where ``temporal``: frames 1 and 2, 3 and 4, ... with the one before each pair."""

    def __init__(self, c: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3)
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        assert self.conv.bias is not None
        x = conv_down(x, self.conv.weight, self.conv.bias)
        if self.time_conv is None:
            return x
        past = state.get(self) if state is not None else None
        if state is not None:
            state[self] = x[:, -1:].detach().clone()
        frames = x if past is None else torch.cat([past, x], dim=1)
        weight = self.time_conv.weight.flatten(2)  # (o, c, 3)
        y = F.linear(frames[:, 2::2], weight[..., 2], self.time_conv.bias)
        y = y + F.linear(frames[:, 1::2][:, : y.shape[1]], weight[..., 1])
        y = y + F.linear(frames[:, 0:-2:2], weight[..., 0])
        return y if past is not None else torch.cat([x[:, :1], y], dim=1)


class Up(nn.Module):
    """Double the frame, and time where ``temporal``, by a convolution to two frames' channels."""

    def __init__(self, c: int, o: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, o, 3)
        self.kernels = Kept(enlarging_kernels)
        self.time_conv = CausalConv(c, 2 * c, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        if self.time_conv is not None:
            first = state is None or self not in state
            if state is not None:
                state[self] = torch.ones(())
            later = x[:, 1:] if first else x
            if later.shape[1]:
                y = self.time_conv(later, state).unflatten(-1, (2, -1))  # (b, t, h, w, 2, c)
                y = y.movedim(4, 2).flatten(1, 2)  # (b, 2t, h, w, c)
                x = torch.cat([x[:, :1], y], dim=1) if first else y
        return enlarge3x3(x, self.kernels.value(self.training, self.conv.weight), self.conv.bias)


class DownStage(nn.Module):
    """Blocks at one resolution, then the way to the next; Wan2.2 adds averages of the stage's input."""

    def __init__(self, c: int, o: int, blocks: int, down: bool, temporal: bool, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(c if i == 0 else o, o) for i in range(blocks))
        self.resample = Down(o, temporal) if down else None
        self.space, self.time = 2 if down else 1, 2 if temporal else 1
        self.channels, self.residual = o, residual

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = int(state is None or self not in state)
        if state is not None:
            state[self] = torch.ones(())
        parts = x.split(slices(x.shape[1], x[0, 0].numel() // x.shape[-1] * self.channels, first, self.time), dim=1)
        made = [self._run(part, state, first and i == 0) for i, part in enumerate(parts)]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)

    def _run(self, x: Tensor, state: State | None, first: int | bool) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, state)
        if self.resample is not None:
            y = self.resample(y, state)
        return add_(y, self._averages(x, bool(first))) if self.residual else y

    def _averages(self, x: Tensor, first: bool) -> Tensor:
        """Means over neighbouring values, folded into channels time first, then rows, then columns."""
        if first and self.time > 1:  # zeros before the first frame
            x = F.pad(x, (0, 0, 0, 0, 0, 0, self.time - 1, 0))
        s = self.space
        x = x.unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, self.time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # (b, t, h, w, c * time * s * s)
        return x.unflatten(-1, (self.channels, -1)).mean(dim=-1)


class UpStage(nn.Module):
    """Blocks at one resolution, then the way to the next; Wan2.2 adds the stage's input, repeated."""

    def __init__(self, c: int, o: int, blocks: int, up: bool, temporal: bool, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(c if i == 0 else o, o) for i in range(blocks))
        self.resample = Up(o, o if residual else o // 2, temporal) if up else None
        self.time, self.channels, self.residual = 2 if temporal else 1, o, residual and up

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = state is None or self not in state
        if state is not None:
            state[self] = torch.ones(())
        return self._run(x, state, first)

    def in_parts(self, parts: Iterable[Tensor], state: State | None) -> Iterator[Tensor]:
        """Consecutive frames, of which a few are computed at a time, when they are asked for."""
        for x in parts:
            for part in x.split(slices(x.shape[1], x[0, 0].numel() // x.shape[-1] * self.channels, 0, 1), dim=1):
                yield self(part, state)

    def _run(self, x: Tensor, state: State | None, first: bool) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, state)
        if self.resample is not None:
            y = self.resample(y, state)
        return add_(y, self._repeats(x, first)) if self.residual else y

    def _repeats(self, x: Tensor, first: bool) -> Tensor:
        """Every value repeated, then unfolded from channels to time, rows and columns."""
        repeats = self.channels * self.time * 4 // x.shape[-1]
        y = x.repeat_interleave(repeats, dim=-1).unflatten(-1, (self.channels, self.time, 2, 2))
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return y[:, self.time - 1 :] if first else y


class Encoder(nn.Module):
    """Frames to twice the latent channels: mean and log-variance, of which the mean is used."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = [config.encoder_width * m for m in (1, *config.multipliers)]
        self.conv_in = CausalConv(3 * config.patch**2, widths[0])
        count = len(config.multipliers)
        self.stages = nn.ModuleList(
            DownStage(
                widths[i], widths[i + 1], config.blocks, i < count - 1,
                i < count - 1 and config.temporal[i], config.residual,
            )
            for i in range(count)
        )  # fmt: skip
        self.middle = Middle(widths[-1])
        self.norm_out, self.conv_out = RMSNorm(widths[-1], 3), CausalConv(widths[-1], 2 * config.latent_channels)


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        multipliers = (config.multipliers[-1], *config.multipliers[::-1])
        widths = [config.decoder_width * m for m in multipliers]
        count, temporal = len(config.multipliers), config.temporal[::-1]
        self.conv_in = CausalConv(config.latent_channels, widths[0])
        self.middle = Middle(widths[0])
        self.stages = nn.ModuleList(
            UpStage(
                widths[i] // (1 if config.residual or i == 0 else 2), widths[i + 1], config.blocks + 1,
                i < count - 1, i < count - 1 and temporal[i], config.residual,
            )
            for i in range(count)
        )  # fmt: skip
        self.norm_out, self.conv_out = RMSNorm(widths[-1], 3), CausalConv(widths[-1], 3 * config.patch**2)


class WanVAE(VideoCodec):
    """The autoencoder; latents are the posterior's mean, normalised by the released statistics."""

    pixels = 1 << 16

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        config = config or WanVAEConfig()
        super().__init__(config, config.temporal_ratio, config.spatial_ratio, config.latent_channels)
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant, self.post_quant = CausalConv(2 * c, 2 * c, (1, 1, 1)), CausalConv(c, c, (1, 1, 1))
        self.set_statistics(torch.tensor(config.mean), torch.tensor(config.std))
        self.encode_reach, self.decode_reach = _reach(config)
        channels_last(self)

    @staticmethod
    def _needed(state: State | None) -> State | None:
        """Without gradients frames go through in parts, which a state connects."""
        return {} if state is None and not torch.is_grad_enabled() else state

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        state = self._needed(state)
        p = self.config.patch
        x = video.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # (b, 3, T, h, p, w, q)
        x = x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4)  # (b, T, h, w, 3 * q * p)
        x = self.encoder.conv_in(x, state)
        for stage in self.encoder.stages:
            x = stage(x, state)
        return x.movedim(-1, 1)

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        x = self.encoder.middle(features.movedim(1, -1), state)
        x = self.encoder.conv_out(silu_(self.encoder.norm_out(x)), state)
        return self.quant(x, state)[..., : self.latent_channels].movedim(-1, 1)

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        x = self.decoder.conv_in(self.post_quant(latents.movedim(1, -1), state), state)
        return self.decoder.middle(x, state).movedim(-1, 1)

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        state = self._needed(state)
        parts: Iterator[Tensor] = iter([features.movedim(1, -1)])
        for stage in self.decoder.stages:
            assert isinstance(stage, UpStage)
            parts = stage.in_parts(parts, state)
        made = [self.decoder.conv_out(silu_(self.decoder.norm_out(part)), state) for part in parts]
        x = torch.cat(made, dim=1)
        p = self.config.patch
        x = x.unflatten(-1, (3, p, p)).permute(0, 4, 1, 2, 6, 3, 5)  # (b, 3, T, h, p, w, q)
        return x.flatten(5, 6).flatten(3, 4)


def _reach(config: WanVAEConfig) -> tuple[int, int]:
    """How far the stages see to each side, in positions of the latents: (encoder, decoder)."""
    halvings = len(config.temporal)
    last = 2.0**-halvings  # an input position of the first stage, in latent positions
    encode = last  # conv_in
    decode = last  # conv_out
    for i in range(halvings + 1):
        size = last * 2**i
        encode += 2 * config.blocks * size + (size if i < halvings else 0)
        decode += 2 * (config.blocks + 1) * size + (size if i < halvings else 0)
    return int(-(-encode // 1)), int(-(-decode // 1))
