"""Motion by stored vectors and by flow: planted shifts, still parts, codecs with vectors and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from curation_videos import write

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span, Verdict
from worldloom_curation.stages.motion_vectors import (
    MotionVectorsConfig,
    MotionVectorsStage,
    of_flow,
    of_vectors,
    patches,
    stored_vectors,
)

VECTOR = np.dtype([(name, np.int32) for name in ("w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")])


def gliding(frames: int = 40, speed: int = 4, height: int = 96, width: int = 160) -> np.ndarray:
    """Smooth random tiles that glide to the left by `speed` pixels a frame."""
    import cv2

    tiles = np.random.default_rng(0).integers(0, 256, (12, 60, 3), np.uint8)
    wall = cv2.resize(tiles, (width * 3, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([wall[:, speed * i : speed * i + width] for i in range(frames)])


def file_source(path: Path) -> Source:
    return Source(path.name, str(path), "a" * 64, "a")


def decided(path: Path, **settings: object) -> tuple[Verdict, dict[str, np.ndarray]]:
    stage = MotionVectorsStage(MotionVectorsConfig(**settings))  # pyright: ignore[reportArgumentType]
    source = file_source(path)
    observer = stage.observer(source, 20.0)
    assert observer is not None
    frames = 0
    for frame in media.iter_frames(path):
        observer.add(Frame(frame))
        frames += 1
    signals = observer.result()
    [verdict] = stage.decide([Span(source, 0, frames, 20.0)], {"a": signals})
    return verdict, signals


@pytest.mark.parametrize(("codec", "stored"), [("h264", True), ("mpeg4", True), ("vp9", False), ("mjpeg", False)])
def test_a_known_shift_is_measured_by_vectors_and_by_flow(tmp_path: Path, codec: str, stored: bool) -> None:
    path = write(tmp_path / "gliding", gliding(), codec)
    verdict, signals = decided(path)
    assert bool(signals["vectors"]) is stored
    assert verdict.kept
    # 4 pixels of 96 + 160. H.264's vectors reach to frames further away, over which things move further.
    low, high = (0.8, 4.0) if codec == "h264" else (0.65, 1.35)
    assert verdict.value is not None
    assert low < verdict.value / (4 / 256) < high
    assert verdict.span.notes["motion_score"]["global_mean"] == verdict.value
    by_flow, _ = decided(path, source="flow")
    assert by_flow.value == pytest.approx(4 / 256, rel=0.2)
    assert verdict.reason == f"it moves by {'its motion vectors' if stored else 'optical flow'}"


def test_a_still_picture_is_dropped_with_every_codec(tmp_path: Path) -> None:
    still = np.repeat(gliding(1), 30, 0)
    for codec in ("h264", "mjpeg"):
        verdict, _ = decided(write(tmp_path / "still", still, codec))
        assert not verdict.kept
        assert (verdict.measure, verdict.threshold) == ("mean motion", 0.00098)
    assert decided(write(tmp_path / "still", still), global_mean=0, patch=0)[0].kept


def test_a_part_that_stands_still_drops_a_large_picture(tmp_path: Path) -> None:
    frames = np.zeros((20, 256, 512, 3), np.uint8) + 90
    frames[:, :, 256:] = gliding(20, 4, 256, 256)
    path = write(tmp_path / "half", frames, "mpeg4")  # H.264 may infer motion for what it skips
    verdict, signals = decided(path)
    assert signals["motion"].shape[1] == 3
    assert (verdict.kept, verdict.measure) == (False, "least motion of a patch")
    assert verdict.reason == "a part of the picture stands still by its motion vectors"
    assert decided(path, patch=0)[0].kept


def test_vectors_are_weighed_by_area_and_two_directions_are_averaged() -> None:
    one = np.array([(16, 16, 8, 8, 12, 16, 4), (16, 8, 24, 4, 40, 0, 4)], VECTOR)
    # |(3, 4)| over 256 pixels and 10 over 128 of a picture of 32 x 32, whose height + width is 64.
    np.testing.assert_allclose(of_vectors(one, 32, 32), [(5 * 256 + 10 * 128) / 1024 / 64] * 2)
    both = np.array([(32, 32, 16, 16, 8, 0, 4), (32, 32, 16, 16, -24, 0, 4)], VECTOR)
    np.testing.assert_allclose(of_vectors(both, 32, 32), [4 / 64] * 2)
    assert not of_vectors(one[:0], 32, 32).any()
    wide = np.array([(16, 16, 300, 8, 8, 0, 4)], VECTOR)
    assert of_vectors(wide, 256, 512).nonzero()[0].tolist() == [0, 2]


def test_flow_is_in_the_unit_of_vectors_at_any_size() -> None:
    flow = np.zeros((144, 256, 2), np.float32)
    flow[..., 0] = 4.0
    np.testing.assert_allclose(of_flow(flow, 720, 1280), [4 / 400] * 11, rtol=1e-6)
    assert [patches(*size) for size in ((96, 160), (720, 1280), (256, 511))] == [(1, 1), (2, 5), (1, 1)]


def test_keyframes_pass_their_turn_on_and_the_window_of_an_episode_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "gliding", gliding())
    source = file_source(path)
    every = list(stored_vectors(source) or ())
    assert len(every) == 40
    assert every[0] is None
    _, signals = decided(path)
    assert signals["at"].tolist() == [1, 10, 20, 30]
    part = Source(source.name, source.path, source.digest, source.key, window=(10, 30))
    assert len(list(stored_vectors(part) or ())) == 20


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError):
        MotionVectorsConfig(rate=0)
