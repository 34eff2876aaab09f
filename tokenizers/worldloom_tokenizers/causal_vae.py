"""A small causal video autoencoder: continuous latents, 4x8x8, first frame alone (T = 1 + 4k).

Frame 0 is repeated to fill a group of its own, as Cosmos-Tokenizer does (Agarwal et al. 2025, section 5.1); every
later group holds 4 frames. A group's frames are folded into channels, so all layers run at the latent frame rate:
2-D convolutions inside a latent frame, causal mixing along time. Normalisation is per position, which makes the
output of a latent frame independent of later ones, and lets a stream be cut anywhere between groups.

Both directions are a linear map of 4x8x8 patches plus a convolutional network that starts at zero. `initialise`
sets the linear maps to the principal components of real patches, so training begins at their quality, not at noise.

Letters: b batch, t latent frames, T video frames, r temporal ratio, c channels, h w size at the layer, H W pixels.
Inside, tensors are ``(b*t, c, h, w)`` in channels-last memory: the fastest layout for CPU convolutions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers.codec import State, VideoCodec
from worldloom_tokenizers.config import CausalVAEConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
        return x * scale * self.weight[None, :, None, None]


class CausalTime(nn.Module):
    """A causal convolution along time, 1x1 in space; before the first frame it sees the first frame repeated."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.mix = nn.Conv2d(channels * kernel, channels, 1)

    def forward(self, x: Tensor, t: int, state: State | None) -> Tensor:
        bt, c, h, w = x.shape
        frames = x.unflatten(0, (bt // t, t))  # (b*t, c, h, w) -> (b, t, c, h, w)
        past = state.get(self) if state is not None else None
        if past is None:
            past = frames[:, :1].expand(-1, self.kernel - 1, -1, -1, -1)
        padded = torch.cat([past, frames], dim=1)  # (b, kernel-1+t, c, h, w)
        if state is not None:
            state[self] = padded[:, padded.shape[1] - (self.kernel - 1) :].detach()
        shifted = torch.cat([padded[:, k : k + t] for k in range(self.kernel)], dim=2)  # (b, t, kernel*c, h, w)
        shifted = shifted.reshape(bt, self.kernel * c, h, w)
        return self.mix(shifted.contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """Residual block: norm, SiLU, 3x3, then norm, SiLU, 3x3 and causal mixing along time."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = RMSNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = CausalTime(channels, kernel)
        nn.init.zeros_(self.time.mix.weight)
        nn.init.zeros_(cast(Tensor, self.time.mix.bias))

    def forward(self, x: Tensor, t: int, state: State | None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return x + hidden + self.time(hidden, t, state)


class Stack(nn.Module):
    """Blocks of one width."""

    def __init__(self, channels: int, blocks: int, kernel: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, kernel) for _ in range(blocks))

    def forward(self, x: Tensor, t: int, state: State | None) -> Tensor:
        for block in self.blocks:
            x = block(x, t, state)
        return x


class CausalVAE(VideoCodec):
    """The autoencoder, continuous or, with ``config.levels``, discrete.

    ``encode`` gives normalised latents (about unit variance per channel); the statistics are buffers, set by
    `set_statistics` at the end of training and saved with the weights.
    """

    def __init__(self, config: CausalVAEConfig | None = None) -> None:
        config = config or CausalVAEConfig()
        super().__init__(config, config.temporal_ratio, config.spatial_ratio, config.latent_channels, config.levels)
        w2, w4, w8 = config.widths
        kernel, pixels = config.temporal_kernel, 3 * config.temporal_ratio
        self.patch = 4 if config.encoder_blocks[0] == 0 else 2

        if self.patch == 2:
            self.enter = nn.Conv2d(pixels * 4, w2, 3, padding=1)
            self.encode2 = Stack(w2, config.encoder_blocks[0], kernel)
            self.down4 = nn.Conv2d(w2, w4, 2, stride=2)
        else:
            self.enter = nn.Conv2d(pixels * 16, w4, 3, padding=1)
        self.encode4 = Stack(w4, config.encoder_blocks[1], kernel)
        self.down8 = nn.Conv2d(w4, w8, 2, stride=2)
        self.encode8 = Stack(w8, config.encoder_blocks[2], kernel)
        self.encode_norm = RMSNorm(w8)
        self.to_latent = nn.Conv2d(w8, config.latent_channels, 3, padding=1)
        self.linear_in = nn.Conv2d(pixels * 64, config.latent_channels, 1)

        self.from_latent = nn.Conv2d(config.latent_channels, w8, 3, padding=1)
        self.decode8 = Stack(w8, config.decoder_blocks[2], kernel)
        self.up4 = nn.Conv2d(w8, w4 * 4, 1)
        self.decode4 = Stack(w4, config.decoder_blocks[1], kernel)
        self.up2 = nn.Conv2d(w4, w2 * 4, 1)
        self.decode2 = Stack(w2, config.decoder_blocks[0], kernel)
        self.decode_norm = RMSNorm(w2)
        self.leave = nn.Conv2d(w2, pixels * 4, 3, padding=1)
        self.linear_out = nn.Conv2d(config.latent_channels, pixels * 64, 1)
        for last in (self.to_latent, self.leave):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(Tensor, last.bias))

        # pixels that the convolutions see to each side, at 1/2, 1/4 and 1/8 of the frame size
        enter, leave = self.patch, 2
        self.encode_reach, self.decode_reach = (
            -(-(extra + 8 + sum(2 * n * scale for n, scale in zip(blocks, (2, 4, 8), strict=True))) // 8)
            for extra, blocks in ((enter, config.encoder_blocks), (leave, config.decoder_blocks))
        )
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # -- the networks of `VideoCodec`: all convolutions, so all of it is local ----------------------------------------

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        ratio = self.config.temporal_ratio
        if not state:  # frame 0 fills a group of its own
            video = torch.cat([video[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), video], dim=2)
        b, c, frames, height, width = video.shape
        t = frames // ratio
        # (b, c, t*r, H, W) -> (b*t, c*r, H, W)
        groups = video.unflatten(2, (t, ratio)).permute(0, 2, 1, 3, 4, 5).reshape(b * t, c * ratio, height, width)
        x = self.enter(F.pixel_unshuffle(groups, self.patch).contiguous(memory_format=torch.channels_last))
        if self.patch == 2:
            x = self.down4(self.encode2(x, t, state))
        x = self.down8(self.encode4(x, t, state))
        x = self.to_latent(F.silu(self.encode_norm(self.encode8(x, t, state))))
        x = x + self.linear_in(F.pixel_unshuffle(groups, 8).contiguous(memory_format=torch.channels_last))
        return x.unflatten(0, (b, t)).transpose(1, 2)  # (b*t, c, h, w) -> (b, c, t, h, w)

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        return features

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        return latents

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        ratio, first = self.config.temporal_ratio, not state
        b, _, t, _, _ = features.shape
        z = features.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b*t, c, h, w)
        x = self.decode8(self.from_latent(z), t, state)
        x = self.decode4(F.pixel_shuffle(self.up4(x), 2), t, state)
        x = self.decode2(F.pixel_shuffle(self.up2(x), 2), t, state)
        x = F.pixel_shuffle(self.leave(F.silu(self.decode_norm(x))), 2)  # (b*t, 3*r, H, W)
        x = x + F.pixel_shuffle(self.linear_out(z), 8)
        video = x.unflatten(1, (3, ratio)).unflatten(0, (b, t))  # (b, t, 3, r, H, W)
        video = video.permute(0, 2, 1, 3, 4, 5).flatten(2, 3)  # (b, 3, t*r, H, W)
        return video[:, :, ratio - 1 :] if first else video

    @torch.no_grad()
    def initialise(self, video: Tensor) -> None:
        """Set the linear maps to the whitened principal components of the patches of ``(b, 3, 1 + r k, H, W)``."""
        ratio = self.config.temporal_ratio
        video = torch.cat([video[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), video], dim=2)
        _, c, frames, height, width = video.shape
        groups = video.unflatten(2, (frames // ratio, ratio)).permute(0, 2, 1, 3, 4, 5)
        groups = groups.reshape(-1, c * ratio, height, width)
        patches = F.pixel_unshuffle(groups, 8).permute(0, 2, 3, 1).flatten(0, 2)  # (patches, 3*r*64)
        mean = patches.mean(dim=0)
        covariance = torch.cov((patches - mean).T.double())
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        count = self.config.latent_channels
        std = values[-count:].flip(0).clamp_min(1e-8).sqrt()[:, None]
        basis = vectors[:, -count:].flip(1).T  # (c, 3*r*64)
        basis = basis * basis.sum(dim=1, keepdim=True).sign()  # eigenvectors come with an arbitrary sign
        self.linear_in.weight.copy_((basis / std)[:, :, None, None])
        cast(Tensor, self.linear_in.bias).copy_(-(basis / std) @ mean.double())
        self.linear_out.weight.copy_((basis * std).T[:, :, None, None])
        cast(Tensor, self.linear_out.bias).copy_(mean)
