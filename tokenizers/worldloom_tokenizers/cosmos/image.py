"""Cosmos-Tokenizer for images: Haar patches, 2-D residual blocks, attention in the middle. Frames are encoded one by
one.

Letters: b batch, t frames, h w size at the layer, c o channels, H W pixels.
Inside, tensors are ``(b, t, h, w, c)``, as in the video tokenizer; nothing here looks along t.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers import winograd_frames
from worldloom_tokenizers.codec import State, VideoCodec
from worldloom_tokenizers.cosmos import haar
from worldloom_tokenizers.cosmos.config import CosmosConfig
from worldloom_tokenizers.kept import Kept
from worldloom_tokenizers.layers import (
    add_,
    attention,
    channels_last,
    conv3x3,
    conv_down,
    enlarge3x3,
    enlarging_kernels,
    silu_,
)


class GroupNorm(nn.GroupNorm):
    """Groups of channels of a frame to zero mean and unit variance, on channels-last frames."""

    def __init__(self, groups: int, c: int) -> None:
        super().__init__(groups, c, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, input.shape[:2])


class Conv(nn.Conv2d):
    """A 3x3 or 1x1 convolution of every frame; ``way`` -1 halves the frame, 1 doubles it first."""

    def __init__(self, c: int, o: int, kernel: int = 3, way: int = 0) -> None:
        super().__init__(c, o, kernel)
        self.way = way
        self.frames, self.kernels = Kept(winograd_frames.transform), Kept(enlarging_kernels)

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        if self.kernel_size == (1, 1):
            return F.linear(input, self.weight.flatten(1), self.bias)
        if self.way < 0:
            return conv_down(input, self.weight, self.bias)
        if self.way > 0:
            return enlarge3x3(input, self.kernels.value(self.training, self.weight), self.bias)
        weight = self.weight[:, :, None]
        return conv3x3(
            None, input, weight, self.bias, self.frames if self.frames.keeps(self.training, weight) else None
        )


class Block(nn.Module):
    """Norm, SiLU, 3x3, twice, beside a shortcut."""

    def __init__(self, c: int, o: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, c), Conv(c, o)
        self.norm2, self.conv2 = GroupNorm(groups, o), Conv(o, o)
        self.shortcut = Conv(c, o, 1) if c != o else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(silu_(self.norm1(x)))
        y = self.conv2(silu_(self.norm2(y)))
        return add_(y, x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """One head within each frame."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, c)
        self.q, self.k, self.v, self.out = Conv(c, c, 1), Conv(c, c, 1), Conv(c, c, 1), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        tokens = (project(normed).flatten(2, 3).flatten(0, 1) for project in (self.q, self.k, self.v))
        return x + self.out(attention(*tokens).view(x.shape))


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.attention, self.block_2 = Block(c, c, groups), Attention(c, groups), Block(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Stage(nn.Module):
    """Blocks at one resolution, then the way to the next."""

    def __init__(self, c: int, o: int, blocks: int, groups: int, way: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(c if i == 0 else o, o, groups) for i in range(blocks))
        self.resample = Conv(o, o, way=way) if way else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Network(nn.Module):
    """The encoder, or with ``decoder`` its mirror image."""

    def __init__(self, config: CosmosConfig, decoder: bool) -> None:
        super().__init__()
        pixels, z, g = 3 * config.patch**2, config.z_channels, config.groups
        order = config.decoder_multipliers[::-1] if decoder else config.multipliers
        widths = [config.width * m for m in ((order[0] if decoder else 1), *order)]
        halvings = (config.spatial_ratio // config.patch).bit_length() - 1
        self.conv_in = Conv(z if decoder else pixels, widths[0])
        self.stages = nn.ModuleList(
            Stage(c, o, config.blocks + decoder, g, (1 if decoder else -1) if i < halvings else 0)
            for i, (c, o) in enumerate(itertools.pairwise(widths))
        )
        self.middle = Middle(widths[0] if decoder else widths[-1], g)
        self.norm_out, self.conv_out = GroupNorm(g, widths[-1]), Conv(widths[-1], pixels if decoder else z)


class CosmosImageTokenizer(VideoCodec):
    """Continuous or discrete image tokenizer; a video is a row of images, of any number of frames."""

    def __init__(self, config: CosmosConfig) -> None:
        assert config.image, "a video tokenizer is CosmosTokenizer"
        super().__init__(config, 1, config.spatial_ratio, config.latent_channels, config.levels)
        self.encoder, self.decoder = Network(config, decoder=False), Network(config, decoder=True)
        self.quant = Conv(config.z_channels, config.latent_channels, 1)
        self.post_quant = Conv(config.latent_channels, config.z_channels, 1)
        channels_last(self)

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        x = self.encoder.conv_in(haar.forward(video.movedim(1, -1), self.config.patch, haar.IMAGE))
        for stage in self.encoder.stages:
            x = stage(x)
        return x.movedim(-1, 1)

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        x = self.encoder.middle(features.movedim(1, -1))
        return self.quant(self.encoder.conv_out(silu_(self.encoder.norm_out(x)))).movedim(-1, 1)

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        return self.decoder.middle(self.decoder.conv_in(self.post_quant(latents.movedim(1, -1)))).movedim(-1, 1)

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        x = features.movedim(1, -1)
        for stage in self.decoder.stages:
            x = stage(x)
        x = self.decoder.conv_out(silu_(self.decoder.norm_out(x)))
        return haar.inverse(x, self.config.patch, haar.IMAGE).movedim(-1, 1)
