"""Inverse dynamics and policies: what is sampled, and that a cache changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import scatter
from tiny_models import tokenizer as tiny_tokenizer

from worldloom import WorldloomError
from worldloom.protocols import Acts, InfersActions
from worldloom_model_zoo.predict.actions import act, infer_actions
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig, SamplerConfig, tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline

SAMPLER = SamplerConfig(steps=3)


def model(**changes: object) -> PredictTransformer:
    network = PredictTransformer(replace(tiny(2), action_head=True, **changes))  # type: ignore[arg-type]
    scatter(network, 0)
    return network.eval()


def noise(seed: int, b: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(b, *shape, generator=generator)


def latents(t: int, b: int = 2) -> torch.Tensor:
    return torch.randn(b, 16, t, 4, 4, generator=torch.Generator().manual_seed(9))


class Exact(PredictTransformer):
    """Knows the actions: the velocity that its head would give is the true one."""

    def __init__(self, truth: torch.Tensor) -> None:
        super().__init__(replace(tiny(2), action_head=True))
        self.truth = truth

    def forward(self, x, timestep, actions=None, text=None, *, action_timestep=None, **options):
        assert (timestep == 0).all()
        assert actions is not None
        assert action_timestep is not None
        level = action_timestep.repeat_interleave(4, dim=1)[..., None]
        return x, (actions - self.truth) / level


def test_inverse_dynamics_integrates_the_actions_velocity_between_clean_frames() -> None:
    truth = torch.randn(2, 8, 2)
    found = infer_actions(Exact(truth), latents(3), SAMPLER, noise(0))
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=0)


def test_a_causal_model_finds_an_action_without_looking_ahead() -> None:
    network, x = model(), latents(4)
    changed = x.clone()
    changed[:, :, 3] += 1
    first, second = (infer_actions(network, given, SAMPLER, noise(0)) for given in (x, changed))
    assert first.shape == (2, 12, 2)
    assert torch.equal(first[:, :8], second[:, :8])
    assert (first[:, 8:] - second[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("text", [False, True])
@torch.no_grad()
def test_a_policy_with_a_cache_equals_one_that_recomputes_everything(text: bool) -> None:
    network = model(window=2, **({"context_dim": 24} if text else {}))
    told = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(5)) if text else None
    sampler = replace(SAMPLER, guidance_scale=2.0, context_noise=0.0)
    context = latents(2)
    actions, made = act(network, context, told, 2, sampler, noise(0))
    assert actions.shape == (2, 8, 2)
    assert torch.equal(made[:, :, :2], context)

    draw = noise(0)
    past = infer_actions(network, context, sampler, draw)
    whole = context
    for _ in range(2):
        x, new = draw((16, 1, 4, 4)), draw((4, 2))
        for level, following in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            frames, t = torch.cat([whole, x], dim=2), whole.shape[2]
            at = torch.cat([torch.zeros(2, t), torch.full((2, 1), level)], dim=1)
            both = [
                network(
                    frames, at, torch.cat([past, new], dim=1), words, action_timestep=at[:, 1:], return_actions=True
                )
                for words in (told, None)
            ]
            scale = 2.0 if text else 0.0
            velocity, of_actions = (two + scale * (one - two) for one, two in zip(*both, strict=True))
            x, new = x + (following - level) * velocity[:, :, -1:], new + (following - level) * of_actions[:, -4:]
        whole, past = torch.cat([whole, x], dim=2), torch.cat([past, new], dim=1)
    torch.testing.assert_close(made, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(actions, past[:, 4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("known", [1, 2])
def test_full_attention_makes_all_frames_and_actions_at_once(known: int) -> None:
    network, context = model(attention="full", condition_mask=True), latents(known)
    actions, made = act(network, context, None, 3, SAMPLER, noise(0))
    assert actions.shape == (2, 12, 2)
    assert torch.equal(made[:, :, :known], context)
    again, _ = act(network, context, None, 3, SAMPLER, noise(0))
    other, _ = act(network, context, None, 3, SAMPLER, noise(1))
    assert torch.equal(actions, again)
    assert not torch.allclose(actions, other, atol=1e-2)


def test_a_shortcut_model_is_told_the_size_of_its_steps() -> None:
    network, told = model(step_size=True), []
    network.register_forward_pre_hook(lambda _, __, options: told.append(options.get("step")), with_kwargs=True)
    act(network, latents(1), None, 1, replace(SAMPLER, method="shortcut", steps=2), noise(0))
    assert [step.unique().tolist() for step in told if step is not None] == [[0.5], [0.5]]


@pytest.fixture(scope="module")
def pipeline() -> PredictPipeline:
    config = PredictConfig(
        latent_channels=4, width=32, blocks=2, heads=2, adaln_rank=8, action_dim=3, action_hidden=16, action_head=True
    )
    network = PredictTransformer(config)
    scatter(network, 0)
    return PredictPipeline(
        network.eval(), tiny_tokenizer(), PredictCheckpoint(height=32, width=32, model=config, sampler=SAMPLER)
    )


def test_a_pipeline_infers_actions_and_acts_row_by_row(pipeline: PredictPipeline) -> None:
    assert isinstance(pipeline, InfersActions)
    assert isinstance(pipeline, Acts)
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pipeline.infer_actions(video, seed=3)
    assert found.shape == (2, 8, 3)
    torch.testing.assert_close(pipeline.infer_actions(video[1:], seed=4), found[1:], atol=1e-4, rtol=0)
    actions, made = pipeline.act(video[:, :, :5], "", 8, seed=3)
    assert actions.shape == (2, 8, 3)
    assert made.shape == (2, 3, 13, 32, 32)
    assert torch.equal(made[:, :, :5], video[:, :, :5])
    alone, _ = pipeline.act(video[1:, :, :5], "", 8, seed=4)
    torch.testing.assert_close(alone, actions[1:], atol=1e-4, rtol=0)


def test_what_a_model_cannot_do_it_says(pipeline: PredictPipeline) -> None:
    video = torch.zeros(1, 3, 5, 32, 32)
    with pytest.raises(WorldloomError, match="multiple of 4"):
        pipeline.act(video, "", 6)
    with pytest.raises(WorldloomError, match="takes no text"):
        pipeline.act(video, "open the door", 4)
    with pytest.raises(WorldloomError, match="no actions between"):
        pipeline.infer_actions(video[:, :, :1])
    plain = PredictTransformer(tiny(2))
    with pytest.raises(WorldloomError, match="does not predict actions"):
        infer_actions(plain, latents(3), SAMPLER, noise(0))
    with pytest.raises(WorldloomError, match="sampled by rectified flow"):
        infer_actions(model(), latents(3), replace(SAMPLER, method="edm_euler", schedule="karras"), noise(0))
