"""Configurations of Cosmos-Tokenizer (Agarwal et al. 2025, arXiv:2501.03575, section 5); no torch import."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from worldloom.errors import WorldloomError

FSQ_LEVELS = (8, 8, 8, 5, 5, 5)
"""Levels of the discrete tokenizers: 64,000 codes."""


@dataclass(frozen=True)
class CosmosConfig:
    """A Cosmos tokenizer; the defaults are those of CV8x8x8."""

    temporal_ratio: int = 8
    """Frames in a latent frame, except the first, which holds one; 1 encodes each frame as an image of its own."""
    spatial_ratio: int = 8
    """Pixels along an edge of a latent vector."""
    width: int = 128
    """Channels, in terms of which the others are given."""
    multipliers: tuple[int, ...] = (2, 4, 4)
    """Channels of the encoder at each resolution, in widths."""
    decoder_multipliers: tuple[int, ...] = (2, 4, 4)
    """The same of the decoder."""
    blocks: int = 2
    """Residual blocks of the encoder at each resolution; the decoder has one more."""
    patch: int = 4
    """Edge of the patches, in frames and pixels, that Haar wavelets turn into channels."""
    z_channels: int = 16
    """Channels between the networks and the maps to and from latents."""
    latent_channels: int = 16
    """Channels of the latents."""
    levels: tuple[int, ...] = ()
    """Levels of finite scalar quantisation; empty for continuous latents."""
    groups: int = 32
    """Groups of the norms of an image tokenizer. Video tokenizers normalise each frame as a whole."""

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.z_channels, self.latent_channels, *self.multipliers) < 1:
            raise WorldloomError("widths, multipliers, blocks and channels must be positive", got=self)
        image = self.temporal_ratio == 1
        for name, ratio in (("temporal_ratio", self.temporal_ratio), ("spatial_ratio", self.spatial_ratio)):
            halvings = math.log2(ratio / self.patch) if not (image and name == "temporal_ratio") else 0
            most = min(len(self.multipliers), len(self.decoder_multipliers)) - (not image)
            if halvings != int(halvings) or not 0 <= halvings <= most:
                raise WorldloomError(f"{name} must be {self.patch} times 1 to {2**most}", got=ratio)
        if self.levels and len(self.levels) != self.latent_channels:
            raise WorldloomError("every latent channel has its levels", got=(self.latent_channels, self.levels))

    @property
    def image(self) -> bool:
        """Whether frames are encoded one by one, by 2-D networks."""
        return self.temporal_ratio == 1


def cv(temporal: int, spatial: int) -> CosmosConfig:
    """A continuous video tokenizer: 4x8x8, 8x8x8 or 8x16x16. With 4 frames its decoder has a resolution less."""
    decoder = (2, 4) if temporal == 4 else (2, 4, 4)
    return CosmosConfig(temporal_ratio=temporal, spatial_ratio=spatial, decoder_multipliers=decoder)


def dv(temporal: int, spatial: int) -> CosmosConfig:
    """A discrete video tokenizer: 4x8x8, 8x8x8 or 8x16x16."""
    return CosmosConfig(temporal_ratio=temporal, spatial_ratio=spatial, latent_channels=6, levels=FSQ_LEVELS)


def ci(spatial: int) -> CosmosConfig:
    """A continuous image tokenizer: 8x8 or 16x16."""
    return CosmosConfig(temporal_ratio=1, spatial_ratio=spatial)


def di(spatial: int) -> CosmosConfig:
    """A discrete image tokenizer: 8x8 or 16x16."""
    return replace(ci(spatial), z_channels=256, latent_channels=6, levels=FSQ_LEVELS)
