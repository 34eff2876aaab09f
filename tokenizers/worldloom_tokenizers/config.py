"""Configurations of the video tokenizers: plain data, no torch import."""

from __future__ import annotations

from dataclasses import dataclass

from worldloom.errors import WorldloomError


@dataclass(frozen=True)
class CausalVAEConfig:
    """The small causal video autoencoder: 4 frames x 8 x 8 pixels become one latent vector."""

    latent_channels: int = 16
    """Channels of a latent vector."""
    widths: tuple[int, int, int] = (48, 96, 160)
    """Channels at 1/2, 1/4 and 1/8 of the frame size."""
    encoder_blocks: tuple[int, int, int] = (0, 1, 2)
    """Residual blocks of the encoder at 1/2, 1/4 and 1/8; a 0 first means that patches of 4 pixels enter at 1/4."""
    decoder_blocks: tuple[int, int, int] = (1, 2, 2)
    """Residual blocks of the decoder at 1/2, 1/4 and 1/8."""
    temporal_ratio: int = 4
    """Frames in a latent frame, except the first, which holds one."""
    temporal_kernel: int = 3
    """Latent frames that a temporal convolution sees, the present one and those before it."""
    levels: tuple[int, ...] = ()
    """Levels of finite scalar quantisation of one codebook; empty for continuous latents. A latent vector holds as many
    codes as latent_channels holds levels."""

    def __post_init__(self) -> None:
        if min(self.widths) < 1 or self.latent_channels < 1:
            raise WorldloomError("tokenizer widths must be positive", got=(self.widths, self.latent_channels))
        if self.temporal_ratio < 1 or self.temporal_kernel < 2:
            raise WorldloomError(
                "temporal_ratio must be at least 1 and temporal_kernel at least 2",
                got=(self.temporal_ratio, self.temporal_kernel),
            )
        if self.levels and self.latent_channels % len(self.levels):
            raise WorldloomError(
                "latent_channels must be a multiple of the number of levels", got=(self.latent_channels, self.levels)
            )
        if min(sum(self.encoder_blocks), sum(self.decoder_blocks)) < 1:
            raise WorldloomError("encoder and decoder need at least one block each", got=self)

    @property
    def spatial_ratio(self) -> int:
        """Pixels along an edge of a latent vector."""
        return 8


@dataclass(frozen=True)
class ViTConfig:
    """The causal transformer tokenizer: 16 x 16 pixels of a frame become one latent vector."""

    latent_channels: int = 32
    """Channels of a latent vector."""
    temporal_ratio: int = 1
    """Frames in a latent frame, except the first, which holds one."""
    spatial_ratio: int = 16
    """Pixels along an edge of the cell that a latent vector stands for, a multiple of ``patch``."""
    patch: int = 8
    """Pixels along an edge of a patch, which is one token."""
    width: int = 128
    """Channels of a token."""
    heads: int = 4
    """Attention heads; ``width / heads`` is a multiple of 4."""
    encoder_layers: int = 4
    """Layers of the encoder."""
    decoder_layers: int = 4
    """Layers of the decoder."""
    time_every: int = 4
    """Every how many layers one attends along time, at least 2; the others attend within a frame."""
    window: int = 8
    """Latent frames that a layer along time sees, the present one and those before it."""
    hidden: float = 0.9
    """Largest share of a frame's patches that training hides from the encoder."""

    def __post_init__(self) -> None:
        sizes = (self.latent_channels, self.temporal_ratio, self.patch, self.heads, self.window)
        if min(*sizes, self.encoder_layers, self.decoder_layers) < 1 or self.time_every < 2:
            raise WorldloomError("sizes of a tokenizer are positive, and time_every is at least 2", got=self)
        if self.width % (4 * self.heads):
            raise WorldloomError("width must be a multiple of 4 times heads", got=(self.width, self.heads))
        if self.spatial_ratio < 1 or self.spatial_ratio % self.patch:
            raise WorldloomError("spatial_ratio must be a multiple of patch", got=(self.spatial_ratio, self.patch))
        if not 0 <= self.hidden < 1:
            raise WorldloomError("hidden is a share of at least 0 and less than 1", got=self.hidden)


@dataclass(frozen=True)
class PreviewConfig:
    """A decoder for previews: small, for the latents of one tokenizer. Its first three fields are that tokenizer's."""

    latent_channels: int = 16
    """Channels of a latent vector."""
    temporal_ratio: int = 4
    """Frames of a latent frame, except the first, which holds one."""
    spatial_ratio: int = 8
    """Pixels along an edge of a latent vector, an even number."""
    widths: tuple[int, int] = (48, 32)
    """Channels at the size of the latents and at twice that."""
    blocks: tuple[int, int] = (2, 1)
    """Residual blocks at each of these sizes."""
    temporal_kernel: int = 3
    """Latent frames that a temporal convolution sees, the present one and those before it."""

    def __post_init__(self) -> None:
        if min(*self.widths, self.latent_channels, self.temporal_ratio) < 1 or self.temporal_kernel < 2:
            raise WorldloomError("sizes are positive, temporal_kernel is at least 2", got=self)
        if self.spatial_ratio < 2 or self.spatial_ratio % 2:
            raise WorldloomError("spatial_ratio must be even", got=self.spatial_ratio)


@dataclass(frozen=True)
class LatentActionConfig:
    """A latent action model: a few codes for what happens between two frames."""

    codes: int = 8
    """Size of the codebook: the number of latent actions."""
    code_dim: int = 3
    """Size of a code."""
    past: int = 1
    """Frames that the decoder sees, the present one and those before it. With more than one it sees motion, and a code
    may come to mean "go on" rather than an action."""
    width: int = 32
    """Channels at 1/4 of the frame size; twice as many at 1/8."""
    encoder_blocks: int = 1
    """Residual blocks of the encoder at each size."""
    decoder_blocks: int = 1
    """Residual blocks of the decoder at each size and in each direction."""
    commitment: float = 0.25
    """Weight of the term that keeps what the encoder gives near the codes."""
    bypass: float = 0.8
    """Share of the pairs of a training batch whose code is not quantised, so that the encoder is taught by gradients
    that no rounding bends."""
    balance: float = 0.02
    """Weight of the term that spreads the pairs over the codes."""
    codebook_weight: float = 0.01
    """Weight of the codebook's loss against the prediction error."""
    moving_weight: float = 1.0
    """By how much more a moving pixel counts than a still one."""
    moving_threshold: float = 0.05
    """Change of a pixel, mean over channels of [-1, 1], from which on it moves."""

    def __post_init__(self) -> None:
        if min(self.codes, self.code_dim) < 2 or self.past < 1:
            raise WorldloomError(
                "codes and code_dim must be at least 2, past at least 1", got=(self.codes, self.code_dim, self.past)
            )
        if self.width < 8 or self.width % 8 or min(self.encoder_blocks, self.decoder_blocks) < 1:
            raise WorldloomError(
                "width must be a multiple of 8, and encoder and decoder need at least one block each",
                got=(self.width, self.encoder_blocks, self.decoder_blocks),
            )
