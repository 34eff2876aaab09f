"""Objectives: what is trained is what sampling meets, and equal generators give equal losses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import scatter

from worldloom import LatentBatch, WorldloomError
from worldloom_finetune.objectives import (
    ObjectiveConfig,
    channel_weights,
    draw,
    edm_loss,
    joint_levels,
    joint_loss,
    noise_levels,
    rectified_flow_loss,
    step_levels,
)
from worldloom_model_zoo.predict.config import tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.samplers import edm_denoiser, flow_interpolate, flow_levels, shift_noise_level


class Oracle(torch.nn.Module):
    """Knows the clean latents, so it can name the velocity exactly; counts the null actions it was given."""

    def __init__(self, clean: torch.Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.clean, self.bias = clean, bias
        self.kept: list[bool] = []

    def forward(self, x, level, actions, text, *, action_mask, text_mask):
        self.kept += action_mask.tolist()
        level = level[:, None, :, None, None]
        return (x - self.clean) / level.clamp_min(1e-3) + self.bias  # x = clean + level (noise - clean)


def batch(b: int = 4, t: int = 5) -> LatentBatch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(b, 16, t, 4, 4, generator=generator)
    return LatentBatch(latents, torch.randn(b, 4 * (t - 1), 2, generator=generator), None, ("a",) * b)


@settings(deadline=None, max_examples=40)
@given(t=st.integers(1, 9), seed=st.integers(0, 2**31), mode=st.sampled_from(["prefix", "independent", "mixed"]))
def test_noise_levels(t: int, seed: int, mode: str) -> None:
    config = ObjectiveConfig(context=mode, context_noise=0.1)
    level, weight = noise_levels(16, t, config, torch.Generator().manual_seed(seed))
    assert level.shape == weight.shape == (16, t)
    assert ((level >= 0) & (level <= 1)).all()
    assert (weight.sum(dim=1) >= 1).all()  # something is always learnt
    clean = weight == 0
    assert (level[clean] <= 0.1).all()
    assert (clean.int().diff(dim=1) <= 0).all()  # context is a prefix
    if mode == "prefix" and t > 1:
        assert clean[:, 0].all()
    if mode == "independent":
        assert not clean.any()


def test_the_true_velocity_has_no_loss_and_an_error_has_its_square() -> None:
    data = batch()
    loss, _ = rectified_flow_loss(Oracle(data.latents), data, ObjectiveConfig(), torch.Generator().manual_seed(0))
    assert loss < 1e-6
    loss, metrics = rectified_flow_loss(
        Oracle(data.latents, bias=0.5), data, ObjectiveConfig(), torch.Generator().manual_seed(0)
    )
    assert loss.item() == pytest.approx(0.25, rel=1e-3)
    assert metrics["loss_high_noise"] == pytest.approx(0.25, rel=1e-3)


def test_actions_are_dropped_at_the_stated_rate() -> None:
    data = batch(b=64)
    oracle = Oracle(data.latents)
    for seed in range(20):
        rectified_flow_loss(oracle, data, ObjectiveConfig(action_dropout=0.25), torch.Generator().manual_seed(seed))
    dropped = 1 - sum(oracle.kept) / len(oracle.kept)
    assert 0.2 < dropped < 0.3


def test_equal_generators_give_equal_losses_and_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    model, data = PredictTransformer(tiny(action_dim=2)), batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    first, _ = rectified_flow_loss(model, data, ObjectiveConfig(), torch.Generator().manual_seed(5))
    again, _ = rectified_flow_loss(model, data, ObjectiveConfig(), torch.Generator().manual_seed(5))
    other, _ = rectified_flow_loss(model, data, ObjectiveConfig(), torch.Generator().manual_seed(6))
    assert first == again
    assert first != other
    first.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_channel_weights_are_the_share_of_each_channel_in_pixels() -> None:
    class Linear:
        """Channel i is worth i + 1 in every pixel."""

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return (latents * torch.arange(1.0, 5)[None, :, None, None, None]).sum(dim=1, keepdim=True)

    latents = torch.randn(2, 4, 3, 2, 2)
    weights = channel_weights(Linear(), latents, 1.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 4, 9, 16]) / 7.5)
    torch.testing.assert_close(channel_weights(Linear(), latents, 0.0), torch.ones(4))
    data = batch()
    weighed = torch.arange(16.0)

    class Biased(Oracle):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + weighed[None, :, None, None, None]

    loss, _ = rectified_flow_loss(
        Biased(data.latents),
        data,
        ObjectiveConfig(),
        torch.Generator().manual_seed(0),
        torch.tensor([1.0] + [0.0] * 15),
    )
    assert loss < 1e-6  # the one channel that counts is right


def test_losses_that_are_not_finite_are_refused() -> None:
    data = batch()
    data.latents[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(WorldloomError, match="not finite"):
        rectified_flow_loss(PredictTransformer(tiny(2)), data, ObjectiveConfig(), torch.Generator())


# -- what is drawn -------------------------------------------------------------------------------------------------


def test_without_new_settings_the_loss_is_bit_by_bit_what_it_was() -> None:
    data, config = batch(), ObjectiveConfig(shift=3.0, context_noise=0.2)
    torch.manual_seed(0)
    model = PredictTransformer(tiny(2))
    scatter(model, 1)
    got, _ = rectified_flow_loss(model, data, config, torch.Generator().manual_seed(8))

    # As the first release drew it.
    g, (b, t) = torch.Generator().manual_seed(8), (4, 5)
    level = shift_noise_level(torch.sigmoid(torch.randn(b, t, generator=g) * 1.0 + 0.0), 3.0)
    prefix = torch.randint(1, t, (b, 1), generator=g)
    context = torch.rand(b, t, generator=g) * 0.2
    independent = torch.rand(b, 1, generator=g) < 0.5
    given = (torch.arange(t)[None] < prefix) & ~independent
    level, weight = torch.where(given, context, level), (~given).float()
    noise = torch.randn(data.latents.shape, generator=g)
    keep = torch.rand(b, generator=g) >= 0.1
    velocity = model(flow_interpolate(data.latents, noise, level), level, data.actions, None, action_mask=keep)
    error = (velocity - (noise - data.latents)).square().mean(dim=(1, 3, 4))
    assert torch.equal(got, (error * weight).sum() / weight.sum().clamp_min(1))


@pytest.mark.parametrize("levels", [noise_levels, step_levels])
def test_under_teacher_forcing_every_frame_but_the_first_is_noisy(levels) -> None:
    level, weight = levels(8, 6, ObjectiveConfig(context="teacher_forcing", context_noise=0.1), torch.Generator())
    assert weight.tolist() == [[0, 1, 1, 1, 1, 1]] * 8
    assert (level[:, 0] <= 0.1).all()
    assert level[:, 1:].unique().numel() > 1


class Watched(Oracle):
    """An oracle that remembers the context it was shown."""

    def forward(self, x, level, actions, text, *, action_mask, text_mask, context=None, context_timestep=None):
        self.shown = x, level, context, context_timestep
        return super().forward(x, level, actions, text, action_mask=action_mask, text_mask=text_mask)


def test_teacher_forcing_shows_nearly_clean_frames_beside_the_noisy_ones() -> None:
    data = batch(b=3, t=6)
    model, config = Watched(data.latents), ObjectiveConfig(context="teacher_forcing", context_noise=0.2)
    loss, _ = rectified_flow_loss(model, data, config, torch.Generator().manual_seed(0))
    x, level, context, context_level = model.shown
    assert loss < 1e-6
    assert context_level.shape == (3, 6)
    assert (context_level <= 0.2).all()
    assert len(context_level.unique()) > 10
    noise = (context - data.latents) / context_level[:, None, :, None, None] + data.latents
    assert noise.std() == pytest.approx(1, abs=0.05)
    other = (x - data.latents) / level[:, None, :, None, None] + data.latents
    assert abs(float((noise * other).mean())) < 0.1  # noise of its own


def test_teacher_forcing_after_frames_of_its_own_denoises_true_ones_at_those_frames_alone() -> None:
    data = batch(b=4, t=7)
    model = PredictTransformer(tiny(2))
    scatter(model, 0)
    config = ObjectiveConfig(context="teacher_forcing", rollout_share=0.5, rollout_target="context", rollout_frames=3)
    drawn = draw(model, data, config, torch.Generator().manual_seed(0))
    assert drawn.past is not None
    assert torch.equal(drawn.latents, data.latents)
    own = (drawn.past.latents != data.latents).any(dim=(1, 3, 4))  # which frames of which sample
    assert own.sum(dim=1).tolist() == [3, 3, 0, 0]
    after_own = torch.zeros(4, 7)
    after_own[:2, 1:] = own[:2, :-1].float()
    after_own[2:, 1:] = 1
    assert torch.equal(drawn.weight, after_own)
    loss, _ = rectified_flow_loss(model, data, config, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.blocks[0].parameters())


@pytest.mark.parametrize("wrong", [{"kind": "edm"}, {"kind": "shortcut"}, {"action_weight": 1.0}])
def test_teacher_forcing_goes_with_flow_and_distillation(wrong: dict[str, object]) -> None:
    with pytest.raises(WorldloomError, match="teacher_forcing"):
        ObjectiveConfig(context="teacher_forcing", **wrong)


def test_texts_are_dropped_at_the_stated_rate() -> None:
    data = dataclasses.replace(batch(b=64), text=torch.zeros(64, 3, 8))
    model, kept = Oracle(data.latents), []
    for seed in range(20):
        drawn = draw(model, data, ObjectiveConfig(text_dropout=0.3), torch.Generator().manual_seed(seed))
        assert drawn.keep_text is not None
        kept += drawn.keep_text.tolist()
        assert not torch.equal(drawn.keep_text, drawn.keep_action)
    assert 0.25 < 1 - sum(kept) / len(kept) < 0.35


@pytest.mark.parametrize("levels", [noise_levels, step_levels])
def test_noisy_frames_may_share_one_level(levels) -> None:
    config = ObjectiveConfig(context="prefix", shared_level=True, context_noise=0.0, steps=8)
    level, weight = levels(32, 6, config, torch.Generator().manual_seed(0))
    assert (level.amax(dim=1, keepdim=True) == level)[weight > 0].all()
    assert (level[weight == 0] == 0).all()
    assert len(level.amax(dim=1).unique()) > 4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_student_is_trained_at_the_levels_its_sampler_starts_steps_from(shift: float) -> None:
    config = ObjectiveConfig(steps=4, shift=shift)
    level, weight = step_levels(64, 5, config, torch.Generator().manual_seed(0))
    expected = flow_levels(4, shift).float()[:-1]
    assert set(level[weight > 0].tolist()) == set(expected.tolist())


# -- EDM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_the_target_of_edm_has_unit_variance_at_every_sigma(sigma_data: float) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x, timestep, actions, text, **masks):
            assert 0.95 < x.square().mean() < 1.05  # c_in
            return torch.zeros_like(x)

    latents = sigma_data * torch.randn(8, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    for mean in (-2.0, 0.3, 3.0):
        config = ObjectiveConfig(kind="edm", sigma_data=sigma_data, sigma_mean=mean, context="independent")
        loss, _ = edm_loss(Nothing(), LatentBatch(latents), config, torch.Generator().manual_seed(1))
        assert loss.item() == pytest.approx(1, abs=0.02)  # Karras et al. 2022, appendix B.6


def test_a_network_without_edm_loss_is_a_perfect_denoiser() -> None:
    clean = batch().latents

    class Knows(torch.nn.Module):
        def forward(self, x, timestep, actions=None, text=None, **masks):
            sigma = (4 * timestep).exp().view(*timestep.shape, 1, 1).unsqueeze(1)
            noisy = x * (sigma**2 + 0.25).sqrt()
            return (clean - 0.25 / (sigma**2 + 0.25) * noisy) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)

    config = ObjectiveConfig(kind="edm", sigma_data=0.5)
    loss, _ = edm_loss(Knows(), batch(), config, torch.Generator().manual_seed(1))
    assert loss < 1e-6
    network = lambda x, c_noise: Knows()(x, torch.full((4, 5), c_noise))  # noqa: E731
    denoised = edm_denoiser(network, 0.5)(clean + 3 * torch.randn(clean.shape), 3.0)
    torch.testing.assert_close(denoised, clean, atol=1e-4, rtol=0)


# -- frames and actions --------------------------------------------------------------------------------------------


def test_every_sample_trains_one_corner_of_the_square() -> None:
    data, config = batch(b=300), ObjectiveConfig(context="prefix", context_noise=0.1, modes=(1, 1, 2))
    generator = torch.Generator().manual_seed(0)
    drawn, level, weight, mode = joint_levels(draw(Oracle(data.latents), data, config, generator), config, generator)
    share = torch.stack([(mode == m).float().mean() for m in range(3)])
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0.5]), atol=0.07, rtol=0)
    assert (level[weight == 0] == 0).all()
    assert (level[weight > 0] > 0).all()
    assert (weight[mode == 0] == 0).all()  # forward dynamics: actions are known
    assert (drawn.weight[mode == 0].sum(dim=1) > 0).all()
    assert (weight[mode == 1] == 1).all()  # inverse dynamics: frames are known
    assert (drawn.level[mode == 1] <= 0.1).all()
    assert (drawn.weight[mode == 1] == 0).all()
    assert torch.equal(weight[mode == 2], drawn.weight[mode == 2][:, 1:])  # policy: both, after what has happened
    assert (level.amax(dim=1, keepdim=True) == level)[weight > 0].all()


def test_the_joint_loss_is_the_weighted_sum_of_both_errors() -> None:
    data = batch(b=16)
    assert data.actions is not None

    class Both(Oracle):
        def forward(self, x, level, actions, text, *, action_timestep, return_actions, **masks):
            assert return_actions
            each = action_timestep.repeat_interleave(4, dim=1)[..., None]
            velocity = super().forward(x, level, actions, text, **masks)
            return velocity, (actions - data.actions) / each.clamp_min(1e-3) + self.action_bias

    model = Both(data.latents)
    config = ObjectiveConfig(action_weight=3.0, action_dropout=0.2)
    for bias, action_bias, expected in ((0.0, 0.0, 0.0), (0.5, 0.0, 0.25), (0.0, 0.5, 0.75), (1.0, 1.0, 4.0)):
        model.bias, model.action_bias = bias, action_bias
        loss, metrics = joint_loss(model, data, config, torch.Generator().manual_seed(0))
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        assert metrics["loss_inverse"] == pytest.approx(action_bias**2, abs=1e-4)
        assert metrics["loss_policy"] == pytest.approx(action_bias**2, abs=1e-4)
    with pytest.raises(WorldloomError, match="needs data with actions"):
        joint_loss(model, LatentBatch(data.latents), config, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "1 or more"),
        ({"rollout_share": 1.5}, "in \\[0, 1\\]"),
        ({"modes": (0.0, 0.0, 0.0)}, "not all zero"),
        ({"kind": "shortcut", "steps": 6}, "power of two"),
        ({"kind": "edm", "rollout_share": 0.5}, "neither rollouts nor actions"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(WorldloomError, match=message):
        ObjectiveConfig(**settings)
