"""Camera motion, planted by moving a window over a picture."""

from __future__ import annotations

import numpy as np
import pytest

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span, Verdict
from worldloom_curation.stages.camera import CameraConfig, CameraStage, movement

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")
HEIGHT, WIDTH = 96, 128


def view(
    right: float = 0.0, down: float = 0.0, grow: float = 0.0, turn: float = 0.0, frames: int = 24, shake: float = 0.0
) -> np.ndarray:
    """A camera over a wall of random tiles that is moved every frame: uint8 ``(t, h, w, 3)``.

    Args:
        right, down: shift of the camera, in pixels a frame.
        grow: growth of what is seen, a frame.
        turn: turn of the camera, clockwise, radians a frame.
        shake: pixels it is off its path, another way each frame.
    """
    import cv2

    tiles = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    wall = cv2.GaussianBlur(cv2.resize(tiles, (480, 480), interpolation=cv2.INTER_CUBIC), (0, 0), 1.5)
    rng = np.random.default_rng(1)
    made = []
    for i in range(frames):
        scale, angle = (1 + grow) ** -i, turn * i
        off = rng.uniform(-shake, shake, 2)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        centre = np.array([240 + right * i, 240 + down * i]) + off
        # Where each pixel of the view lies on the wall.
        matrix = np.array([[cos, -sin], [sin, cos]])
        start = centre - matrix @ np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
        made.append(
            cv2.warpAffine(
                wall,
                np.hstack([matrix, start[:, None]]),
                (WIDTH, HEIGHT),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            )
        )
    return np.stack(made)


def verdict_on(frames: np.ndarray, config: CameraConfig | None = None, crf: int = 22) -> Verdict:
    encoded = media.write_video(None, frames, 20, crf=crf)
    assert encoded is not None
    stage = CameraStage(config or CameraConfig())
    observer = stage.observer(FILE, 20.0)
    assert observer is not None
    for frame in media.iter_frames(encoded):
        observer.add(Frame(frame))
    [verdict] = stage.decide([Span(FILE, 0, len(frames), 20.0)], {"a": observer.result()})
    return verdict


@pytest.mark.parametrize(
    ("moved", "label"),
    [
        ({}, "static"),
        ({"right": 1.5}, "pan right"),
        ({"right": -1.5}, "pan left"),
        ({"down": 1.5}, "tilt down"),
        ({"down": -1.5}, "tilt up"),
        ({"grow": 0.01}, "zoom in"),
        ({"grow": -0.01}, "zoom out"),
        ({"turn": 0.01}, "roll right"),
        ({"turn": -0.01}, "roll left"),
    ],
)
def test_a_camera_that_moves_one_way_gets_its_label(moved: dict[str, float], label: str) -> None:
    verdict = verdict_on(view(**moved))
    assert verdict.span.notes["camera"] == [label]
    assert verdict.kept
    if label.startswith("pan"):
        assert verdict.value == pytest.approx(1.5 * 20 / WIDTH, rel=0.1)


def test_two_movements_at_once_get_both_labels_the_faster_first() -> None:
    assert verdict_on(view(right=2.0, down=1.0)).span.notes["camera"] == ["pan right", "tilt down"]


def test_a_thing_that_crosses_a_fixed_view_is_no_camera_motion() -> None:
    frames = view()
    thing = np.random.default_rng(3).integers(0, 256, (10, 8, 3), np.uint8).repeat(5, 0).repeat(5, 1)
    for i, frame in enumerate(frames):
        frame[20:70, 2 * i : 2 * i + 40] = thing
    assert verdict_on(frames).span.notes["camera"] == ["static"]
    assert verdict_on(np.full((24, 96, 128, 3), 90, np.uint8)).span.notes["camera"] == ["static"]


def test_a_shaky_camera_is_named_and_dropped_where_asked() -> None:
    shaky = view(shake=6.0, frames=120)
    verdict = verdict_on(shaky, CameraConfig(drop=("shaky",)))
    assert verdict.span.notes["camera"] == ["shaky"]
    assert not verdict.kept
    assert verdict_on(shaky).kept
    assert "shaky" not in verdict_on(view(right=2.0)).span.notes["camera"]


def test_the_movement_is_fitted_exactly_and_outliers_are_left_out() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (96, 128), np.uint8)
    y, x = np.mgrid[0:96, 0:128].astype(np.float64)
    x, y = x - 63.5, y - 47.5
    flow = np.stack([1.0 + 0.02 * x - 0.01 * y, -2.0 + 0.02 * y + 0.01 * x], -1)
    expected = [1 / 128, -2 / 128, 0.02, 0.01]
    np.testing.assert_allclose(movement(flow, grey), expected, atol=1e-9)
    flow[:40, :60] += 9.0
    np.testing.assert_allclose(movement(flow, grey), expected, atol=2e-4)


def test_a_span_that_is_too_short_has_no_label() -> None:
    assert verdict_on(view(frames=2)).span.notes["camera"] == []


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(WorldloomError, match="no such camera label"):
        CameraConfig(drop=("dolly",))
