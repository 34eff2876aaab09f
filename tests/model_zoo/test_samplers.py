"""Rectified flow: the sampler undoes the interpolation, and the schedule keeps its ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom_model_zoo.samplers import flow_euler, flow_interpolate, flow_levels, guide, shift_noise_level


@given(steps=st.integers(1, 40), shift=st.floats(0.2, 10))
def test_levels_fall_from_one_to_zero(steps: int, shift: float) -> None:
    levels = flow_levels(steps, shift)
    assert levels[0].item() == pytest.approx(1)
    assert levels[-1] == 0
    assert len(levels) == steps + 1
    assert (levels.diff() < 0).all()


def test_shift_above_one_raises_the_middle() -> None:
    middle = torch.tensor(0.5)
    assert shift_noise_level(middle, 1.0) == 0.5
    assert shift_noise_level(middle, 5.0).item() == pytest.approx(5 / 6)
    assert shift_noise_level(middle, 0.5) < 0.5


@pytest.mark.parametrize("steps", [1, 3])
def test_euler_is_exact_on_straight_paths(steps: int) -> None:
    """With the true velocity, noise - clean, any number of steps lands on the clean sample."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 3, 2, 2, generator=generator).unbind()
    seen: list[float] = []

    def velocity(x: torch.Tensor, level: float) -> torch.Tensor:
        seen.append(level)
        torch.testing.assert_close(x, flow_interpolate(clean, noise, torch.full((2, 3), level)))
        return noise - clean

    clean, noise = clean[:, :, :3].reshape(2, 4, 3, 2, 2), noise[:, :, :3].reshape(2, 4, 3, 2, 2)
    out = flow_euler(velocity, noise, flow_levels(steps, shift=3.0))
    torch.testing.assert_close(out, clean, atol=1e-6, rtol=1e-5)
    assert seen == flow_levels(steps, 3.0)[:-1].tolist()


def test_interpolation_is_per_frame() -> None:
    clean, noise = torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 3, 1, 1)
    out = flow_interpolate(clean, noise, torch.tensor([[0.0, 0.25, 1.0]]))
    assert out.flatten().tolist() == [0.0, 0.25, 1.0]


def test_guidance_convention() -> None:
    conditional, unconditional = torch.tensor(2.0), torch.tensor(1.0)
    assert guide(conditional, unconditional, 1.0) == conditional
    assert guide(conditional, unconditional, 0.0) == unconditional
    assert guide(conditional, unconditional, 3.0) == 4.0
