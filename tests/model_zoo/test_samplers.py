"""Samplers on paths whose end is known, the order of their error, and schedules that keep their ends.

Whole trajectories against diffusers: tests/parity/test_samplers_diffusers.py.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worldloom_model_zoo.samplers import (
    edm_euler,
    edm_heun,
    edm_sigmas,
    flow_ab2,
    flow_consistency,
    flow_denoiser,
    flow_euler,
    flow_forcing,
    flow_heun,
    flow_interpolate,
    flow_levels,
    flow_rolling,
    flow_shortcut,
    flow_unipc,
    guide,
    karras_flow_levels,
    pyramid_levels,
    shift_noise_level,
)


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
    assert guide(conditional, unconditional, 0.0, "conditional") == conditional
    assert guide(conditional, unconditional, 2.0, "conditional") == 4.0


def gaussian(deviation: float = 0.3) -> tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor], Tensor]]:
    """The exact velocity where data is normal of this deviation, and the exact end of the path from noise x."""

    def velocity(x: Tensor, s: float) -> Tensor:
        whole = (1 - s) ** 2 * deviation**2 + s**2  # variance of x_s; clean and noise given x_s are linear in it
        return (s - (1 - s) * deviation**2) / whole * x

    return velocity, lambda x: deviation * x


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 4, 2, 2)), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("sampler", "order"), [(flow_euler, 1), (flow_heun, 2), (flow_unipc, 2)])
def test_the_error_falls_with_the_order_of_the_method(sampler: Callable[..., Tensor], order: int) -> None:
    velocity, end = gaussian()
    x = noise()
    errors = [(sampler(velocity, x, flow_levels(n)) - end(x)).abs().max().item() for n in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.8 * 2**order
    assert errors[-1] < (0.02 if order == 1 else 2e-4)


@pytest.mark.parametrize("sampler", [edm_euler, edm_heun])
def test_edm_samplers_end_where_the_flow_ends(sampler: Callable[..., Tensor]) -> None:
    velocity, end = gaussian()
    x, sigmas = noise(), edm_sigmas(120, 0.002, 500.0)
    made = sampler(flow_denoiser(velocity), float(sigmas[0]) * x, sigmas)
    torch.testing.assert_close(made, end(x), atol=0.04 if sampler is edm_euler else 3e-3, rtol=0)


def test_adams_bashforth_is_of_order_two_where_steps_in_lambda_shrink() -> None:
    velocity, end = gaussian()
    errors = []
    for steps in (64, 128, 256):
        levels = karras_flow_levels(steps, 0.002, 80.0)
        top = float(levels[0])
        spread = ((1 - top) ** 2 * 0.3**2 + top**2) ** 0.5
        errors.append((flow_ab2(velocity, spread * noise(), levels) - end(noise())).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.8 * 4
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("sampler", [flow_ab2, flow_unipc])
def test_a_level_of_one_is_taken_as_the_limit(sampler: Callable[..., Tensor]) -> None:
    velocity, _ = gaussian()
    x = noise()
    exact = sampler(velocity, x, flow_levels(8))
    near = sampler(velocity, x, flow_levels(8, first=1 - 1e-9))
    assert exact.isfinite().all()
    torch.testing.assert_close(exact, near, atol=1e-4, rtol=0)  # it is approached with 1 / lambda


@pytest.mark.parametrize("steps", [2, 3, 12])
def test_adams_bashforth_solves_edms_equation_for_a_straight_prediction(steps: int) -> None:
    """In EDM's variables, with lambda = -ln sigma: dx/dlambda = D - x (Zhang et al. 2023). D is the line through the
    two last predictions, and the integral over a step is taken by Gauss-Legendre quadrature. Predict2's levels, and its
    last call, whose prediction is the result.
    """
    seen: list[Tensor] = []

    def velocity(x: Tensor, s: float) -> Tensor:
        seen.append(x)
        return torch.sin(2 * x) + s**2 * x.roll(1, -1) - np.cos(5 * s)

    made = flow_ab2(velocity, 80 / 81 * noise(), karras_flow_levels(steps, 0.002, 80.0))
    ours, seen[:] = [*seen, made], []

    sigmas = edm_sigmas(steps, 0.002, 80.0)[:-1].tolist()
    nodes, weights = np.polynomial.legendre.leggauss(40)
    denoise, x, before = flow_denoiser(velocity), 80 * noise(), None
    for sigma, following in itertools.pairwise(sigmas):
        clean, here, there = denoise(x, sigma), -np.log(sigma), -np.log(following)
        slope = 0 if before is None else (clean - before[1]) / (here - before[0])
        x = x * following / sigma
        for node, weight in zip(nodes, weights, strict=True):
            at = here + (there - here) * (node + 1) / 2
            x = x + (there - here) / 2 * weight * np.exp(at - there) * (clean + (at - here) * slope)
        before = (here, clean)
    end = denoise(x, sigmas[-1])
    assert len(ours) == len(seen) + 1 == steps + 1
    torch.testing.assert_close(torch.stack(ours), torch.stack([*seen, end]), atol=1e-9, rtol=1e-9)


@given(steps=st.integers(1, 40), top=st.floats(1, 300), bottom=st.floats(1e-3, 0.5))
def test_karras_levels_fall_within_the_flow(steps: int, top: float, bottom: float) -> None:
    levels = karras_flow_levels(steps, bottom, top)
    assert len(levels) == steps + 1
    assert levels[0].item() == pytest.approx(top / (1 + top))
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_shortcut_goes_the_whole_step_it_tells_the_model() -> None:
    """A model that knows the mean velocity over any step lands on the end in any number of steps."""
    deviation = 0.3
    end = gaussian(deviation)[1]

    def mean_velocity(x: Tensor, level: float, step: float) -> Tensor:
        def spread(s: float) -> float:
            return ((1 - s) ** 2 * deviation**2 + s**2) ** 0.5

        return (x - x * spread(level - step) / spread(level)) / step

    for steps in (1, 2, 4):
        torch.testing.assert_close(flow_shortcut(mean_velocity, noise(), steps), end(noise()), atol=1e-9, rtol=0)


def test_consistency_sampling_renoises_between_its_jumps() -> None:
    """With straight paths to a point every jump is exact, and what was drawn shows at the levels between."""
    clean, drawn = noise(), noise().flip(0)
    seen: list[Tensor] = []

    def velocity(x: Tensor, level: float) -> Tensor:
        seen.append(x)
        return (x - clean) / level

    levels = flow_levels(3)
    torch.testing.assert_close(flow_consistency(velocity, noise(), levels, lambda: drawn), clean, atol=1e-9, rtol=0)
    torch.testing.assert_close(seen[1], (1 - levels[1]) * clean + levels[1] * drawn, atol=1e-9, rtol=0)


def test_pyramid_is_joint_and_one_after_the_other_at_its_ends() -> None:
    levels = flow_levels(4)
    assert torch.equal(pyramid_levels(levels, 3, 0), levels[:, None].expand(-1, 3))
    turns = pyramid_levels(levels, 3, 4)
    assert turns.shape == (13, 3)
    assert ((turns > 0) & (turns < 1)).sum(dim=1).max() == 1
    slanted = pyramid_levels(levels, 6, 1)
    assert ((slanted > 0) & (slanted < 1)).sum(dim=1).max() == 3
    assert (slanted.diff(dim=0) <= 0).all()
    assert (slanted[0] == 1).all()
    assert (slanted[-1] == 0).all()


@pytest.mark.parametrize("delay", [1, 2, 3, 5])
def test_rolling_gives_what_forcing_gives_with_a_window_in_memory(delay: int) -> None:
    """A causal velocity: a frame's depends on its own past, as a causal network's does, and on nothing that follows."""
    levels, frames = flow_levels(5, 2.0), 9
    x = noise(2, 3, frames, 2, 2)
    index = iter(range(frames))
    done: list[Tensor] = []

    def own(x: Tensor, levels: Tensor, past: Tensor) -> Tensor:
        return torch.sin(2 * x) + levels[:, None, None] * x + past

    def before(whole: Tensor) -> Tensor:
        """The sum of all earlier frames."""
        return whole.cumsum(dim=2) - whole

    def windowed(window: Tensor, at: Tensor, first: int) -> Tensor:
        assert window.shape[2] <= -(-5 // delay)
        assert len(done) == first
        whole = torch.cat([*done, window], dim=2)
        return own(window, at, before(whole)[:, :, first:])

    rolling = flow_rolling(windowed, lambda: x[:, :, (i := next(index)) : i + 1], levels, delay, frames)
    done.extend(rolling)
    expected = flow_forcing(lambda x, at: own(x, at, before(x)), x, pyramid_levels(levels, frames, delay))
    torch.testing.assert_close(torch.cat(done, dim=2), expected, atol=1e-9, rtol=0)


def test_forcing_leaves_frames_alone_whose_level_stays() -> None:
    matrix = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.3]])
    x = noise(1, 2, 3, 2, 2)
    made = flow_forcing(lambda x, at: x * 7 + at[:, None, None], x, matrix)
    assert torch.equal(made[:, :, 0], x[:, :, 0])
    assert not torch.equal(made[:, :, 1:], x[:, :, 1:])
