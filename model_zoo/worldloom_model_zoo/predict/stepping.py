"""A causal world that is stepped: its cache, its noise, and the newest frames that it has not yet taken in.

Letters: b batch, c channels, t latent frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.sampling import GuidedNetwork, as_context, draw_latents, schedule
from worldloom_model_zoo.samplers import flow_rolling


class World:
    """The state of one rollout: what the model has seen, the decoder's state, the noise streams."""

    def __init__(self, network: GuidedNetwork, batch: int, seed: int) -> None:
        self.network, self.sampler = network, network.sampler
        self.cache = KVCache()
        self.decoder_state: dict[Any, Tensor] = {}
        self.generators = seeded(batch, seed)
        self.shape: tuple[int, ...] = ()
        self.newest: tuple[Tensor, Tensor | None] | None = None
        """The last sampled frame and its actions, taken into the cache when the next one needs it."""

    def observe(self, latents: Tensor, actions: Tensor | None) -> None:
        """Take clean latent frames ``(b, c, t, h, w)`` and the actions that led to them into the cache."""
        c, t, h, w = latents.shape[1:]
        self.shape = (c, 1, h, w)
        if t:
            shown, level = as_context(latents, self.sampler, lambda: draw_noise(self.generators, (c, t, h, w), latents))
            self.network.commit(shown, level, actions, self.cache)

    def advance(self, actions: Tensor | None, tick: Callable[[], None] = lambda: None) -> Tensor:
        """Sample the next latent frame ``(b, c, 1, h, w)``; `tick` after each call of the network."""
        if self.newest is not None:
            self.observe(*self.newest)

        def predict(x: Tensor, level: float, step: float | None) -> Tensor:
            made = self.network(x, [level], actions, step=step, cache=self.cache)
            tick()
            return made

        self.network.renew()
        latents = draw_latents(predict, self._draw(), self.sampler, self._draw)
        self.newest = (latents, actions)
        return latents

    def roll(
        self, frames: int, led: Callable[[int, int], Tensor | None], tick: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """The next ``frames`` latent frames, several of them half done at any time (rolling diffusion).

        Args:
            led: actions that lead to the frames from the first to before the second, counted from the first new one.
        """
        if self.newest is not None:
            self.observe(*self.newest)
            self.newest = None

        def velocity(x: Tensor, levels: Tensor, first: int) -> Tensor:
            made = self.network(x, levels.tolist(), led(first, first + x.shape[2]), cache=self.cache)
            tick()
            return made

        levels = schedule(self.sampler)
        rolled = flow_rolling(velocity, self._draw, levels, min(self.sampler.rolling_delay, len(levels) - 1), frames)
        for index, latents in enumerate(rolled):
            self.observe(latents, led(index, index + 1))
            yield latents

    def _draw(self) -> Tensor:
        return draw_noise(self.generators, self.shape, next(self.network.model.parameters()))


def seeded(batch: int, seed: int) -> list[torch.Generator]:
    """A generator on the CPU for each row of a batch, seeds counting up."""
    return [torch.Generator().manual_seed(seed + row) for row in range(batch)]


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal ``(b, *shape)``, drawn on the CPU so that a seed means the same on every device."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(like)


def noise_source(batch: int, seed: int, like: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    """A function from a shape to noise ``(b, *shape)``, a stream for each row."""
    generators = seeded(batch, seed)
    return lambda shape: draw_noise(generators, shape, like)
