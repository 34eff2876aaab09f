"""Fréchet distance: closed forms, an independent matrix square root, few rows of many features, and its features."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from worldloom_model_zoo.frechet import (
    FrameFeatures,
    FrechetMeter,
    frechet_distance,
    frechet_of,
    video_features,
)


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_gaussians_with_common_axes_have_a_closed_form() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2, in any rotated basis."""
    s1, s2 = np.array([1.0, 2.0, 0.0, 3.0]), np.array([2.0, 0.5, 1.0, 3.0])
    m1, m2 = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, -1.0])
    q = rotation(4, 0)
    found = frechet_distance(q @ m1, q @ np.diag(s1**2) @ q.T, q @ m2, q @ np.diag(s2**2) @ q.T)
    assert found == pytest.approx((1 + 4 + 16) + (1 + 2.25 + 1 + 0), rel=1e-12)


def test_it_agrees_with_a_general_matrix_square_root() -> None:
    """scipy's sqrtm of the product, which is not symmetric."""
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(1)
    a, b = random.normal(size=(40, 6)) @ random.normal(size=(6, 6)), random.normal(size=(50, 6)) * 2 + 1
    c1, c2 = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(c1 @ c2)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2 - 2 * root.real)
    assert frechet_distance(a.mean(0), c1, b.mean(0), c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_of(a, b) == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 5))
def test_few_rows_of_many_features_give_what_the_full_matrices_give(n: int, m: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(n, 30)), random.normal(size=(m, 30)) + 0.3
    full = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert frechet_of(a, b) == pytest.approx(full, rel=1e-6, abs=1e-6)
    assert frechet_of(b, a) == pytest.approx(full, rel=1e-6, abs=1e-6)
    assert frechet_of(a, a) == pytest.approx(0, abs=1e-6)


def test_samples_of_gaussians_come_close_to_their_true_distance() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (20_000, 3)), random.normal(0.5, 2, (20_000, 3))
    assert frechet_of(a, b) == pytest.approx(3 * 0.25 + 3 * 1.0, rel=0.03)


def test_appearance_and_motion_are_told_apart() -> None:
    """Still copies of real videos look right and do not move; other worlds look wrong."""
    videos = np.stack([tiny_models.moving_square(6, seed) for seed in range(12)])
    meter = FrechetMeter(FrameFeatures())
    still = np.repeat(videos[:6, :1], 6, axis=1)
    noise = np.random.default_rng(0).integers(0, 256, videos[:6].shape, dtype=np.uint8)
    for kind, made in (("real", videos[:6]), ("still", still), ("noise", noise)):
        meter.add(kind, made)
    real = video_features(meter.features, videos[6:])
    assert real.shape == (6, 2560)
    result = meter.result(real, frames=6)
    assert result.videos == 6
    assert result.motion["real"] < result.motion["still"] / 2
    assert result.distance["real"] < result.distance["still"] < result.distance["noise"]
    assert result.distance["noise"] > 3 * result.distance["real"]
