"""What a tokenizer is trained for: the terms of its loss, each with a weight that switches it off.

A term whose weight is 0 is not computed and draws no random numbers, so that the loss is exactly that of the others.

Letters: b batch, T video frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_finetune import discriminator as adversary
from worldloom_finetune.noise import normal
from worldloom_tokenizers.codec import VideoCodec

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two videos ``(b, 3, T, H, W)`` in [-1, 1] -> how different they look, a scalar."""


@dataclass(frozen=True)
class FrameLossConfig:
    """How decoded frames are compared with what they should be; a weight of 0 switches its term off."""

    l1: float = 1.0
    """Weight of the mean absolute error."""
    l2: float = 2.0
    """Weight of the mean squared error, which PSNR measures."""
    perceptual: float = 0.0
    """Weight of the distance of features of an image network: sharper, at some cost in PSNR."""
    temporal: float = 0.0
    """Weight of the mean absolute error of the differences of successive frames: less flicker."""

    def __post_init__(self) -> None:
        if min(self.l1, self.l2, self.perceptual, self.temporal) < 0:
            raise WorldloomError("weights of the objective are not negative", got=self)
        if not max(self.l1, self.l2, self.perceptual):
            raise WorldloomError("nothing in the objective compares frames", do="set l1, l2 or perceptual above 0")


@dataclass(frozen=True)
class ReconstructionConfig(FrameLossConfig):
    """What a tokenizer is trained for; a weight of 0 switches its term off."""

    adversarial: float = 0.0
    """Weight of what a discriminator, trained along, sees in reconstructions: texture where details are lost."""
    adversarial_start: int = 0
    """Optimizer step at which the discriminator and its term begin."""
    adversarial_penalty: float = 0.0
    """Weight of the squared gradient of the discriminator at real videos (R1): steadies it."""
    adversarial_channels: int = 32
    """Channels of the first layer of the discriminator, a multiple of 8."""
    latent_noise: float = 0.05
    """Standard deviation of noise added to raw latents: the decoder learns to forgive small errors of a generator.
    Continuous tokenizers only."""
    latent_penalty: float = 1e-4
    """Weight of the mean square of raw latents: keeps their scale bounded. Continuous tokenizers only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = (self.adversarial, self.adversarial_start, self.adversarial_penalty)
        if min(*others, self.latent_noise, self.latent_penalty) < 0:
            raise WorldloomError("weights of the objective are not negative", got=self)
        if self.adversarial_channels < 8 or self.adversarial_channels % 8:
            raise WorldloomError("adversarial_channels is a multiple of 8", got=self.adversarial_channels)


def temporal_loss(made: Tensor, video: Tensor) -> Tensor:
    """Mean absolute error of the differences of successive frames.

    Raises:
        WorldloomError: for videos of one frame.
    """
    if video.shape[2] < 2:
        raise WorldloomError("objective.temporal compares frames with the next", got="one frame", do="more data.frames")
    return (made.diff(dim=2) - video.diff(dim=2)).abs().mean()


def frame_loss(
    made: Tensor, video: Tensor, config: FrameLossConfig, perceptual: Distance | None
) -> tuple[Tensor, dict[str, float]]:
    """The weighed difference of two videos ``(b, 3, T, H, W)``, and metrics to log.

    Args:
        perceptual: the distance that ``config.perceptual`` weighs.
    """
    error = made - video
    mse = error.square().mean()
    psnr = 10 * torch.log10(4 / mse.detach().clamp_min(1e-12))  # peak-to-peak is 2
    metrics = {"psnr": float(psnr)}
    loss = config.l1 * error.abs().mean() + config.l2 * mse
    if config.temporal:
        term = temporal_loss(made, video)
        loss, metrics["temporal"] = loss + config.temporal * term, float(term.detach())
    if config.perceptual:
        assert perceptual is not None, "config.perceptual needs the distance that it weighs"
        term = perceptual(made, video)
        loss, metrics["perceptual"] = loss + config.perceptual * term, float(term.detach())
    return loss, metrics


def perceptual_distance(config: FrameLossConfig) -> Distance | None:
    """The distance that ``config.perceptual`` weighs, None where it weighs nothing.

    Raises:
        WorldloomError: its network is not installed.
    """
    if not config.perceptual:
        return None
    from worldloom_tokenizers.perceptual import PerceptualLoss

    network = PerceptualLoss()
    # Not a part of the trained module, so nothing else moves it to where the videos are.
    return lambda made, video: network.to(video.device, video.dtype)(made, video)


def finite(loss: Tensor) -> Tensor:
    """The loss.

    Raises:
        WorldloomError: if it is not finite.
    """
    if not torch.isfinite(loss):
        raise WorldloomError("the training loss is not finite", got=loss.item(), do="lower optim.lr")
    return loss


def tokenizer_loss(
    model: VideoCodec,
    video: Tensor,
    config: ReconstructionConfig,
    generator: torch.Generator,
    *,
    step: int | None = None,
    perceptual: Distance | None = None,
    discriminator: nn.Module | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of the reconstruction of ``(b, 3, T, H, W)`` in [-1, 1], and metrics to log.

    With the adversarial term the loss is the sum of two that share no gradient: the tokenizer's, in which the
    discriminator is a constant, and the discriminator's, in which the reconstructions are. So one backward pass and one
    optimizer train both, under every strategy.

    Args:
        generator: of all that is random, on the CPU; equal states give equal losses.
        step: the optimizer step; None to validate: nothing is hidden from the encoder, no adversarial term.
        perceptual: as for `frame_loss`.
        discriminator: see ``config.adversarial``.

    Raises:
        WorldloomError: if the loss is not finite.
    """
    raw = model.encode_raw(video) if step is None else model.encode_for_training(video, generator)
    shown = raw
    if config.latent_noise and not model.levels:
        shown = raw + config.latent_noise * normal(raw.shape, raw, generator)
    made = model.decode_raw(shown)
    loss, metrics = frame_loss(made, video, config, perceptual)
    metrics["latent_rms"] = float(raw.detach().square().mean().sqrt())
    if config.latent_penalty and not model.levels:
        loss = loss + config.latent_penalty * raw.square().mean()
    if config.adversarial and step is not None:
        assert discriminator is not None, "config.adversarial needs a discriminator"
        if step < config.adversarial_start:
            loss = loss + adversary.idle(discriminator, video)
        else:
            term = adversary.generator_loss(discriminator, made)
            against = adversary.discriminator_loss(discriminator, video, made, config.adversarial_penalty, generator)
            loss = loss + config.adversarial * term + against
            metrics |= {"adversarial": float(term.detach()), "discriminator": float(against.detach())}
    return finite(loss), metrics
