"""Few-step objectives and rollouts: targets against closed forms, and what a model is shown."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from tiny_models import scatter

from worldloom import LatentBatch, WorldloomError
from worldloom_finetune.distillation import distillation_loss, shortcut_loss, teacher_path, world_loss
from worldloom_finetune.objectives import ObjectiveConfig, draw, rectified_flow_loss
from worldloom_finetune.self_forcing import roll_out
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import PredictConfig, tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.samplers import flow_interpolate, flow_levels

MASKS = {"action_mask": None, "text_mask": None}


def batch(b: int = 4, t: int = 5) -> LatentBatch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(b, 16, t, 4, 4, generator=generator)
    return LatentBatch(latents, torch.randn(b, 4 * (t - 1), 2, generator=generator), None, ("a",) * b)


def model(**changes: object) -> PredictTransformer:
    network = PredictTransformer(dataclasses.replace(tiny(2), **changes))
    scatter(network, 0)
    return network


class Oracle(torch.nn.Module):
    """Names the velocity of true latents exactly, stepped with a cache too; remembers what it was shown."""

    def __init__(self, clean: torch.Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.clean, self.bias = clean, bias
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.taken: list[torch.Tensor] = []
        self.config = PredictConfig(step_size=True)

    def forward(self, x, level, actions, text, *, action_mask, text_mask, cache=None, commit=False, step=None):
        self.calls.append((x, level))
        first = cache.frames if cache is not None else 0
        clean = self.clean[: len(x), :, first : first + x.shape[2]]
        if cache is not None and actions is not None:
            self.taken.append(actions)
        if commit:
            cache.frames += x.shape[2]
        bias = self.bias if step is None else self.bias * (step > 0.75)[:, None, :, None, None]
        return (x - clean) / level[:, None, :, None, None].clamp_min(1e-3) + bias


# -- a teacher -----------------------------------------------------------------------------------------------------


class Growing(torch.nn.Module):
    """Velocity 0.3 x, and 0.1 x under the null action: Euler steps have a closed form."""

    def forward(self, x, level, actions, text, **masks):
        return (0.3 if actions is not None else 0.1) * x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teacher_arrives_where_its_own_sampler_does(shift: float, guidance: float) -> None:
    data = batch()
    config = ObjectiveConfig(kind="distill", steps=2, teacher_substeps=4, shift=shift, teacher_guidance=guidance)
    drawn = draw(Growing(), data, config, torch.Generator().manual_seed(0))
    end, end_level = teacher_path(Growing(), data, drawn, config)

    fine, coarse = flow_levels(8, shift).float(), flow_levels(2, shift).float()
    start = flow_interpolate(data.latents, drawn.noise, drawn.level)
    rate = 0.1 + guidance * 0.2
    for row in range(4):
        for frame in range(5):
            level = drawn.level[row, frame]
            if drawn.weight[row, frame] == 0:
                factor, expected = torch.tensor(1.0), level
            else:
                index = int((coarse - level).abs().argmin())
                steps = fine[4 * index : 4 * index + 5].diff()
                factor, expected = (1 + rate * steps).prod(), coarse[index + 1]
            torch.testing.assert_close(end_level[row, frame], expected)
            torch.testing.assert_close(end[row, :, frame], factor * start[row, :, frame])


def test_a_student_that_takes_the_teachers_steps_at_once_has_no_loss() -> None:
    data = batch()

    class Student(torch.nn.Module):
        """One step of 1/2 where the teacher takes 4: growth ((1 - 0.3/8)^4 - 1) / (-1/2)."""

        def forward(self, x, level, actions, text, **masks):
            return ((1 - 0.3 / 8) ** 4 - 1) / -0.5 * x

    config = ObjectiveConfig(kind="distill", steps=2, teacher_substeps=4)
    loss, _ = distillation_loss(Student(), data, config, torch.Generator().manual_seed(0), None, Growing())
    assert loss < 1e-10
    loss, _ = distillation_loss(Growing(), data, config, torch.Generator().manual_seed(0), None, Growing())
    assert loss > 1e-5
    one = dataclasses.replace(config, teacher_substeps=1)
    network = model()
    loss, _ = distillation_loss(network, data, one, torch.Generator().manual_seed(0), None, network)
    assert loss < 1e-8  # one step of the teacher is what the student makes already


def test_under_guidance_the_student_is_never_shown_the_null_action() -> None:
    seen = []

    class Student(Growing):
        def forward(self, x, level, actions, text, **masks):
            seen.append(masks["action_mask"])
            return super().forward(x, level, actions, text, **masks)

    config = ObjectiveConfig(kind="distill", teacher_guidance=2.0, action_dropout=0.9)
    distillation_loss(Student(), batch(), config, torch.Generator().manual_seed(0), None, Growing())
    assert all(mask.all() for mask in seen)


@pytest.mark.parametrize("context", ["true", "own"])
def test_under_teacher_forcing_a_teacher_sees_true_frames_or_the_students(context: Literal["true", "own"]) -> None:
    data, seen = batch(t=7), {}

    class Watched(torch.nn.Module):
        def __init__(self, name: str, inner: torch.nn.Module) -> None:
            super().__init__()
            self.name, self.inner, self.config = name, inner, inner.config

        def forward(self, *given, **named):
            if "context" in named:
                seen.setdefault(self.name, []).append((named["context"], named["context_timestep"]))
            return self.inner(*given, **named)

    config = ObjectiveConfig(
        kind="distill", context="teacher_forcing", context_noise=0.0, steps=2, teacher_substeps=2, teacher_guidance=1.5,
        rollout_share=0.5, rollout_frames=3, teacher_context=context,
    )  # fmt: skip
    student, teacher = Watched("student", model()), Watched("teacher", model().eval())
    loss, _ = distillation_loss(student, data, config, torch.Generator().manual_seed(0), None, teacher)
    assert loss > 0
    assert len(seen["teacher"]) == 4  # two steps, each with and without actions
    ((own, level),) = seen["student"]
    before = data.latents if context == "true" else own
    assert all(torch.equal(past, before) for past, _ in seen["teacher"])
    assert (own != data.latents).any(dim=(1, 3, 4)).sum(dim=1).tolist() == [3, 3, 0, 0]
    assert not level.any()

    one = dataclasses.replace(config, teacher_substeps=1, teacher_guidance=1.0, rollout_share=0.0)
    network = model()
    loss, _ = distillation_loss(network, data, one, torch.Generator().manual_seed(0), None, network)
    assert loss < 1e-8  # one step of the teacher is what the student makes already


def test_distillation_without_a_teacher_says_so() -> None:
    with pytest.raises(WorldloomError, match="needs a trained base"):
        world_loss(model(), batch(), ObjectiveConfig(kind="distill"), torch.Generator())


# -- shortcut models -----------------------------------------------------------------------------------------------


def test_straight_paths_agree_with_their_halves_and_a_long_step_that_does_not_is_told() -> None:
    data = batch(b=8)
    config = ObjectiveConfig(kind="shortcut", steps=2, bootstrap_share=0.5, context="prefix")
    loss, _ = shortcut_loss(Oracle(data.latents), data, config, torch.Generator().manual_seed(0))
    assert loss < 1e-6
    # Wrong by 1 in steps of 1 alone, which are the frames that the first four samples bootstrap.
    oracle = Oracle(data.latents, bias=1.0)
    loss, _ = shortcut_loss(oracle, data, config, torch.Generator().manual_seed(0))
    drawn = draw(oracle, data, config, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx((drawn.weight[:4].sum() / drawn.weight.sum()).item(), rel=1e-4)
    level = oracle.calls[-1][1]
    assert (level[:4][drawn.weight[:4] > 0] == 1).all()


def test_long_steps_start_at_multiples_of_their_size() -> None:
    seen = []

    class Network(Oracle):
        def forward(self, x, level, actions, text, *, step, **masks):
            seen.append((level, step))
            return super().forward(x, level, actions, text, step=step, **masks)

    data = batch(b=64)
    config = ObjectiveConfig(kind="shortcut", steps=8, bootstrap_share=0.5, context="prefix")
    shortcut_loss(Network(data.latents), data, config, torch.Generator().manual_seed(0))
    (first, half), (second, _), (_, step) = seen
    assert len(first) == 32
    noisy = half > 0
    assert set(half[noisy].tolist()) == {0.5, 0.25, 0.125}
    assert torch.equal(step[:32][noisy], 2 * half[noisy])
    ratio = (first / (2 * half))[noisy]
    assert torch.equal(ratio, ratio.round())
    torch.testing.assert_close(second[noisy], (first - half)[noisy])
    assert set(step[32:].unique().tolist()) == {0.0, 0.125}


def test_a_step_size_is_new_parameters_that_change_nothing_at_first() -> None:
    torch.manual_seed(0)
    plain, told = PredictTransformer(tiny(2)), PredictTransformer(dataclasses.replace(tiny(2), step_size=True))
    added = told.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"step_embedder"}
    scatter(plain, 0)
    told.load_state_dict(plain.state_dict(), strict=False)
    data, level = batch(), torch.rand(4, 5)
    step = torch.rand(4, 5)
    assert torch.equal(told(data.latents, level, data.actions, step=step), plain(data.latents, level, data.actions))
    scatter(told, 1)
    without = told(data.latents, level, data.actions)
    assert torch.equal(told(data.latents, level, data.actions, step=torch.zeros(4, 5)), without)
    assert (told(data.latents, level, data.actions, step=step) - without).abs().max() > 1e-3
    with pytest.raises(WorldloomError, match="step_size"):
        plain(data.latents, level, data.actions, step=step)
    with pytest.raises(WorldloomError, match="told the size of its steps"):
        shortcut_loss(plain, data, ObjectiveConfig(kind="shortcut"), torch.Generator())


# -- rollouts ------------------------------------------------------------------------------------------------------


def rolled(network: torch.nn.Module, data: LatentBatch, steps: int = 3, noise: float = 0.0, guidance: float = 1.0):
    return roll_out(
        network, data, start=2, frames=3, levels=flow_levels(steps), context_noise=noise, guidance=guidance,
        generator=torch.Generator().manual_seed(4), masks=MASKS,
    )  # fmt: skip


def test_a_perfect_model_rolls_out_the_truth_at_the_cost_of_its_steps() -> None:
    data = batch(t=6)
    oracle = Oracle(data.latents)
    torch.testing.assert_close(rolled(oracle, data), data.latents[:, :, 2:5], atol=1e-5, rtol=0)
    single = [x for x, _ in oracle.calls if x.shape[2] == 1]
    assert len(single) == 3 * 3 + 2  # three steps a frame, and two frames taken into the cache
    assert len(oracle.calls) == 1 + len(single)
    assert data.actions is not None
    taken = torch.cat([oracle.taken[0], oracle.taken[1], oracle.taken[5], oracle.taken[9]], dim=1)
    assert torch.equal(taken, data.actions[:, :16])  # each frame is made with the actions that lead to it


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_rollout_with_a_cache_equals_one_that_recomputes_everything(noise: float, guidance: float) -> None:
    network, data, b = model(window=3), batch(t=6), 4
    got = rolled(network, data, noise=noise, guidance=guidance)
    g = torch.Generator().manual_seed(4)

    def shown(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = torch.rand(b, x.shape[2], generator=g) * noise
        return flow_interpolate(x, torch.randn(x.shape, generator=g), level), level

    assert data.actions is not None
    past, levels = shown(data.latents[:, :, :2])
    for frame in range(2, 5):
        x = torch.randn(b, 16, 1, 4, 4, generator=g)
        for level, following in torch.stack([flow_levels(3)[:-1], flow_levels(3)[1:]], dim=1).tolist():
            whole, at = torch.cat([past, x], dim=2), torch.cat([levels, torch.full((b, 1), level)], dim=1)
            with torch.no_grad():
                velocity = network(whole, at, data.actions[:, : 4 * frame])[:, :, -1:]
                if guidance != 1:  # from what the same past is without the last actions
                    blind = without_last_actions(network, past, levels, x, level, data.actions[:, : 4 * frame])
                    velocity = blind + guidance * (velocity - blind)
                x = x + (following - level) * velocity
        torch.testing.assert_close(got[:, :, frame - 2], x[:, :, 0], atol=1e-4, rtol=0)
        if frame < 4:
            mine, level = shown(x)
            past, levels = torch.cat([past, mine], dim=2), torch.cat([levels, level], dim=1)


def without_last_actions(
    network: PredictTransformer, past: torch.Tensor, levels: torch.Tensor, x: torch.Tensor, level: float,
    actions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The velocity of one more frame under the null action, after a past that came about with actions."""
    cache = KVCache()
    network(past, levels, actions[:, :-4], cache=cache, commit=True)
    return network(x, torch.full((len(x), 1), level), None, cache=cache)


def test_a_sample_with_the_null_action_has_nothing_to_be_guided_from() -> None:
    network, data = model(window=3), batch(t=6)
    data = LatentBatch(data.latents, data.actions, None)
    keep = torch.tensor([True, False, True, True])
    levels, guided = flow_levels(2), {"action_mask": keep}
    made = {
        scale: roll_out(
            network, data, start=2, frames=3, levels=levels, context_noise=0.0, guidance=scale, masks=guided,
            generator=torch.Generator().manual_seed(4),
        )
        for scale in (1.0, 2.0)
    }  # fmt: skip
    changed = (made[1.0] - made[2.0]).abs().amax(dim=(1, 2, 3, 4))
    assert (changed > 1e-3).tolist() == keep.tolist()


def test_the_share_of_samples_that_is_rolled_out_has_its_own_frames_in_the_context_only() -> None:
    data, config = batch(b=8, t=6), ObjectiveConfig(context="prefix", rollout_share=0.5, rollout_frames=3)
    network = model()
    counts = set()
    for seed in range(12):
        drawn = draw(network, data, config, torch.Generator().manual_seed(seed))
        same = _same(drawn.latents, data.latents)
        assert same[4:].all()
        assert same[:, 0].all()  # a start is given
        own = ~same[:4]
        assert own.any(dim=1).all()
        assert (drawn.weight[:4][own] == 0).all()  # what is to be denoised is true
        assert (drawn.level[:4][own] <= 0.1).all()
        assert (drawn.weight[:4].sum(dim=1) >= 1).all()
        assert (drawn.level[:4][drawn.weight[:4] > 0] > 0).all()
        for row in range(4):  # the last of the context
            context = int((drawn.weight[row] == 0).sum())
            assert own[row, context - 1]
        counts |= set(own.sum(dim=1).tolist())
    assert counts == {1, 2, 3}


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one == other).flatten(3).all(dim=3).all(dim=1)


@pytest.mark.parametrize("context", ["true", "own"])
def test_a_student_is_shown_its_own_frames_and_its_teacher_what_it_is_to_see(context: Literal["true", "own"]) -> None:
    data = batch(t=6)
    config = ObjectiveConfig(
        kind="distill", context="prefix", context_noise=0.0, rollout_share=1.0, steps=2, teacher_substeps=2,
        teacher_context=context,
    )  # fmt: skip
    student, teacher = Oracle(data.latents, bias=0.4), Oracle(data.latents)
    loss, _ = distillation_loss(student, data, config, torch.Generator().manual_seed(0), None, teacher)
    assert loss.item() == pytest.approx(0.16, rel=1e-3)
    (seen, level), (known, _) = student.calls[-1], teacher.calls[0]
    before = level == 0
    assert _same(known, data.latents if context == "true" else seen)[before].all()
    own = ~_same(seen, data.latents) & before
    assert own.any(dim=1).all()
    error = (seen - data.latents).abs().amax(dim=(1, 3, 4))[own]
    torch.testing.assert_close(error, torch.full_like(error, 0.2), atol=1e-3, rtol=0)  # its bias in the last step


def test_rollouts_are_for_causal_models() -> None:
    config = ObjectiveConfig(rollout_share=0.5)
    with pytest.raises(WorldloomError, match="for causal models"):
        rectified_flow_loss(model(attention="full"), batch(), config, torch.Generator())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_error_of_a_rollout_is_that_of_its_last_steps_velocity(steps: int) -> None:
    data = batch(t=6)
    for share in (0.5, 1.0):
        config = ObjectiveConfig(rollout_share=share, rollout_steps=steps, context_noise=0.0)
        oracle = Oracle(data.latents, bias=0.4)
        loss, metrics = rectified_flow_loss(oracle, _all_alike(data, oracle), config, torch.Generator().manual_seed(0))
        assert loss.item() == pytest.approx(0.16, rel=1e-3)
        assert metrics["loss_rollout"] == pytest.approx(0.16, rel=1e-3)


def _all_alike(data: LatentBatch, oracle: Oracle) -> LatentBatch:
    """The first sample as often as there are samples, so that every part of the batch is what the oracle knows."""
    latents = data.latents[:1].expand(len(data.latents), -1, -1, -1, -1)
    oracle.clean = latents
    return LatentBatch(latents, data.actions)


def test_gradients_of_a_rollout_are_those_of_its_last_steps_alone() -> None:
    network, data = model(window=3), batch(t=4)
    config = ObjectiveConfig(rollout_share=1.0, rollout_frames=2, rollout_steps=2, action_dropout=0.0)
    loss, _ = rectified_flow_loss(network, data, config, torch.Generator().manual_seed(1))
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    calls = []
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    seen = []
    other = network.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    rectified_flow_loss(network, data, config, torch.Generator().manual_seed(1))
    handle.remove()
    other.remove()
    assert seen == [False, False, True, False, False, True]  # start; two steps; its first frame is taken in; two steps
    assert got.abs().max() > 0
    assert all(not key.requires_grad for _, kwargs in calls for key in kwargs["cache"].keys)


def test_a_sample_too_short_to_be_rolled_out_is_trained_as_it_is() -> None:
    config = ObjectiveConfig(rollout_share=1.0, rollout_target="context")
    network, data = model(), batch(t=2)
    loss, _ = rectified_flow_loss(network, data, config, torch.Generator().manual_seed(0))
    plain, _ = rectified_flow_loss(network, data, ObjectiveConfig(), torch.Generator().manual_seed(0))
    assert loss == plain


# -- all of them ---------------------------------------------------------------------------------------------------

KINDS = {
    "flow": ({}, {}),
    "rollouts": ({"rollout_share": 0.5}, {}),
    "context": ({"rollout_share": 0.5, "rollout_target": "context"}, {}),
    "edm": ({"kind": "edm"}, {}),
    "joint": ({"action_weight": 1.0}, {"action_head": True}),
    "distill": ({"kind": "distill", "rollout_share": 0.5}, {}),
    "shortcut": ({"kind": "shortcut", "steps": 4, "bootstrap_share": 0.5}, {"step_size": True}),
}


@pytest.mark.parametrize("name", KINDS)
def test_equal_generators_give_equal_losses_and_gradients_reach_every_weight(name: str) -> None:
    objective, network = KINDS[name]
    config, student, data = ObjectiveConfig(**objective), model(**network), batch()
    teacher = model(**network).requires_grad_(False) if name == "distill" else None
    if teacher is not None:
        scatter(teacher, 7)
    losses = [
        world_loss(student, data, config, torch.Generator().manual_seed(seed), None, teacher)[0] for seed in (5, 5, 6)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of the norm of queries
@pytest.mark.parametrize("name", ["rollouts", "context", "shortcut"])
def test_passes_without_gradients_leave_those_of_bfloat16_alone(name: str) -> None:
    objective, network = KINDS[name]
    config, data = ObjectiveConfig(**objective), batch()
    gradients = []
    for lower in (False, True):
        student = model(**network)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss, _ = world_loss(student, data, config, torch.Generator().manual_seed(5))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.95
