"""Samplers as pure functions of a network, a start and a schedule.

Two parameterisations of the same path from noise to data:

- **Rectified flow** (Liu et al. 2022; Lipman et al. 2022): x_s = (1 - s) clean + s noise, dx/ds = noise - clean, the
  velocity. The noise level s runs from 1 down to 0.
- **EDM** (Karras et al. 2022): x_sigma = clean + sigma noise, dx/dsigma = (x - D(x, sigma)) / sigma with a denoiser D.
  With s = sigma / (1 + sigma) and x_s = x_sigma / (1 + sigma) it is the same path.

A schedule is a 1-D tensor of falling noise levels with the end, 0, included: n steps are n + 1 levels. Schedules are
float64 unless asked otherwise; steps are computed in the latents' own dtype with float64 coefficients. Nothing here
draws noise: it is given, or drawn by a function that is given.
Letters: b batch, c channels, t frames, h w size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(latents, noise level) -> noise - clean, of the latents' shape."""
Denoiser = Callable[[Tensor, float], Tensor]
"""(latents, sigma) -> the expected clean latents."""


# -- schedules ---------------------------------------------------------------------------------------------------------


def shift_noise_level(s: Tensor, shift: float) -> Tensor:
    """``shift s / (1 + (shift - 1) s)`` (Esser et al. 2024, eq. 23): 0 and 1 stay; shift > 1 moves the middle up."""
    return shift * s / (1 + (shift - 1) * s)


def flow_levels(
    steps: int,
    shift: float = 1.0,
    *,
    first: float = 1.0,
    last: float = 0.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``steps`` evenly spaced levels from ``first`` on towards ``last``, ``last`` left out, shifted; then 0.

    Wan and Cosmos-Predict2.5 go from 0.999 to 0 in their authors' code, from 1 to 0.001 in diffusers.
    """
    levels = torch.linspace(first, last, steps + 1, device=device, dtype=dtype)[:-1]
    return torch.cat([shift_noise_level(levels, shift), levels.new_zeros(1)])


def edm_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``steps`` sigmas from ``sigma_max`` to ``sigma_min``, both included, then 0 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps, device=device, dtype=dtype)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (top + ramp * (bottom - top)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def karras_flow_levels(
    steps: int,
    sigma_min: float = 0.01,
    sigma_max: float = 200.0,
    rho: float = 7.0,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`edm_sigmas` as flow levels, s = sigma / (1 + sigma): ``steps`` calls of the network.

    The defaults are Cosmos-Predict2.5's post-trained 2B, whose own "35 steps" are 36 calls; Predict2 uses 0.002 and 80.
    """
    sigmas = edm_sigmas(steps, sigma_min, sigma_max, rho, device=device, dtype=dtype)
    return sigmas / (1 + sigmas)


def pyramid_levels(levels: Tensor, frames: int, delay: int) -> Tensor:
    """A matrix of levels ``(rows, frames)`` for `flow_forcing`: frame k goes down ``levels`` ``delay * k`` rows later.

    With n = len(levels) - 1: delay 0 denoises all frames together, n one after the other, and between them a pyramid in
    which about n / delay frames are half done at any time (Chen et al. 2024, section 3; Ruhe et al. 2024).
    """
    last = len(levels) - 1
    row = torch.arange(last + delay * (frames - 1) + 1, device=levels.device)
    index = row[:, None] - delay * torch.arange(frames, device=levels.device)[None, :]
    return levels[index.clamp(0, last)]


# -- noise and guidance ------------------------------------------------------------------------------------------------


def flow_interpolate(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """``(b, c, t, h, w)`` at per-frame noise level ``(b, t)``."""
    level = level[:, None, :, None, None].to(clean.dtype)
    return (1 - level) * clean + level * noise


def guide(conditional: Tensor, unconditional: Tensor, scale: float, convention: str = "unconditional") -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022); ``convention`` says to what the scaled difference is added.

    ``unconditional``: ``uncond + scale (cond - uncond)``, where 1 is off. ``conditional``: ``cond + scale (cond -
    uncond)``, where 0 is off: NVIDIA's for Cosmos, and diffusers' for Cosmos 2 and later. Its 7 is 8 in the other one.
    """
    assert convention in ("unconditional", "conditional"), convention
    return (conditional if convention == "conditional" else unconditional) + scale * (conditional - unconditional)


# -- ordinary differential equations -----------------------------------------------------------------------------------


def _euler(slope: Callable[[Tensor, float], Tensor], x: Tensor, points: list[float]) -> Tensor:
    for point, following in itertools.pairwise(points):
        x = x + (following - point) * slope(x, point)
    return x


def _heun(slope: Callable[[Tensor, float], Tensor], x: Tensor, points: list[float]) -> Tensor:
    """The mean of the slopes at both ends of a step; a step to 0 is Euler's, for the slope there is not defined."""
    for point, following in itertools.pairwise(points):
        before = slope(x, point)
        there = x + (following - point) * before
        x = there if following == 0 else x + (following - point) * (before + slope(there, following)) / 2
    return x


def flow_euler(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """Euler's method along ``levels`` (from `flow_levels`); ``velocity(x, level)`` sees x at that noise level."""
    return _euler(velocity, noise, levels.tolist())


def flow_heun(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """Heun's method, second order: two calls a step, one for the last."""
    return _heun(velocity, noise, levels.tolist())


def _log_snr(points: list[float]) -> list[float]:
    """Half log signal-to-noise ratios, lambda = ln((1 - s) / s), of noise levels; infinite at 0 and 1."""
    return [math.inf if s == 0 else -math.inf if s >= 1 else math.log((1 - s) / s) for s in points]


def flow_ab2(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """The exponential Adams-Bashforth method of order 2 (Zhang, Song and Chen 2023, arXiv:2308.02157), one call a step.

    Cosmos-Predict2 calls it 2ab. In lambda = ln((1 - s) / s) the clean prediction is taken for the straight line
    through the two last ones, for which the flow is solved exactly. The first step and one to 0 take it for constant.
    For sigmas of EDM, s = sigma / (1 + sigma), lambda is -ln sigma, and ``noise`` is their first latents divided by
    1 + sigma.
    """
    points = levels.tolist()
    log_snr = _log_snr(points)
    x, previous = noise, None
    for i, (level, following) in enumerate(itertools.pairwise(points)):
        clean = x - level * velocity(x, level)
        h = log_snr[i + 1] - log_snr[i]
        grown = math.expm1(-h)  # negative
        moved = following / level * x - (1 - following) * grown * clean
        if previous is not None and following > 0:
            moved = moved + (1 - following) * (h + grown) / (log_snr[i] - log_snr[i - 1]) * (clean - previous)
        x, previous = moved, clean
    return x


def flow_unipc(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """UniPC of order 2 in its B2(h) variant, predicting data (Zhao et al. 2023, algorithm 8), one call a step.

    In the half log signal-to-noise ratio lambda = ln((1 - s) / s) the clean prediction m(lambda) is extrapolated from
    the two last ones; when the next one is there the step is corrected with it. First and last step are of order 1. A
    level of exactly 1 is taken as the limit, lambda = -inf.
    """
    points = levels.tolist()
    log_snr = _log_snr(points)
    steps = len(points) - 1
    x, previous = noise, noise  # previous: the corrected latents from which the last step was taken
    cleans: list[Tensor] = []  # predictions at the points so far; no more than the last two are read
    order = 0
    for i in range(steps):
        clean = x - points[i] * velocity(x, points[i])
        if i:
            x = _unipc_step(previous, points, log_snr, i - 1, cleans, order, clean)
        cleans = [*cleans[-1:], clean]
        order = min(2, i + 1, steps - i)
        previous = x
        x = _unipc_step(x, points, log_snr, i, cleans, order)
    return x


def _unipc_step(
    x: Tensor,
    points: list[float],
    log_snr: list[float],
    i: int,
    cleans: list[Tensor],
    order: int,
    reached: Tensor | None = None,
) -> Tensor:
    """From point i to i + 1; ``cleans[-1]`` is the prediction at i. Given the one ``reached`` at i + 1, corrected."""
    base, alpha = cleans[-1], 1 - points[i + 1]
    h = log_snr[i + 1] - log_snr[i]
    grown = math.expm1(-h)  # B2(h), negative
    moved = points[i + 1] / points[i] * x - alpha * grown * base
    ratio = (log_snr[i - 1] - log_snr[i]) / h if order == 2 else 0.0  # below 0; -inf where point i - 1 is pure noise
    if reached is None:
        return moved if order == 1 else moved - alpha * grown * 0.5 * (cleans[-2] - base) / ratio
    if order == 1:
        return moved - alpha * grown * 0.5 * (reached - base)
    # The weights solve rho_1 + rho_2 = b_1, ratio rho_1 + rho_2 = b_2 (eq. 11 of the paper for p = 2).
    phi = grown / -h - 1
    b_1 = phi / grown
    b_2 = 2 * (phi / -h - 0.5) / grown
    rho_1 = (b_2 - b_1) / (ratio - 1)
    return moved - alpha * grown * (rho_1 * (cleans[-2] - base) / ratio + (b_1 - rho_1) * (reached - base))


def edm_denoiser(network: Callable[[Tensor, float], Tensor], sigma_data: float) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1).

    Cosmos-Predict1 has sigma_data 0.5. Its latents are of that deviation too: multiply unit ones by it.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        whole = sigma**2 + sigma_data**2
        scaled = network(x / whole**0.5, math.log(sigma) / 4)
        return sigma_data**2 / whole * x + sigma * sigma_data / whole**0.5 * scaled

    return denoise


def flow_denoiser(velocity: Velocity) -> Denoiser:
    """The denoiser of a flow model: with s = sigma / (1 + sigma), c_in = c_skip = 1 - s and c_out = -s (Predict2)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        s = sigma / (1 + sigma)
        scaled = (1 - s) * x
        return scaled - s * velocity(scaled, s)

    return denoise


def _edm_slope(denoise: Denoiser) -> Callable[[Tensor, float], Tensor]:
    return lambda x, sigma: (x - denoise(x, sigma)) / sigma


def edm_euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's method along ``sigmas`` from ``x``, noise of deviation ``sigmas[0]``."""
    return _euler(_edm_slope(denoise), x, sigmas.tolist())


def edm_heun(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's method, deterministic (Karras et al. 2022, algorithm 1): two calls a step, one for the last."""
    return _heun(_edm_slope(denoise), x, sigmas.tolist())


# -- few steps ---------------------------------------------------------------------------------------------------------


def flow_shortcut(
    velocity: Callable[[Tensor, float, float], Tensor], noise: Tensor, steps: int, start: float = 1.0
) -> Tensor:
    """A shortcut model (Frans et al. 2024): ``velocity(x, level, step)`` is told how far the step goes, at once.

    Such models know steps of 1, 1/2, 1/4, ...: use ``start / steps`` among them.
    """
    x, step = noise, start / steps
    for index in range(steps):
        x = x - step * velocity(x, start - index * step, step)
    return x


def flow_consistency(velocity: Velocity, noise: Tensor, levels: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to clean, renoise to the next level, repeat.

    ``draw()`` gives fresh noise of the latents' shape.
    """
    x, points = noise, levels.tolist()
    for level, following in itertools.pairwise(points):
        clean = x - level * velocity(x, level)
        x = clean if following == 0 else (1 - following) * clean + following * draw()
    return x


# -- a level of its own for each frame ---------------------------------------------------------------------------------


def flow_forcing(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, matrix: Tensor) -> Tensor:
    """Diffusion forcing (Chen et al. 2024): Euler's method where every frame goes down its own column of ``matrix``.

    Args:
        velocity: sees ``(b, c, t, h, w)`` and the levels ``(t,)`` of its frames.
        noise: ``(b, c, t, h, w)``.
        matrix: ``(rows, t)``, no column rising, e.g. from `pyramid_levels`.
    """
    x = noise
    for levels, following in itertools.pairwise(matrix):
        change = (following - levels).to(x)[:, None, None]
        x = x + change * velocity(x, levels)
    return x


def flow_rolling(
    velocity: Callable[[Tensor, Tensor, int], Tensor],
    draw: Callable[[], Tensor],
    levels: Tensor,
    delay: int,
    frames: int,
) -> Iterator[Tensor]:
    """Rolling diffusion (Ruhe et al. 2024): the pyramid of `pyramid_levels` with only its half-done frames in memory.

    A frame enters as pure noise every ``delay`` rows and leaves clean, so a video of any length costs about
    ``len(levels) / delay`` frames of memory. The window fills up over the first frames.

    Args:
        velocity: sees the window ``(b, c, k, h, w)``, its levels ``(k,)`` and the index of its first frame.
        draw: noise of the next frame, ``(b, c, 1, h, w)``.
        levels: falling, from pure noise to 0.
        delay: rows between two frames, 1 to ``len(levels) - 1``.
        frames: how many frames there are.

    Yields:
        clean frames ``(b, c, 1, h, w)`` in order.
    """
    last = len(levels) - 1
    assert 1 <= delay <= last, delay
    window = draw()
    row, first, entered = 0, 0, 1
    while first < frames:
        if row == delay * entered and entered < frames:
            window = torch.cat([window, draw()], dim=2)
            entered += 1
        index = row - delay * torch.arange(first, entered, device=levels.device)
        now = levels[index]
        change = (levels[index + 1] - now).to(window)[:, None, None]
        window = window + change * velocity(window, now, first)
        row += 1
        if row - delay * first == last:
            yield window[:, :, :1]
            window = window[:, :, 1:]
            first += 1
            if not window.shape[2] and first < frames:  # the next one enters only now
                window = draw()
                entered += 1
