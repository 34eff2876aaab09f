"""From a sampler's configuration to latents: the schedule, the guided network, the method.

Letters: b batch, c channels, t latent frames, h w latent size, r actions between latent frames, a action size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from worldloom.errors import WorldloomError
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import SamplerConfig
from worldloom_model_zoo.predict.model import PredictTransformer, ReadText
from worldloom_model_zoo.predict.skipping import FirstBlockCache
from worldloom_model_zoo.samplers import (
    edm_denoiser,
    edm_euler,
    edm_heun,
    edm_sigmas,
    flow_ab2,
    flow_consistency,
    flow_euler,
    flow_heun,
    flow_interpolate,
    flow_levels,
    flow_shortcut,
    flow_unipc,
    guide,
    karras_flow_levels,
)

_LEAST_SIGMA = 0.002  # EDM networks know no cleaner frame


def schedule(sampler: SamplerConfig) -> Tensor:
    """Noise levels, or sigmas for an EDM model: ``(steps + 1,)``, falling to 0."""
    if sampler.edm:
        return edm_sigmas(sampler.steps, sampler.sigma_min, sampler.sigma_max)
    if sampler.schedule == "karras":
        return karras_flow_levels(sampler.steps, sampler.sigma_min, sampler.sigma_max)
    return flow_levels(sampler.steps, sampler.shift, first=sampler.first_level, last=sampler.last_level)


def draw_latents(
    network: Callable[[Tensor, float, float | None], Tensor],
    noise: Tensor,
    sampler: SamplerConfig,
    fresh: Callable[[], Tensor],
) -> Tensor:
    """Latents from unit noise by the configured method.

    Args:
        network: (latents, noise level or sigma, step or None) -> what the network predicts of them.
        noise: ``(b, c, t, h, w)``.
        fresh: further noise of that shape, for methods that need some.
    """
    levels, method = schedule(sampler), sampler.method
    if sampler.edm:
        denoise = edm_denoiser(lambda x, c_noise: network(x, math.exp(4 * c_noise), None), sampler.sigma_data)
        return (edm_heun if method == "edm_heun" else edm_euler)(denoise, float(levels[0]) * noise, levels)
    if method == "shortcut":
        return flow_shortcut(network, noise, sampler.steps, float(levels[0]))

    def velocity(x: Tensor, level: float) -> Tensor:
        return network(x, level, None)

    if method == "consistency":
        return flow_consistency(velocity, noise, levels, fresh)
    if method == "ab2":  # Predict2 starts from noise as strong as its first level
        return flow_ab2(velocity, float(levels[0]) * noise, levels)
    return {"euler": flow_euler, "heun": flow_heun, "unipc": flow_unipc}[method](velocity, noise, levels)


def as_context(latents: Tensor, sampler: SamplerConfig, noise: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Clean latents as the network is shown given frames, and the level (sigma) to call them by.

    With ``context_noise`` they are noisy. An EDM network sees them scaled by their own c_in. Where ``condition_level``
    is unset the level is that of their noise; a caller that denoises jointly puts that of the other frames.
    """
    level = sampler.context_noise
    if sampler.edm:
        sigma = max(level, _LEAST_SIGMA)
        noisy = latents + sigma * noise() if level else latents
        return noisy / (sigma**2 + sampler.sigma_data**2) ** 0.5, sigma
    if level:
        latents = flow_interpolate(latents, noise(), latents.new_full((len(latents), latents.shape[2]), level))
    return latents, max(level, sampler.condition_level or 0.0)


class GuidedNetwork:
    """The network with its text, guided, for the steps of one sample.

    Args:
        model: its prediction is that of the sampler's method: velocity, or F of EDM.
        sampler: guidance, rounding of levels, step skipping.
        text: ``(b, m, text_dim)`` or None for the null text.
        negative: text of the unconditional prediction ``(b, m, text_dim)``; None for the null text.
        fps: of the video, for networks that are told.
        views: ``(v,)`` cameras, whose frames follow one another along time, and whose texts along m; None for one.
    """

    def __init__(
        self,
        model: PredictTransformer,
        sampler: SamplerConfig,
        text: Tensor | None = None,
        negative: Tensor | None = None,
        fps: float | None = None,
        views: Tensor | None = None,
    ) -> None:
        if sampler.method == "shortcut" and not model.config.step_size:
            raise WorldloomError(
                "the method shortcut is for a model that is told its step",
                got="step_size = false",
                do="use another sampler.method, or train with objective.kind = 'shortcut'",
            )
        self.model, self.sampler, self.fps, self.views = model, sampler, fps, views
        self.text, self.negative = text, negative
        self._read: dict[str, ReadText | None] = {}
        self._doubled: tuple[KVCache, int, KVCache] | None = None
        self.calls = 0
        """Calls of the network so far; a batched guided one counts once."""
        self.renew()

    def renew(self) -> None:
        """Forget earlier steps: what follows is another sample."""
        threshold = self.sampler.skip_threshold
        self.skips = [FirstBlockCache(threshold) if threshold else None for _ in range(2)]

    def __call__(
        self,
        x: Tensor,
        levels: Sequence[float],
        actions: Tensor | None = None,
        *,
        known: int = 0,
        step: float | None = None,
        cache: KVCache | None = None,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction for all frames of ``x (b, c, t, h, w)``.

        Args:
            levels: of each frame, t numbers; sigmas for an EDM model.
            actions: as the network takes them; None is the null action.
            known: how many first frames of each view are given; their prediction is not used.
            step: how far the level is to fall, for models that are told.
            cache: frames before these.
            condition_mask: ``(b, 1, t, h, w)``.
        """
        sampler, b = self.sampler, len(x)
        drawn = [index % (len(levels) // self._count) >= known for index in range(len(levels))]
        told = [self._told(level, new or level == levels[-1]) for level, new in zip(levels, drawn, strict=True)]
        options = {"condition_mask": condition_mask, "fps": self.fps}
        if step is not None:
            options["step"] = x.new_tensor([step if new else 0.0 for new in drawn]).expand(b, -1)
        timestep = torch.tensor(told, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).expand(b, -1)
        low, high = sampler.guidance_interval
        noise = [level / (1 + level) if sampler.edm else level for level in levels]
        inside = [new and low <= level <= high for level, new in zip(noise, drawn, strict=True)]
        if not sampler.guided or (actions is None and self.text is None) or not any(inside):
            return self._call(0, x, timestep, actions, self._reading("text", b), cache=cache, **options)
        if sampler.guidance_batched:
            conditional, unconditional = self._both(x, timestep, actions, cache, options)
        else:
            conditional = self._call(0, x, timestep, actions, self._reading("text", b), cache=cache, **options)
            unconditional = self._call(1, x, timestep, None, self._reading("negative", b), cache=cache, **options)
        made = guide(conditional, unconditional, sampler.guidance_scale, sampler.guidance_convention)
        if inside != drawn:
            made = torch.where(torch.tensor(inside, device=x.device)[:, None, None], made, conditional)
        return made

    def commit(self, x: Tensor, level: float, actions: Tensor | None, cache: KVCache) -> None:
        """Take given frames ``(b, c, t, h, w)``, as `as_context` makes them, into the cache."""
        told = x.new_full((len(x), x.shape[2]), self._told(level, drawn=False))
        self.model(x, told, actions, self._reading("text", len(x)), cache=cache, commit=True, fps=self.fps)

    def _reading(self, which: Literal["text", "negative", "both"], b: int) -> ReadText | None:
        """A text, or both one below the other, as the network has read it for a batch of b: once for all steps."""
        found, rows = self._read.get(which), self._count * (2 * b if which == "both" else b)
        if which not in self._read or (found is not None and found.rows != rows):
            if which == "both":
                found = self._read_both(b)
            else:
                text = self.text if which == "text" else self.negative
                found = self.model.read_text(text, b, views=self._count)
            self._read[which] = found
        return found

    def _read_both(self, b: int) -> ReadText | None:
        text, count = self.text, self._count
        if text is None:
            return self.model.read_text(None, 2 * b, views=count)
        if self.negative is None:
            keep = torch.arange(2 * b, device=text.device) < b
            return self.model.read_text(torch.cat([text, text]), 2 * b, keep, views=count)
        if self.negative.shape != text.shape:
            raise WorldloomError(
                "batched guidance needs both texts of one length",
                got=f"{tuple(text.shape)} and {tuple(self.negative.shape)}",
                do="set sampler.guidance_batched = false",
            )
        return self.model.read_text(torch.cat([text, self.negative]), 2 * b, views=count)

    @property
    def _count(self) -> int:
        return 1 if self.views is None else len(self.views)

    def _told(self, level: float, drawn: bool) -> float:
        """The network's timestep for a level."""
        if self.sampler.edm:
            return math.log(level) / 4
        return math.floor(level * 1000) / 1000 if self.sampler.round_levels and drawn else level

    def _both(
        self, x: Tensor, timestep: Tensor, actions: Tensor | None, cache: KVCache | None, options: dict
    ) -> tuple[Tensor, ...]:
        """Both predictions in one call of twice the batch."""
        b, masks = len(x), {}
        if actions is not None:
            actions, masks["action_mask"] = torch.cat([actions, actions]), torch.arange(2 * b, device=x.device) < b
        text = self._reading("both", b)
        doubled = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in options.items()}
        made = self._call(
            0, torch.cat([x, x]), timestep.repeat(2, 1), actions, text, cache=self._twice(cache), **doubled, **masks
        )
        return made.chunk(2)

    def _twice(self, cache: KVCache | None) -> KVCache | None:
        """The cache for twice the batch, made once for each length that it has."""
        if cache is None:
            return None
        if self._doubled is None or self._doubled[0] is not cache or self._doubled[1] != cache.frames:
            twice = replace(
                cache,
                keys=[torch.cat([x, x]) for x in cache.keys],
                values=[torch.cat([x, x]) for x in cache.values],
                last=None if cache.last is None else torch.cat([cache.last, cache.last]),
            )
            self._doubled = (cache, cache.frames, twice)
        return self._doubled[2]

    def _call(self, stream: int, x: Tensor, timestep: Tensor, *conditions: Any, **options: Any) -> Tensor:
        self.calls += 1
        made = self.model(x, timestep, *conditions, skip=self.skips[stream], views=self.views, **options)
        assert isinstance(made, Tensor)
        return made
