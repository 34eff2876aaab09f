"""Every sampler's whole trajectory against diffusers' schedulers: each point where the network is asked, and the end.

The network is an analytic function in float64. diffusers rounds schedules and latents to float32 on the way; `doubled`
gives its modules a torch whose float32 is float64, so that what is compared is the method. Schedules are compared
apart, to float32's precision.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from worldloom_model_zoo.samplers import (
    edm_denoiser,
    edm_euler,
    edm_heun,
    edm_sigmas,
    flow_consistency,
    flow_denoiser,
    flow_euler,
    flow_forcing,
    flow_heun,
    flow_levels,
    flow_shortcut,
    flow_unipc,
    guide,
    karras_flow_levels,
    pyramid_levels,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2

TIGHT: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}


def doubled(monkeypatch: pytest.MonkeyPatch, scheduler: type) -> None:
    """Lift the casts to float32 in the scheduler's module."""
    module = __import__(scheduler.__module__, fromlist=["torch"])
    proxy = types.ModuleType("torch")
    proxy.__dict__.update({**torch.__dict__, "float32": torch.float64})
    monkeypatch.setattr(module, "torch", proxy)


def start() -> Tensor:
    return torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Recorder:
    """An analytic velocity, neither linear nor smooth in the level, that keeps every point at which it was asked."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, level: float) -> Tensor:
        self.seen.append(x.clone())
        level = float(level)
        return torch.sin(2 * x) + level**2 * x.roll(1, -1) - np.cos(5 * level)


def agree(ours: tuple[Recorder, Tensor], theirs: tuple[Recorder, Tensor]) -> None:
    """The same points, and they move."""
    assert len(ours[0].seen) == len(theirs[0].seen) > 1
    whole = [torch.stack([*recorder.seen, end]) for recorder, end in (ours, theirs)]
    assert (whole[1][1:] - whole[1][:-1]).flatten(1).std(dim=1).min() > 1e-4
    torch.testing.assert_close(*whole, **TIGHT)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [2, 7])
def test_flow_euler(monkeypatch: pytest.MonkeyPatch, steps: int, shift: float) -> None:
    doubled(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    levels = flow_levels(steps, shift)
    torch.testing.assert_close(levels, scheduler.sigmas, atol=1e-6, rtol=0)
    scheduler.sigmas = levels
    theirs, x = Recorder(), start()
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(theirs(x, float(levels[i])), timestep, x, return_dict=False)[0]
    ours = Recorder()
    agree((ours, flow_euler(ours, start(), levels)), (theirs, x))


def test_flow_heun(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled(monkeypatch, diffusers.FlowMatchHeunDiscreteScheduler)
    scheduler: Any = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    theirs, x = Recorder(), start()
    for i, timestep in enumerate(scheduler.timesteps):
        first_order = scheduler.state_in_first_order
        x = scheduler.step(theirs(x, scheduler.sigmas[i]), timestep, x, return_dict=False)[0]
        assert first_order == bool(i % 2 == 0)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    ours = Recorder()
    agree((ours, flow_heun(ours, start(), levels)), (theirs, x))


def unipc(**options: Any) -> Any:
    """As Cosmos 2.5 and Wan set it up."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2", **options
    )


@pytest.mark.parametrize("steps", [2, 3, 8, 35])
@pytest.mark.parametrize("schedule", ["shift 5", "shift 1", "karras"])
def test_flow_unipc(schedule: str, steps: int) -> None:
    if schedule == "karras":
        scheduler = unipc(use_karras_sigmas=True, sigma_min=0.01, sigma_max=200.0)
        levels = karras_flow_levels(steps, 0.01, 200.0)
    else:
        scheduler = unipc(flow_shift=float(schedule.split()[1]))
        levels = flow_levels(steps, float(schedule.split()[1]), last=1e-3)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(levels, scheduler.sigmas.double(), atol=2e-6, rtol=0)  # they take 1e-6 off a level of 1
    levels = scheduler.sigmas = scheduler.sigmas.double()
    theirs, x = Recorder(), start()
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = i  # integer timesteps of Karras levels coincide, and they look steps up by them
        x = scheduler.step(theirs(x, float(levels[i])), timestep, x, return_dict=False)[0]
    ours = Recorder()
    agree((ours, flow_unipc(ours, start(), levels)), (theirs, x))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 9])
def test_edm_euler_with_its_preconditioning(monkeypatch: pytest.MonkeyPatch, steps: int, sigma_data: float) -> None:
    """Cosmos 1 is this at sigma_data 0.5."""
    doubled(monkeypatch, diffusers.EDMEulerScheduler)
    scheduler: Any = diffusers.EDMEulerScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps)
    sigmas = edm_sigmas(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas, **TIGHT)
    theirs, x = Recorder(), 80 * start()
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(theirs(scaled, timestep), timestep, x, return_dict=False)[0]
    ours = Recorder()
    agree((ours, edm_euler(edm_denoiser(ours, sigma_data), 80 * start(), sigmas)), (theirs, x))


def test_edm_heun() -> None:
    """diffusers' Heun takes the noise prediction (x - D) / sigma and has no preconditioning of its own."""
    scheduler: Any = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    torch.testing.assert_close(sigmas, edm_sigmas(8, float(sigmas[-2]), float(sigmas[0])), atol=0, rtol=1e-5)
    scheduler.sigmas = scheduler.sigmas.double()
    theirs, x = Recorder(), sigmas[0] * start()
    denoise = edm_denoiser(theirs, 0.5)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        x = scheduler.step((x - denoise(x, sigma)) / sigma, timestep, x, return_dict=False)[0]
    ours = Recorder()
    agree((ours, edm_heun(edm_denoiser(ours, 0.5), sigmas[0] * start(), sigmas)), (theirs, x))


def test_predict2_is_flow_euler_on_karras_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers integrates Predict2 in EDM's variable; divided by 1 + sigma that is our flow, step for step."""
    doubled(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    steps = 9
    sigmas = edm_sigmas(steps)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    scheduler.sigmas = sigmas
    theirs, x = Recorder(), 80 * start()
    denoise = flow_denoiser(theirs)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(sigmas[i])
        x = scheduler.step((x - denoise(x, sigma)) / sigma, timestep, x, return_dict=False)[0]
    ours = Recorder()
    end = flow_euler(ours, 80 / 81 * start(), karras_flow_levels(steps, 0.002, 80.0))
    agree((ours, end), (theirs, x))


def test_flow_shortcut() -> None:
    """diffusers calls such a model a flow map."""
    steps = 4
    scheduler: Any = diffusers.FlowMapEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    levels = flow_levels(steps)
    torch.testing.assert_close(levels, scheduler.sigmas.double(), atol=1e-6, rtol=0)
    scheduler.sigmas = levels
    theirs, x = Recorder(), start()
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(theirs(x, float(levels[i])) / (1 + 1 / steps), timestep, x, return_dict=False)[0]
    ours = Recorder()
    end = flow_shortcut(lambda x, level, step: ours(x, level) / (1 + step), start(), steps)
    agree((ours, end), (theirs, x))


def test_flow_consistency(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4))
    levels = scheduler.sigmas = flow_levels(4, 3.0)
    generator = torch.Generator().manual_seed(5)
    theirs, x = Recorder(), start()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = theirs(x, float(levels[i]))
        x = scheduler.step(velocity, timestep, x, generator=generator, return_dict=False)[0]
    again = torch.Generator().manual_seed(5)
    ours = Recorder()
    end = flow_consistency(ours, start(), levels, lambda: torch.randn(x.shape, generator=again, dtype=x.dtype))
    agree((ours, end), (theirs, x))


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_flow_forcing_against_levels_per_token(monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    """diffusers' Euler takes a level per token; a frame here is four of them."""
    doubled(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.2, 5))
    levels = scheduler.sigmas = flow_levels(5, 2.0)
    matrix = pyramid_levels(levels, frames=4, delay=delay)
    noise = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # b, t, n, d

    def velocity(tokens: Tensor, at: Tensor) -> Tensor:
        return torch.sin(2 * tokens) + at[:, :, None, None] * tokens.mean(dim=1, keepdim=True)

    theirs, expected = noise, []
    for row, following in itertools.pairwise(matrix):
        at = row.expand(2, 4)
        per_token = (at * scheduler.config.num_train_timesteps).repeat_interleave(4, dim=1)  # (b, t*n)
        scheduler._step_index = 0
        stepped = scheduler.step(
            velocity(theirs, at).flatten(1, 2), scheduler.timesteps[0], theirs.flatten(1, 2),
            per_token_timesteps=per_token, return_dict=False,
        )[0]  # fmt: skip
        # For levels per token theirs adds (now - next) output, the other sign than ours, and moves every token.
        moved = 2 * theirs - stepped.unflatten(1, (4, 4))
        theirs = torch.where((row != following)[:, None, None], moved, theirs)
        expected.append(theirs)
    seen: list[Tensor] = []

    def watched(x: Tensor, at: Tensor) -> Tensor:
        seen.append(x)
        tokens = x.flatten(3).permute(0, 2, 3, 1)  # (b, d, t, 2, 2) -> (b, t, n, d)
        return velocity(tokens, at.expand(2, 4)).permute(0, 3, 1, 2).unflatten(3, (2, 2))

    x = noise.permute(0, 3, 1, 2).unflatten(3, (2, 2))
    end = flow_forcing(watched, x, matrix)
    ours = torch.stack([*seen[1:], end]).flatten(4).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(ours, torch.stack(expected), **TIGHT)


def test_guidance_conventions_against_diffusers_pipelines() -> None:
    """g of `conditional` is g + 1 of `unconditional`."""
    conditional, unconditional = start(), start().flip(0)
    torch.testing.assert_close(
        guide(conditional, unconditional, 7.0, "conditional"), guide(conditional, unconditional, 8.0), **TIGHT
    )
