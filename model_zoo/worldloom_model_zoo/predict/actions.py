"""Inverse dynamics and policies: sampling the actions of a model that predicts them (``action_head``).

Frames and actions have noise levels of their own (Unified World Models, Zhu et al. 2025). With clean frames and noisy
actions the network is an inverse dynamics model; with both noisy, and going down together, a policy that foresees what
it does. Clean actions and noisy frames, forward dynamics, are what `PredictPipeline.generate_video` samples.

Letters: b batch, c channels, t latent frames, h w latent size, m text tokens, r actions between latent frames, a action
size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worldloom.errors import WorldloomError
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import SamplerConfig
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.sampling import as_context, schedule
from worldloom_model_zoo.samplers import guide

Draw = Callable[[tuple[int, ...]], Tensor]
"""Standard normal noise of a shape, the batch left out: ``(b, *shape)``."""


@torch.no_grad()
def infer_actions(model: PredictTransformer, latents: Tensor, sampler: SamplerConfig, draw: Draw) -> Tensor:
    """Inverse dynamics: the actions between the frames of ``latents (b, c, t, h, w)``, ``(b, r*(t-1), a)``.

    They are drawn together, ``sampler.steps`` Euler steps from noise; a causal model finds those that lead to a frame
    from this frame and earlier ones. They are numbers like those in training: take the largest of a one-hot action.

    Raises:
        WorldloomError: a model without ``action_head`` or with an EDM sampler, or a single frame.
    """
    _check(model, sampler)
    b, c, t, h, w = latents.shape
    if t < 2:
        raise WorldloomError("one frame has no actions between its frames", got=t, do="give at least two latent frames")
    shown, level = as_context(latents, sampler, lambda: draw((c, t, h, w)))
    levels, given = latents.new_full((b, t), level), _given(model, latents, t)
    actions = draw(((t - 1) * model.config.actions_per_latent, model.config.action_dim))
    for point, following in itertools.pairwise(schedule(sampler).tolist()):
        noise = latents.new_full((b, t - 1), point)
        velocity = model(shown, levels, actions, action_timestep=noise, return_actions=True, **given)[1]
        actions = actions + (following - point) * velocity
    return actions


@torch.no_grad()
def act(
    model: PredictTransformer,
    context: Tensor,
    text: Tensor | None,
    frames: int,
    sampler: SamplerConfig,
    draw: Draw,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """A policy: ``frames`` latent frames that follow ``context (b, c, t, h, w)``, and the actions that lead to them.

    Frames and actions go from noise to clean together; a causal model makes one frame after the other. The actions
    between the frames of the context are found by `infer_actions` first. Guidance, where there is some, is on the text.

    Args:
        text: what is to be done, ``(b, m, text_dim)``; None for whatever is usual.
        tick: called after each sampler step.

    Returns:
        actions ``(b, r * frames, a)`` and latents ``(b, c, t + frames, h, w)``, the context first.

    Raises:
        WorldloomError: a model without ``action_head``, or with an EDM sampler.
    """
    _check(model, sampler)
    past = infer_actions(model, context, sampler, draw) if context.shape[2] > 1 else None
    if model.config.attention == "causal":
        return _act_causally(model, context, past, text, frames, sampler, draw, tick)
    b, c, t, h, w = context.shape
    shown, level = as_context(context, sampler, lambda: draw((c, t, h, w)))
    x = draw((c, frames, h, w))
    new = _noisy_actions(model, frames, draw)
    if past is None:
        past = new[:, :0]
    given = _given(model, torch.cat([shown, x], dim=2), t)
    clean = past.new_zeros(b, t - 1)

    def velocities(x: Tensor, new: Tensor, point: float, options: dict[str, Any], text: Tensor | None) -> Any:
        levels = torch.cat([x.new_full((b, t), level), x.new_full((b, frames), point)], dim=1)
        noise = torch.cat([clean, x.new_full((b, frames), point)], dim=1)
        if "step" in options:
            options = {"step": torch.cat([x.new_zeros(b, t), options["step"]], dim=1)}
        velocity, of_actions = model(
            torch.cat([shown, x], dim=2),
            levels,
            torch.cat([past, new], dim=1),
            text,
            action_timestep=noise,
            return_actions=True,
            **given,
            **options,
        )
        return velocity[:, :, t:], of_actions[:, past.shape[1] :]

    made, actions = _together(x, new, text, sampler, velocities, tick)
    return actions, torch.cat([context, made], dim=2)


def _act_causally(
    model: PredictTransformer,
    context: Tensor,
    past: Tensor | None,
    text: Tensor | None,
    frames: int,
    sampler: SamplerConfig,
    draw: Draw,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    guided = text is not None and sampler.guided
    caches = [(KVCache(), text), (KVCache(), None)] if guided else [(KVCache(), text)]  # text is in the keys too
    b, c, _, h, w = context.shape

    def observe(latents: Tensor, actions: Tensor | None) -> None:
        shown, level = as_context(latents, sampler, lambda: draw((c, latents.shape[2], h, w)))
        for cache, told in caches:
            levels = latents.new_full((b, latents.shape[2]), level)
            model(shown, levels, actions, told, cache=cache, commit=True)

    def velocities(x: Tensor, actions: Tensor, point: float, options: dict[str, Any], told: Tensor | None) -> Any:
        cache = caches[0][0] if told is text else caches[1][0]
        levels = x.new_full((b, 1), point)
        return model(x, levels, actions, told, cache=cache, action_timestep=levels, return_actions=True, **options)

    observe(context, past)
    parts, taken = [context], []
    for index in range(frames):
        x, actions = draw((c, 1, h, w)), _noisy_actions(model, 1, draw)
        x, actions = _together(x, actions, text, sampler, velocities, tick)
        parts.append(x)
        taken.append(actions)
        if index + 1 < frames:
            observe(x, actions)
    return torch.cat(taken, dim=1), torch.cat(parts, dim=2)


def _together(
    x: Tensor,
    actions: Tensor,
    text: Tensor | None,
    sampler: SamplerConfig,
    velocities: Callable[[Tensor, Tensor, float, dict[str, Any], Tensor | None], tuple[Tensor, Tensor]],
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Frames and actions from noise to clean by Euler steps, guided on the text where the sampler says so."""
    for point, following in itertools.pairwise(schedule(sampler).tolist()):
        options: dict[str, Any] = {}
        if sampler.method == "shortcut":
            options["step"] = x.new_full((len(x), x.shape[2]), point - following)
        made = velocities(x, actions, point, options, text)
        if text is not None and sampler.guided:
            other = velocities(x, actions, point, options, None)
            made = tuple(
                guide(one, two, sampler.guidance_scale, sampler.guidance_convention)
                for one, two in zip(made, other, strict=True)
            )
        x, actions = x + (following - point) * made[0], actions + (following - point) * made[1]
        tick()
    return x, actions


def _noisy_actions(model: PredictTransformer, frames: int, draw: Draw) -> Tensor:
    return draw((frames * model.config.actions_per_latent, model.config.action_dim))


def _given(model: PredictTransformer, latents: Tensor, known: int) -> dict[str, Tensor]:
    """The mask of the first ``known`` frames, for configurations that have one."""
    if not model.config.condition_mask:
        return {}
    mask = latents.new_zeros(len(latents), 1, *latents.shape[2:])
    mask[:, :, :known] = 1
    return {"condition_mask": mask}


def _check(model: PredictTransformer, sampler: SamplerConfig) -> None:
    if not model.config.action_head:
        raise WorldloomError(
            "this model does not predict actions",
            got="action_head = false",
            do="use a checkpoint trained with objective.action_weight above 0",
        )
    if sampler.edm:
        raise WorldloomError("actions are sampled by rectified flow", got=sampler.method, do="use the method euler")
