"""Frames of a model's own, for training: what a rollout would have made of the beginning of a sample.

A model trained on true frames alone meets its own errors for the first time in use, where they add up. Self forcing
(Huang et al. 2025) trains on rollouts by the sampler that will be used. In a world that is driven by actions the truth
is known: the rolled out frames are to be the true ones, or the frames that follow them are. Gradients reach the last
sampler step of a frame at most, never the context, so a rollout costs (steps + 1) passes of single frames.

Letters: b batch, t latent frames, c channels, h w latent size, r actions between latent frames, a action size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.schema import LatentBatch
from worldloom_finetune.compiling import uncompiled
from worldloom_finetune.noise import normal
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.samplers import flow_interpolate, guide


@uncompiled()  # every frame would be compiled anew, for its cache is longer
def roll_out(
    model: nn.Module,
    batch: LatentBatch,
    *,
    start: int,
    frames: int,
    levels: Tensor,
    context_noise: float,
    generator: torch.Generator,
    masks: Mapping[str, Any],
    guidance: float = 1.0,
    gradients: bool = False,
) -> Tensor:
    """Latent frames ``[start, start + frames)`` as the model makes them from those before: ``(b, c, frames, h, w)``.

    Args:
        model: causal.
        batch: true frames and the actions that belong to them; with text or without.
        levels: noise levels of the sampler, from 1 to 0.
        context_noise: every frame is taken into the cache at a level uniform in [0, this].
        generator: on the CPU.
        masks: ``action_mask`` and ``text_mask`` of the model.
        guidance: on actions and text, as in use; frames enter the cache with them. Both predictions are one call.
        gradients: let them flow through the last sampler step of each frame.

    Raises:
        WorldloomError: the model's attention is full.
    """
    config = getattr(model, "config", None)
    if config is not None and config.attention != "causal":
        raise WorldloomError(
            "rollouts in training are for causal models", got="attention = 'full'", do="set objective.rollout_share = 0"
        )
    latents, actions, text = batch.latents, batch.actions, batch.text
    b, c, t, h, w = latents.shape
    r = 0 if actions is None else actions.shape[1] // (t - 1)
    cache = KVCache()
    null = masks
    if guidance != 1:  # rows b to 2b are the same samples, denoised without actions and text
        actions, text = (None if given is None else torch.cat([given, given]) for given in (actions, text))
        masks = {name: torch.cat([mask, mask]) for name, mask in masks.items() if mask is not None}
        with_them = torch.arange(2 * b, device=latents.device) < b
        null = {"action_mask": with_them & masks.get("action_mask", with_them)}
        if text is not None:
            null["text_mask"] = with_them & masks.get("text_mask", with_them)

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if guidance != 1 else x

    def led_to(first: int, last: int) -> Tensor | None:
        """The actions that lead to frames ``[first, last)``; none leads to frame 0."""
        return None if actions is None else actions[:, r * max(first - 1, 0) : r * (last - 1)]

    @torch.no_grad()
    def observe(x: Tensor, first: int) -> None:
        level = (torch.rand(b, x.shape[2], generator=generator) * context_noise).to(x)
        noise = normal(x.shape, x, generator)
        taken = led_to(first, first + x.shape[2])
        seen = rows(flow_interpolate(x, noise, level))
        model(seen, rows(level), taken, text, **masks, cache=cache, commit=True)

    observe(latents[:, :, :start], 0)
    made = []
    points = levels.tolist()
    gradients = gradients and torch.is_grad_enabled()
    for frame in range(start, start + frames):
        taken = led_to(frame, frame + 1)
        x = normal((b, c, 1, h, w), latents, generator)
        for step, (level, following) in enumerate(itertools.pairwise(points), 2):
            last = gradients and step == len(points)
            if last:
                torch.clear_autocast_cache()  # see below
            with torch.set_grad_enabled(last):
                both = rows(x)
                velocity = model(both, x.new_full((len(both), 1), level), taken, text, **null, cache=cache)
                if guidance != 1:
                    velocity = guide(*velocity.chunk(2), guidance)
                x = x + (following - level) * velocity
        made.append(x)
        if frame + 1 < start + frames:
            observe(x.detach(), frame)
    # Until torch 2.10, weights that autocast converted without gradients served again with them (pytorch #158232).
    torch.clear_autocast_cache()
    return torch.cat(made, dim=2)
