"""Few-step objectives, and the choice among all of them.

- Distillation: a frozen teacher makes many small steps along its own path, the student is to make them in one
  (progressive distillation, Salimans & Ho 2022, for rectified flow). A student of k steps takes exactly the steps of a
  k-step sampler.
- Shortcut models (Frans et al. 2024): told the size of a step, one network learns steps of every size, the long ones
  from two of its own half as long. No teacher; the model needs ``step_size``.

Both leave every frame its own noise level, so a causal model stays a causal model.

Letters: b batch, t latent frames, c channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.schema import LatentBatch
from worldloom_finetune.objectives import (
    Drawn,
    ObjectiveConfig,
    draw,
    edm_loss,
    finite,
    frame_loss,
    joint_loss,
    rectified_flow_loss,
)
from worldloom_model_zoo.samplers import flow_interpolate, guide, shift_noise_level


def world_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss that ``config.kind`` names, and metrics to log; see `rectified_flow_loss` for the arguments.

    Args:
        teacher: for ``distill``: frozen.

    Raises:
        WorldloomError: a model or data that the objective does not fit, or a loss that is not finite.
    """
    if config.kind == "distill":
        if teacher is None:
            raise WorldloomError("distillation needs a trained base", do="give a checkpoint as --model, not a preset")
        return distillation_loss(model, batch, config, generator, weights, teacher)
    if config.kind == "shortcut":
        return shortcut_loss(model, batch, config, generator, weights)
    if config.kind == "edm":
        return edm_loss(model, batch, config, generator, weights)
    return (joint_loss if config.action_weight else rectified_flow_loss)(model, batch, config, generator, weights)


# -- a teacher ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_path(
    teacher: nn.Module, batch: LatentBatch, drawn: Drawn, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Where the teacher arrives by ``teacher_substeps`` Euler steps, and the level ``(b, t)`` there.

    Noisy frames go from their level to the next of a ``steps``-step sampler's, all of them together; context frames
    stay what they are. They are true ones, even where the student is shown its own, unless ``teacher_context`` says
    otherwise.

    Args:
        drawn: levels of noisy frames are among those that `worldloom_finetune.objectives.step_levels` gives.
    """
    if config.teacher_context == "true":
        past = None if drawn.past is None else replace(drawn.past, latents=batch.latents)
        drawn = replace(drawn, latents=batch.latents, past=past)
    x, level = drawn.noisy, drawn.level
    past = {} if drawn.past is None else drawn.past.inputs
    even = level / (config.shift - (config.shift - 1) * level)  # the level before its shift
    stride = (drawn.weight > 0) / (config.steps * config.teacher_substeps)
    for step in range(1, config.teacher_substeps + 1):
        following = shift_noise_level((even - step * stride).clamp_min(0), config.shift)
        following = torch.where(drawn.weight > 0, following, drawn.level)
        velocity = teacher(x, level, batch.actions, batch.text, **drawn.masks, **past)
        if config.teacher_guidance != 1:
            velocity = guide(velocity, teacher(x, level, None, None, **past), config.teacher_guidance)
        x = x + (following - level)[:, None, :, None, None].to(x) * velocity
        level = following
    return x, level


def distillation_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None,
    teacher: nn.Module,
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the velocity that leads in one step to where the teacher arrives in ``teacher_substeps``.

    With rollouts the student's context holds frames of its own, the teacher's the true ones or these too.

    Raises:
        WorldloomError: if the loss is not finite.
    """
    drawn = draw(model, batch, config, generator)
    if config.teacher_guidance != 1:  # the student has guidance built in, and so no null action
        everything = torch.ones_like(drawn.keep_action)
        drawn = replace(drawn, keep_action=everything, keep_text=None if drawn.keep_text is None else everything)
    end, end_level = teacher_path(teacher, batch, drawn, config)
    start = flow_interpolate(batch.latents, drawn.noise, drawn.level)
    change = torch.where(drawn.weight > 0, end_level - drawn.level, -1)[:, None, :, None, None].to(start)
    made = model(drawn.noisy, drawn.level, batch.actions, batch.text, **drawn.inputs)
    loss, metrics = frame_loss(made, (end - start) / change, drawn, weights)
    return finite(loss), metrics


# -- shortcut models ---------------------------------------------------------------------------------------------------


def shortcut_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Flow where steps are short, agreement with two half steps where they are long (Frans et al. 2024, eq. 5).

    A share ``bootstrap_share`` of the samples take steps of 1, 1/2, ..., 2/``steps`` from a level that is a multiple
    of the step; their target is the mean of the two velocities of the half steps, without gradients. The others have
    the velocity of rectified flow as their target, at step 0 or 1/``steps``.

    Raises:
        WorldloomError: a model without ``step_size``, or a loss that is not finite.
    """
    settings: Any = model.config
    if not settings.step_size:
        raise WorldloomError("a shortcut model is told the size of its steps", do="set model.step_size = true")
    drawn = draw(model, batch, config, generator)
    b, t = drawn.level.shape
    sizes = config.steps.bit_length() - 1  # of steps longer than the shortest
    rows = round(config.bootstrap_share * b) if sizes else 0
    short = torch.randint(2, (b, t), generator=generator) / config.steps
    k = 1 if config.shared_level else t
    parts = 2 ** torch.randint(max(sizes, 1), (rows, k), generator=generator)  # steps of this size from noise to clean
    index = 1 + (torch.rand(rows, k, generator=generator) * parts).long()  # 1 to parts
    long, start = (1 / parts).expand(rows, t).to(drawn.level), (index / parts).expand(rows, t).to(drawn.level)

    target = drawn.weight > 0
    level, step = drawn.level.clone(), short.to(drawn.level)
    level[:rows] = torch.where(target[:rows], start, level[:rows])
    step[:rows] = torch.where(target[:rows], long, step[:rows])
    drawn = replace(drawn, level=level)
    noisy, wanted = drawn.noisy, drawn.noise - batch.latents
    if rows:
        wanted[:rows] = _two_half_steps(model, batch, drawn, noisy, torch.where(target, step, 0) / 2, rows)
    made = model(noisy, level, batch.actions, batch.text, **drawn.masks, step=step)
    loss, metrics = frame_loss(made, wanted, drawn, weights)
    return finite(loss), metrics


@torch.no_grad()
def _two_half_steps(
    model: nn.Module, batch: LatentBatch, drawn: Drawn, noisy: Tensor, half: Tensor, rows: int
) -> Tensor:
    """The mean velocity of two steps of size ``half (b, t)`` of the first ``rows`` samples."""
    x, level, half = noisy[:rows], drawn.level[:rows], half[:rows]
    actions, text = (None if given is None else given[:rows] for given in (batch.actions, batch.text))
    masks = {name: None if given is None else given[:rows] for name, given in drawn.masks.items()}
    first = model(x, level, actions, text, **masks, step=half)
    middle = x - half[:, None, :, None, None].to(x) * first
    second = model(middle, level - half, actions, text, **masks, step=half)
    torch.clear_autocast_cache()  # see self_forcing.roll_out
    return (first + second) / 2
