"""A patch discriminator of videos and its hinge loss (Isola et al. 2017, section 3.2; Lim and Ye 2017, section 2).

It keeps no running statistics and no random state: all that its next step depends on is in its weights and their
moments, so a resumed run goes on bit for bit.

Letters: b batch, T video frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_finetune.noise import normal
from worldloom_tokenizers.layers import conv3d


class Conv3d(nn.Conv3d):
    """torch's layer, computed by `worldloom_tokenizers.layers.conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return conv3d(input, self.weight, self.bias, self.stride, self.padding)


class PatchDiscriminator(nn.Module):
    """Videos ``(b, 3, T, H, W)`` in [-1, 1] -> a score of each patch ``(b, 1, t, H/8, W/8)``; above 0 is "real".

    Three 3-D convolutions halve the frame three times and the frame rate twice; their patches are 38 x 38 pixels.

    Args:
        channels: of the first layer, a multiple of 8; the next ones have twice and four times as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, wider = 2 * channels, 4 * channels
        self.layers = nn.Sequential(
            Conv3d(3, channels, (3, 4, 4), stride=(1, 2, 2), padding=1),
            nn.LeakyReLU(0.2),
            Conv3d(channels, wide, (3, 4, 4), stride=2, padding=1),
            nn.GroupNorm(8, wide),
            nn.LeakyReLU(0.2),
            Conv3d(wide, wider, (3, 4, 4), stride=2, padding=1),
            nn.GroupNorm(8, wider),
            nn.LeakyReLU(0.2),
            Conv3d(wider, 1, 3, padding=1),
        )

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video)


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Inside, what is computed with the module passes gradients to its inputs and none to its parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def idle(discriminator: nn.Module, video: Tensor) -> Tensor:
    """0, with a gradient of 0 for every parameter.

    Until the discriminator plays it takes part like this: then DDP misses no gradient, and the optimizer's count of
    steps is the same under every strategy (ZeRO keeps one for all parameters).
    """
    return 0 * discriminator(video[:1, :, :1]).sum()


def generator_loss(discriminator: nn.Module, made: Tensor) -> Tensor:
    """How far the discriminator is from taking ``made`` for real; no gradient reaches its parameters."""
    with constant(discriminator):
        return -discriminator(made).mean()


def discriminator_loss(
    discriminator: nn.Module, real: Tensor, made: Tensor, penalty: float, generator: torch.Generator
) -> Tensor:
    """Hinge loss of telling ``real`` from ``made``; no gradient reaches what made it.

    Args:
        penalty: weight of the mean squared gradient of the scores at real videos (R1, Mescheder et al. 2018), estimated
            by the change that a little noise makes (approximated R1, Lin et al. 2025, arXiv:2501.08316): no second
            derivative, so it trains under every strategy.
        generator: of that noise, on the CPU.
    """
    b, sigma = len(real), 0.1
    videos = [real, made.detach()]
    if penalty:
        videos.append(real + sigma * normal(real.shape, real, generator))
    scores = discriminator(torch.cat(videos))
    loss = F.relu(1 - scores[:b]).mean() + F.relu(1 + scores[b : 2 * b]).mean()
    if penalty:
        loss = loss + penalty * ((scores[2 * b :] - scores[:b]) / sigma).square().mean()
    return loss
