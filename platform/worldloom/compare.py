"""Comparing videos: PSNR and SSIM of 8-bit frames, and panels side by side for a person to look at.

Every figure of quality in Worldloom comes from here, so that a tokenizer, a model and a baseline are measured alike.
Letters: b batch, t frames, h w pixels; frames are uint8 ``(b, t, h, w, 3)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError, missing_extra

SSIM_WINDOW = 11
"""Pixels; the smallest frame that SSIM can be taken of."""

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
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise missing_extra("torchmetrics", "eval") from error
    import torch

    if min(truth.shape[2:4]) < SSIM_WINDOW:
        raise WorldloomError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels", got=truth.shape[2:4])
    # (b, t, h, w, 3) -> (b*t, 3, h, w)
    pair = [torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2).float() for x in (made, truth)]
    values = structural_similarity_index_measure(pair[0], pair[1], data_range=255.0, reduction="none")
    assert isinstance(values, torch.Tensor)
    return values.reshape(made.shape[:2]).double().numpy()


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
