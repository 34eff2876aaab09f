"""Configurations of the Wan video autoencoders (Wan Team 2025, arXiv:2503.20314, section 4.1); no torch import.

The statistics of the latents are those of the released code (Wan2.1 and Wan2.2, ``wan/modules/vae*.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from worldloom.errors import WorldloomError

_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """A Wan autoencoder; the defaults are Wan2.1's."""

    encoder_width: int = 96
    """Channels of the encoder at the highest resolution."""
    decoder_width: int = 96
    """Channels of the decoder at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels at each resolution, in widths; each resolution but the last halves the frame."""
    blocks: int = 2
    """Residual blocks of the encoder at each resolution; the decoder has one more."""
    temporal: tuple[bool, ...] = (False, True, True)
    """Which of the halvings, in the encoder's order, also halve time."""
    latent_channels: int = 16
    """Channels of the latents."""
    patch: int = 1
    """Pixels along an edge that enter as channels."""
    residual: bool = False
    """Wan2.2: stages have shortcuts that average and repeat, and the decoder does not halve channels as it enlarges."""
    mean: tuple[float, ...] = _MEAN_21
    """Mean of each channel of raw latents."""
    std: tuple[float, ...] = _STD_21
    """Standard deviation of each channel of raw latents."""

    def __post_init__(self) -> None:
        if min(self.encoder_width, self.decoder_width, self.blocks, self.patch, *self.multipliers) < 1:
            raise WorldloomError("widths, multipliers, blocks and patch must be positive", got=self)
        if len(self.temporal) != len(self.multipliers) - 1:
            raise WorldloomError(
                "there is one halving less than there are multipliers", got=(self.temporal, self.multipliers)
            )
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise WorldloomError(
                "every latent channel has a mean and a standard deviation",
                got=f"{self.latent_channels} channels, {len(self.mean)} means, {len(self.std)} deviations",
            )

    @property
    def temporal_ratio(self) -> int:
        """Frames in a latent frame, except the first, which holds one."""
        return 2 ** sum(self.temporal)

    @property
    def spatial_ratio(self) -> int:
        """Pixels along an edge of a latent vector."""
        return self.patch * 2 ** len(self.temporal)


def wan21() -> WanVAEConfig:
    """Wan2.1: 4x8x8, 16 channels; Cosmos-Predict2, Predict2.5 and Transfer2.5."""
    return WanVAEConfig()


def wan22() -> WanVAEConfig:
    """Wan2.2: 4x16x16, 48 channels; Cosmos 3."""
    return WanVAEConfig(
        encoder_width=160, decoder_width=256, latent_channels=48, patch=2, residual=True, mean=_MEAN_22, std=_STD_22
    )
