"""Comparing videos: PSNR, SSIM, MS-SSIM and flicker of 8-bit frames, and panels side by side for a person to look at.

Every figure of quality in Worldloom comes from here, so that a tokenizer, a model and a baseline are measured alike.
Letters: b batch, t frames, h w pixels; frames are uint8 ``(b, t, h, w, 3)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

SSIM_WINDOW = 11
"""Pixels; the smallest frame that SSIM can be taken of."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales of MS-SSIM, the finest first."""

_MSE_FLOOR = 1 / 12  # the mean squared error of rounding to 8 bits
_VIEW = 192  # pixels that a panel has at least
_GREY, _BLUE = (170, 170, 170), (37, 99, 235)


def mse(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each frame over its pixels and channels: ``(b, t)``, in squared grey levels."""
    return np.square(made.astype(np.float32) - truth).mean(axis=(2, 3, 4), dtype=np.float64)


def psnr(error: np.ndarray | float) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of a mean squared error, ``10 log10(255^2 / error)``.

    The error is floored at 1/12, that of rounding, so that two equal frames give 58.9 dB and not infinity.
    """
    return 10 * np.log10(255.0**2 / np.maximum(error, _MSE_FLOOR))


def ssim(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame ``(b, t)``: Wang et al. 2004, 11-pixel Gaussian, borders reflected.

    Raises:
        WorldloomError: torchmetrics is not installed, or frames smaller than the window.
    """
    measure, _, pair = _similarity(made, truth)
    values = measure(*pair, data_range=255.0, reduction="none")
    return values.reshape(made.shape[:2]).double().numpy()


def ms_ssim(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity of each frame ``(b, t)``: Wang et al. 2003, equation 7, 11-pixel Gaussian.

    Borders are reflected for SSIM at the coarsest scale and left out of the contrast at the others (torchmetrics).
    Frames too small for five scales take as many as `ms_ssim_scales` says, their exponents scaled to a sum of one;
    figures of different numbers of scales do not compare.

    Raises:
        WorldloomError: as `ssim`.
    """
    _, measure, pair = _similarity(made, truth)
    weights = MS_SSIM_WEIGHTS[: ms_ssim_scales(truth.shape[2:4])]
    betas = tuple(weight / sum(weights) for weight in weights)
    values = measure(*pair, data_range=255.0, reduction="none", betas=betas)
    return values.reshape(made.shape[:2]).double().numpy()


def ms_ssim_scales(size: Sequence[int]) -> int:
    """Scales that `ms_ssim` takes of frames of ``size = (h, w)``, 1 to 5: 3 at 64 pixels, 4 at 128, 5 from 176 on.

    The window must fit into the coarsest; torchmetrics wants it to fit into ``1 / (scales - 1)^2`` of the frame too.
    """
    side = min(size)
    fit = [
        scales
        for scales in range(1, len(MS_SSIM_WEIGHTS) + 1)
        if side >= SSIM_WINDOW * max(2 ** (scales - 1), (scales - 1) ** 2)
    ]
    return max(fit, default=1)


def _similarity(made: np.ndarray, truth: np.ndarray) -> tuple[Any, Any, list[Tensor]]:
    """SSIM and MS-SSIM of torchmetrics, and both videos as they take them, ``(b*t, 3, h, w)``."""
    try:
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure,
            structural_similarity_index_measure,
        )
    except ImportError as error:
        raise missing_extra("torchmetrics", "eval") from error
    import torch

    if min(truth.shape[2:4]) < SSIM_WINDOW:
        raise WorldloomError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels", got=truth.shape[2:4])
    pair = [torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2).float() for x in (made, truth)]
    return structural_similarity_index_measure, multiscale_structural_similarity_index_measure, pair


def flicker(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How wrongly each frame follows the one before it: ``(b, t-1)``, in grey levels, 0 where motion is exact.

    The mean over pixels and channels of ``|(made[t+1] - made[t]) - (truth[t+1] - truth[t])|``. An error that stands
    still does not count; one that comes and goes does.
    """
    error = made.astype(np.int16) - truth
    return np.abs(np.diff(error, axis=1)).mean(axis=(2, 3, 4), dtype=np.float64)


def error_map(made: np.ndarray, truth: np.ndarray, gain: int = 4) -> np.ndarray:
    """Where two videos differ: their mean absolute difference over channels times ``gain``, grey, black for none.

    Args:
        made, truth: uint8 ``(t, h, w, 3)``; so is the result.
    """
    error = np.abs(made.astype(np.int16) - truth).mean(axis=-1, keepdims=True) * gain
    return error.clip(0, 255).astype(np.uint8).repeat(3, axis=-1)


def side_by_side(panels: Sequence[np.ndarray], given: int = 0, fps: float = 8.0) -> bytes:
    """MP4 of videos next to each other, enlarged by whole numbers until each has 192 pixels; browsers play it.

    Args:
        panels: uint8 ``(t, h, w, 3)``, all of one shape.
        given: a bar above is grey over this many first frames and blue over the rest; 0 leaves the bar out.
    """
    scale = max(1, math.ceil(_VIEW / min(panels[0].shape[1:3])))
    large = [panel.repeat(scale, axis=1).repeat(scale, axis=2) for panel in panels]
    frames, height = large[0].shape[:2]
    parts = [large[0]]
    for panel in large[1:]:
        parts += [np.full((frames, height, 8, 3), 255, np.uint8), panel]
    whole = np.concatenate(parts, axis=2)
    if given:
        bar = np.empty((frames, 8, whole.shape[2], 3), np.uint8)
        bar[:given], bar[given:] = _GREY, _BLUE
        whole = np.concatenate([bar, whole], axis=1)
    whole = whole[:, : whole.shape[1] // 2 * 2, : whole.shape[2] // 2 * 2]  # 4:2:0 has even sizes
    data = media.write_video(None, whole, fps, crf=20)
    assert data is not None
    return data
