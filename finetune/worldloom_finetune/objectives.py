"""The objective of world models: a pure function of a model, a batch and a generator.

Letters: b batch, t latent frames, c channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.schema import LatentBatch
from worldloom_model_zoo.samplers import flow_interpolate, shift_noise_level


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow with a noise level per latent frame."""

    context: Literal["prefix", "independent", "mixed"] = "mixed"
    """``prefix``: a random number of first frames is nearly clean, the rest noisy (what sampling meets).
    ``independent``: every frame has its own level (diffusion forcing, Chen et al. 2024). ``mixed``: half of each."""
    context_noise: float = 0.1
    """Prefix frames get a level uniform in [0, this]."""
    logit_mean: float = 0.0
    """Mean of the logit-normal noise level (Esser et al. 2024)."""
    logit_std: float = 1.0
    """Its standard deviation."""
    shift: float = 1.0
    """Timestep shift; above 1 trains more at high noise."""
    action_dropout: float = 0.1
    """Share of samples that get the null action, so that guidance on actions is possible."""
    text_dropout: float = 0.1
    """Share of samples that get the null text, so that guidance on text is possible."""
    pixel_weighting: float = 0.0
    """Exponent p: a latent channel weighs (its part in the error of pixels) ** p. 0: all alike; 1: as pixels do."""


def noise_levels(b: int, t: int, config: FlowConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise level of each frame ``(b, t)`` and its loss weight ``(b, t)``: 0 on a clean prefix, else 1."""
    logit = torch.randn(b, t, generator=generator) * config.logit_std + config.logit_mean
    level = shift_noise_level(torch.sigmoid(logit), config.shift)
    prefix = torch.randint(1, max(t, 2), (b, 1), generator=generator)  # at least one context frame, one noisy one
    context = torch.rand(b, t, generator=generator) * config.context_noise
    independent = torch.rand(b, 1, generator=generator) < 0.5
    if config.context == "prefix":
        independent = torch.zeros_like(independent)
    elif config.context == "independent":
        independent = torch.ones_like(independent)
    is_context = (torch.arange(t)[None] < prefix) & ~independent & (t > 1)
    return torch.where(is_context, context, level), (~is_context).float()


@torch.no_grad()
def channel_weights(tokenizer: Any, latents: Tensor, exponent: float) -> Tensor:
    """How much each latent channel matters to pixels, ``(c,)`` of mean 1.

    The share of channel i is the mean squared change of the decoded video when noise is added to that channel alone.
    Normalised latents make all channels equally large, though the first may carry most of the picture.

    Args:
        latents: some real ones, ``(b, c, t, h, w)``.
        exponent: 0 gives ones, 1 weighs as the squared error of pixels would.
    """
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(latents[:, :1].shape, generator=generator).to(latents)
    still = tokenizer.decode(latents)
    shares = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel : channel + 1] += noise
        shares.append((tokenizer.decode(moved) - still).square().mean())
    weights = torch.stack(shares).clamp_min(1e-12) ** exponent
    return weights / weights.mean()


def rectified_flow_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: FlowConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the velocity, noise - clean, over the frames that are not clean context.

    ``generator`` is a CPU generator; equal states give equal losses. ``weights (c,)`` are those of `channel_weights`.
    Returns the loss and metrics to log.

    Raises:
        WorldloomError: if the loss is not finite.
    """
    latents = batch.latents
    b, _, t = latents.shape[:3]
    level, weight = noise_levels(b, t, config, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    keep_action = torch.rand(b, generator=generator) >= config.action_dropout
    level, weight, keep_action = (x.to(latents.device) for x in (level, weight, keep_action))
    keep_text = None
    if batch.text is not None:
        keep_text = (torch.rand(b, generator=generator) >= config.text_dropout).to(latents.device)

    noisy = flow_interpolate(latents, noise, level)
    velocity = model(noisy, level, batch.actions, batch.text, action_mask=keep_action, text_mask=keep_text)
    squares = (velocity - (noise - latents)).square()
    if weights is not None:
        squares = squares * weights.to(squares)[None, :, None, None, None]
    error = squares.mean(dim=(1, 3, 4))  # (b, c, t, h, w) -> (b, t)
    loss = (error * weight).sum() / weight.sum().clamp_min(1)
    if not torch.isfinite(loss):
        raise WorldloomError(
            "the training loss is not finite",
            got=loss.item(),
            do="lower optim.lr, or check the latents for values that are not finite",
        )
    high = (level > 0.5) & (weight > 0)
    metrics = {"loss_high_noise": float(error.detach()[high].mean())} if bool(high.any()) else {}
    return loss, metrics
