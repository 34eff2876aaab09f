"""Objectives: what is trained is what sampling meets, and equal generators give equal losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom import LatentBatch, WorldloomError
from worldloom_finetune.objectives import (
    ObjectiveConfig,
    channel_weights,
    noise_levels,
    rectified_flow_loss,
)
from worldloom_model_zoo.predict.config import tiny
from worldloom_model_zoo.predict.model import PredictTransformer


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
