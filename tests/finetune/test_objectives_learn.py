"""What the objectives are for, on a small world: each is trained for seconds and does better than what it replaces."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from driven_squares import driven_squares

from worldloom import LatentBatch
from worldloom_finetune.distillation import world_loss
from worldloom_finetune.objectives import ObjectiveConfig
from worldloom_finetune.self_forcing import roll_out
from worldloom_model_zoo.predict.actions import act, infer_actions
from worldloom_model_zoo.predict.config import PredictConfig, SamplerConfig
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.samplers import flow_levels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a minute, alone on a core

NETWORK = PredictConfig(
    latent_channels=1, width=48, blocks=2, heads=4, adaln_rank=16, action_dim=2, actions_per_latent=1,
    action_hidden=48,
)  # fmt: skip
OBJECTIVE = ObjectiveConfig(context="prefix", action_dropout=0.0, shift=2.0)


def trained(
    model: PredictTransformer,
    data: LatentBatch,
    objective: ObjectiveConfig,
    steps: int,
    *,
    lr: float = 3e-3,
    batch: int = 16,
    teacher: PredictTransformer | None = None,
) -> PredictTransformer:
    """Trained in place."""
    assert data.actions is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (0.05 + 0.95 * (1 - step / steps))
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data.latents), (batch,), generator=generator)
        chosen = LatentBatch(data.latents[rows], data.actions[rows])
        loss, _ = world_loss(model, chosen, objective, generator, teacher=teacher)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def rolled(model: PredictTransformer, data: LatentBatch, steps: int, frames: int) -> torch.Tensor:
    """``frames`` frames after two given ones, from the same noise for every model and number of steps."""
    generator = torch.Generator().manual_seed(3)
    return roll_out(
        model, data, start=2, frames=frames, levels=flow_levels(steps), context_noise=0.0, generator=generator,
        masks={},
    )  # fmt: skip


def noise(batch: int):
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.randn(batch, *shape, generator=generator)


def test_a_model_trained_jointly_finds_the_actions_of_a_video_and_acts_as_it_foresees() -> None:
    torch.manual_seed(0)
    model = PredictTransformer(replace(NETWORK, action_head=True))
    objective = replace(OBJECTIVE, action_weight=1.0)
    trained(model, driven_squares(2000, 4, 0), objective, 800)
    unseen = driven_squares(128, 4, 1)
    assert unseen.actions is not None
    sampler = SamplerConfig(steps=8)

    found = infer_actions(model, unseen.latents, sampler, noise(128)).round()
    right = (found == unseen.actions).float().mean().item()
    actions, video = act(model, unseen.latents[:, :, :1], None, 3, sampler, noise(128))
    seen = infer_actions(model, video, sampler, noise(128)).round()
    agree = (actions.round() == seen).float().mean().item()
    made = rolled(model, unseen, 4, 2)
    error = (made - unseen.latents[:, :, 2:]).square().mean().item()
    print(f"inverse dynamics right {right:.3f}, policy agrees {agree:.3f}, forward error {error:.3f}")
    assert right > 0.9  # chance: 1/3
    assert agree > 0.6
    assert error < 0.5  # the mean frame: 1


def test_a_distilled_student_is_nearer_to_the_teachers_many_steps_than_the_teachers_own_few() -> None:
    data, unseen = driven_squares(2000, 5, 0, size=4, free=True), driven_squares(128, 5, 1, size=4, free=True)
    torch.manual_seed(0)
    teacher = trained(PredictTransformer(replace(NETWORK, latent_channels=2)), data, OBJECTIVE, 500)
    wanted = rolled(teacher, unseen, 32, 1)
    for steps in (2, 1):
        objective = replace(OBJECTIVE, kind="distill", steps=steps, teacher_substeps=8 // steps, shift=1.0)
        student = trained(copy.deepcopy(teacher), data, objective, 200, lr=1e-3, teacher=teacher)
        own = (rolled(teacher, unseen, steps, 1) - wanted).square().mean().item()
        distilled = (rolled(student, unseen, steps, 1) - wanted).square().mean().item()
        print(f"{steps} steps: distance to the teacher's 32 {own:.4f} before, {distilled:.4f} distilled")
        assert distilled < 0.7 * own


def test_a_shortcut_model_takes_one_step_better_than_a_flow_model() -> None:
    data, unseen = driven_squares(2000, 5, 0, size=4, free=True), driven_squares(128, 5, 1, size=4, free=True)
    torch.manual_seed(0)
    base = trained(PredictTransformer(replace(NETWORK, latent_channels=2, step_size=True)), data, OBJECTIVE, 500)
    objective = replace(OBJECTIVE, kind="shortcut", steps=8, bootstrap_share=0.5)
    model = trained(base, data, objective, 300, lr=1e-3)
    assert unseen.actions is not None
    x = torch.randn(128, 2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    context, levels = unseen.latents[:, :, :2], torch.zeros(128, 2)

    @torch.no_grad()
    def drawn(steps: int, *, told: bool) -> torch.Tensor:
        made = x
        for index in range(steps):
            level = torch.cat([levels, torch.full((128, 1), 1 - index / steps)], dim=1)
            step = torch.cat([levels, torch.full((128, 1), 1 / steps)], dim=1) if told else None
            assert unseen.actions is not None
            actions = unseen.actions[:, :2]
            made = made - model(torch.cat([context, made], dim=2), level, actions, step=step)[:, :, -1:] / steps
        return made

    wanted = drawn(32, told=False)
    for steps in (1, 2):
        plain, short = ((drawn(steps, told=told) - wanted).square().mean().item() for told in (False, True))
        print(f"{steps} steps: distance to 32 {plain:.4f} as flow, {short:.4f} as shortcuts")
        assert short < (0.7 if steps == 1 else 1) * plain  # two steps of this world are nearly straight already
