"""A drawn face that face detectors take for one, so that no photograph of a person has to be kept."""

from __future__ import annotations

import cv2
import numpy as np

_FINER = 4  # drawn that much larger


def face(size: int, x: float = 0.5, y: float = 0.45, radius: float = 0.25) -> np.ndarray:
    """uint8 ``(size, size, 3)`` RGB: head and shoulders before a plain wall; place and radius in parts of the size."""
    side = size * _FINER
    picture = np.linspace(90, 170, side)[:, None, None] * np.array([0.8, 1.0, 1.1])
    picture = np.ascontiguousarray(np.broadcast_to(picture, (side, side, 3)).clip(0, 255).astype(np.uint8))
    r = radius * side

    def oval(dx: float, dy: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        centre = (round(x * side + dx * r), round(y * side + dy * r))
        axes = (max(1, round(width * r)), max(1, round(height * r)))
        cv2.ellipse(picture, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)

    skin, shade, hair = (224, 180, 150), (168, 135, 112), (60, 40, 30)
    oval(0, 1.9, 1.5, 0.9, (60, 70, 120))  # shoulders
    oval(0, 1.2, 0.38, 0.5, shade)  # neck
    oval(0, -0.25, 1.0, 1.1, hair)
    oval(0, 0, 0.78, 1.05, skin)
    oval(0, -0.85, 0.8, 0.4, hair)
    for side_of in (-1, 1):
        oval(side_of * 0.8, 0.05, 0.12, 0.22, shade)  # ear
        oval(side_of * 0.32, -0.12, 0.2, 0.11, (245, 245, 245))  # eye
        oval(side_of * 0.32, -0.12, 0.1, 0.1, (70, 50, 40))
        oval(side_of * 0.32, -0.12, 0.05, 0.05, (10, 10, 10))
        oval(side_of * 0.32, -0.32, 0.24, 0.06, hair)  # brow
        oval(side_of * 0.1, 0.28, 0.06, 0.04, (120, 80, 70))  # nostril
    oval(0, 0.1, 0.08, 0.22, (201, 162, 135))  # nose
    oval(0, 0.24, 0.16, 0.08, shade)
    oval(0, 0.55, 0.3, 0.1, (170, 70, 80))  # mouth
    oval(0, 0.55, 0.26, 0.03, (120, 40, 50))
    picture = cv2.GaussianBlur(picture, (0, 0), side / 300)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


def passing_by(frames: int, size: int) -> np.ndarray:
    """uint8 ``(frames, size, size, 3)``: the face moves from left to right."""
    return np.stack([face(size, x=0.35 + 0.3 * t / max(1, frames - 1)) for t in range(frames)])
