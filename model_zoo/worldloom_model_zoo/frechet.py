"""Fréchet video distance on an encoder that is there offline: how far the made videos, as a set, are from real ones.

The Fréchet distance of two normal distributions (Dowson and Landau 1982; for images Heusel et al. 2017, for videos
Unterthiner et al. 2018) is ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` over means m and covariances C of features.
Published figures take the features of an I3D network trained on Kinetics. Here a video's features are those of
EfficientNet-Lite0 (1280 numbers a frame, frames enlarged to 128 pixels): their mean over time, which says what is seen,
and the mean size of their change from frame to frame, which says how it moves. **These figures compare with each other,
never with I3D figures**, and only at equal numbers of videos of equal length: with few videos the distance of two sets
of one distribution is far from zero, so that of held-out real videos is reported as the floor.

Letters: n videos, T frames, d features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from worldloom.protocols import SemanticTokenizer

ENCODER = "efficientnet-lite0"
_SIDE = 128  # pixels of the shorter side at which the encoder looks


@dataclass(frozen=True)
class FrechetResult:
    """Distances to real videos, in squared units of the encoder's features; smaller is better."""

    distance: dict[str, float]
    """Kind of video -> distance of all features."""
    appearance: dict[str, float]
    """Of the means over time alone."""
    motion: dict[str, float]
    """Of the changes alone."""
    videos: int
    """Videos of each kind, and real ones they are compared with."""
    frames: int
    """Frames of a video."""
    encoder: str = ENCODER
    notes: tuple[str, ...] = ()


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance (squared 2-Wasserstein) of two normal distributions, means ``(d,)``, covariances ``(d, d)``.

    ``tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)``, and the matrix on the right is symmetric and has no negative
    eigenvalue: eigenvalues of symmetric matrices alone are taken, those that rounding made negative as zero.
    """
    values, vectors = np.linalg.eigh(_symmetric(cov_a))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(_symmetric(root @ cov_b @ root))
    covariance = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product.clip(0)).sum()
    return float(np.square(mean_a - mean_b).sum() + max(covariance, 0.0))


def frechet_of(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features ``(n, d)`` and ``(m, d)``, each of two rows or more.

    Where there are fewer rows than features, both are first written in an orthonormal basis of the space that they and
    the difference of their means span; that changes no distance, and the matrices are of size n + m and not d.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    if len(a) + len(b) + 1 < a.shape[1]:
        spanning = np.concatenate([a - mean_a, b - mean_b, (mean_a - mean_b)[None]])
        basis = np.linalg.svd(spanning, full_matrices=False)[2].T  # (d, n + m + 1)
        a, b = (a - mean_a) @ basis + mean_a @ basis, (b - mean_b) @ basis + mean_b @ basis
        mean_a, mean_b = a.mean(0), b.mean(0)
    return frechet_distance(mean_a, _covariance(a), mean_b, _covariance(b))


def _covariance(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _symmetric(x: np.ndarray) -> np.ndarray:
    return (x + x.T) / 2


class FrameFeatures:
    """EfficientNet-Lite0 on frames.

    Raises:
        WorldloomError: its weights are not installed.
    """

    def __init__(self, device: Any = "cpu") -> None:
        from worldloom_tokenizers.semantic import load_semantic

        self.device = device
        self.encoder: SemanticTokenizer = load_semantic(ENCODER, str(device))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``(n, H, W, 3)`` -> float32 ``(n, 1280)``: the mean of the feature map of each frame."""
        import torch
        import torch.nn.functional as F

        ratio = self.encoder.spatial_ratio
        scale = max(1.0, _SIDE / min(frames.shape[1:3]))
        size = [max(ratio, math.ceil(side * scale / ratio) * ratio) for side in frames.shape[1:3]]
        parts = []
        with torch.no_grad():
            for rows in np.array_split(frames, -(-len(frames) // 64)):
                x = torch.from_numpy(rows).to(self.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
                x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
                parts.append(self.encoder.encode(x.transpose(0, 1)[None])[0].mean((2, 3)).T.cpu().numpy())
        return np.concatenate(parts)


def video_features(frames: FrameFeatures, videos: np.ndarray) -> np.ndarray:
    """uint8 ``(n, T, H, W, 3)``, T >= 2 -> ``(n, 2 d)``: mean over time, then mean absolute change."""
    n, t = videos.shape[:2]
    each = frames(videos.reshape(n * t, *videos.shape[2:])).reshape(n, t, -1)
    return np.concatenate([each.mean(1), np.abs(np.diff(each, axis=1)).mean(1)], axis=1)


@dataclass
class FrechetMeter:
    """Collects videos kind by kind, then measures their distance to real ones."""

    features: FrameFeatures
    made: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, kind: str, videos: np.ndarray) -> None:
        """uint8 ``(n, T, H, W, 3)``."""
        self.made.setdefault(kind, []).append(video_features(self.features, videos))

    def result(self, real: np.ndarray, frames: int, notes: Sequence[str] = ()) -> FrechetResult:
        """Distances of every kind to the real videos whose features ``(m, 2 d)`` are given."""
        sets = {kind: np.concatenate(parts) for kind, parts in self.made.items()}
        half = real.shape[1] // 2
        columns = {"distance": slice(None), "appearance": slice(half), "motion": slice(half, None)}
        found = {
            name: {kind: frechet_of(x[:, part], real[:, part]) for kind, x in sets.items()}
            for name, part in columns.items()
        }
        return FrechetResult(
            found["distance"], found["appearance"], found["motion"], videos=len(real), frames=frames, notes=tuple(notes)
        )
