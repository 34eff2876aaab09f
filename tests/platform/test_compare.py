"""Figures of quality against plain computations of what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest

from worldloom.compare import error_map, flicker, ms_ssim, ms_ssim_scales, ssim
from worldloom.errors import WorldloomError


def videos(size: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth video and a noisy copy, ``(2, 3, h, w, 3)``."""
    random = np.random.default_rng(seed)
    waves = np.sin(np.arange(size[0])[:, None] / 9) * np.cos(np.arange(size[1])[None] / 7)
    shifts = random.uniform(0, 60, (2, 3, 1, 1, 3))
    truth = 100 + 60 * waves[:, :, None] + shifts
    made = truth + random.normal(0, 12, (2, 3, *size, 3))
    return made.clip(0, 255).astype(np.uint8), truth.clip(0, 255).astype(np.uint8)


def blur(plane: np.ndarray) -> np.ndarray:
    """11-pixel Gaussian of sigma 1.5, borders reflected."""
    taps = np.exp(-(np.arange(-5, 6.0) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(plane, [(5, 5) if axis == side else (0, 0) for side in (0, 1)], mode="reflect")
        plane = np.apply_along_axis(np.convolve, axis, padded, taps, "valid")
    return plane


def terms(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean SSIM of a plane, and of its contrast-structure term inside the border (Wang et al. 2004, section III B)."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    contrast = (2 * cov + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * contrast).mean()), float(contrast[5:-5, 5:-5].mean())


def plain_ms_ssim(made: np.ndarray, truth: np.ndarray, scales: int) -> float:
    """Of one frame ``(h, w, 3)``: Wang et al. 2003, equation 7, its luminance term at the coarsest scale."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    weights /= weights.sum()
    a, b = made.astype(float), truth.astype(float)
    value = 1.0
    for scale, weight in enumerate(weights):
        both = np.mean([terms(a[..., c], b[..., c]) for c in range(3)], axis=0)
        value *= both[0 if scale == scales - 1 else 1] ** weight
        h, w = a.shape[0] // 2 * 2, a.shape[1] // 2 * 2
        a, b = (x[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3)) for x in (a, b))
    return value


@pytest.mark.parametrize(("size", "scales"), [((64, 64), 3), ((24, 40), 2), ((100, 128), 4), ((176, 176), 5)])
def test_ms_ssim_is_the_papers(size: tuple[int, int], scales: int) -> None:
    made, truth = videos(size)
    assert ms_ssim_scales(size) == scales
    found = ms_ssim(made, truth)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(plain_ms_ssim(made[1, 2], truth[1, 2], scales), abs=1e-4)
    np.testing.assert_allclose(ms_ssim(truth, truth), 1, atol=1e-6)


def test_one_scale_is_ssim() -> None:
    made, truth = videos((16, 20))
    assert ms_ssim_scales((16, 20)) == 1
    np.testing.assert_allclose(ms_ssim(made, truth), ssim(made, truth), atol=1e-6)


@pytest.mark.parametrize("side", [11, 21, 22, 43, 44, 98, 99, 175, 176])
def test_every_size_from_the_window_on_is_measured(side: int) -> None:
    made, truth = videos((side, side))
    assert 0 < ms_ssim(made[:1, :1], truth[:1, :1])[0, 0] < 1


def test_frames_smaller_than_the_window_are_refused() -> None:
    made, truth = videos((10, 64))
    with pytest.raises(WorldloomError, match="at least 11 pixels"):
        ms_ssim(made, truth)


def test_flicker_counts_errors_that_change() -> None:
    _, truth = videos((16, 16))
    truth = truth.clip(0, 240)
    assert not flicker(truth, truth).any()
    assert not flicker(truth + np.uint8(7), truth).any()
    blinking = truth + np.array([0, 6, 0], np.uint8)[None, :, None, None, None]
    np.testing.assert_allclose(flicker(blinking, truth), np.full((2, 2), 6.0))
    frozen = truth[:, :1].repeat(3, axis=1)
    expected = np.abs(np.diff(truth.astype(float), axis=1)).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(flicker(frozen, truth), expected)
    assert flicker(truth[:, :1], truth[:, :1]).shape == (2, 0)


def test_an_error_map_shows_where_and_how_much() -> None:
    truth = np.zeros((2, 4, 4, 3), np.uint8)
    made = truth.copy()
    made[1, 2, 3] = (9, 0, 0)
    made[0, 0, 0] = 250
    shown = error_map(made, truth, gain=10)
    assert (shown[1, 2, 3] == 30).all()
    assert (shown[0, 0, 0] == 255).all()
    assert np.count_nonzero(shown) == 6
