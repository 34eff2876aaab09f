from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from curation_videos import scene

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages.caption import CaptionConfig, CaptionStage, fill, frequent_actions, words
from worldloom_curation.stages.duplicates import DuplicatesConfig, DuplicatesStage
from worldloom_curation.stages.motion import MotionConfig, MotionStage, motion
from worldloom_curation.stages.write import WriteConfig, cut_arrays, stored_size

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")


def signals_of(stage: MotionStage | DuplicatesStage, frames: np.ndarray, fps: float = 20.0) -> dict[str, np.ndarray]:
    observer = stage.observer(FILE, fps)
    assert observer is not None
    for frame in frames:
        observer.add(Frame(frame))
    return observer.result()


def measured(frames: np.ndarray, fps: float = 20.0) -> float:
    stage = MotionStage(MotionConfig())
    return motion(signals_of(stage, frames, fps), 0, len(frames))


def test_motion_of_a_still_is_zero_and_of_a_moving_picture_is_not() -> None:
    moving = scene(1, 40)
    assert measured(np.repeat(moving[:1], 40, 0)) == 0.0
    assert measured(moving) > 2.0


def test_motion_is_the_mean_difference_over_the_gap() -> None:
    # Grey levels that rise by one a frame; 0.25 s at 20 fps is 5 frames.
    frames = np.stack([np.full((64, 64, 3), 50 + i, np.uint8) for i in range(30)])
    assert measured(frames) == 5.0


def test_motion_hardly_depends_on_the_frame_rate() -> None:
    fast = scene(3, 120, speed=1)
    assert measured(fast, 40.0) == pytest.approx(measured(fast[::2], 20.0), rel=0.05)


def test_the_default_threshold_drops_an_encoded_still_and_keeps_a_small_moving_thing() -> None:
    background = scene(5, 1, 240, 320)[0]
    still = np.repeat(background[None], 50, 0)
    ball = still.copy()
    for i, frame in enumerate(ball):
        frame[100:124, 4 * i : 4 * i + 24] = (255, 40, 40)
    stage = MotionStage(MotionConfig())
    verdicts = []
    for frames in (still, ball):
        encoded = media.write_video(None, frames, 20, crf=30)
        assert encoded is not None
        signals = signals_of(stage, media.read_frames(encoded))
        verdicts += stage.decide([Span(FILE, 0, len(frames), 20.0)], {"a": signals})
    assert [verdict.kept for verdict in verdicts] == [False, True]


def test_a_span_shorter_than_the_gap_counts_as_still() -> None:
    signals = signals_of(MotionStage(MotionConfig()), scene(1, 40))
    assert motion(signals, 0, 5) == 0.0
    assert motion(signals, 0, 6) > 0.0


def test_the_second_of_equal_spans_is_dropped_and_named() -> None:
    stage = DuplicatesStage(DuplicatesConfig())
    frames = scene(1, 20)
    other = Source("b.mkv", "/b.mkv", "b" * 64, "b")
    signals = {"a": signals_of(stage, np.concatenate([frames, frames])), "b": signals_of(stage, frames)}
    spans = [Span(FILE, 0, 20, 20.0), Span(FILE, 20, 40, 20.0), Span(other, 0, 20, 20.0), Span(other, 0, 19, 20.0)]
    verdicts = stage.decide(spans, signals)
    assert [verdict.kept for verdict in verdicts] == [True, False, False, True]
    assert verdicts[2].reason == f"the same frames as a.mp4 [0, 20), clip {spans[0].id}"
    named = DuplicatesStage(DuplicatesConfig(drop=False)).decide(spans, signals)
    assert [(verdict.kept, verdict.value) for verdict in named] == [(True, 0.0), (True, 1.0), (True, 1.0), (True, 0.0)]


def test_one_changed_pixel_is_not_a_duplicate() -> None:
    stage = DuplicatesStage(DuplicatesConfig())
    frames = scene(1, 20)
    changed = frames.copy()
    changed[10, 3, 3, 0] ^= 1
    other = Source("b.mp4", "/b.mp4", "b" * 64, "b")
    signals = {"a": signals_of(stage, frames), "b": signals_of(stage, changed)}
    assert all(v.kept for v in stage.decide([Span(FILE, 0, 20, 20.0), Span(other, 0, 20, 20.0)], signals))


EPISODE = Source(
    "set#1",
    "/set",
    "e" * 64,
    "e",
    index=0,
    facts={"env_id": "VizdoomMyWayHome-v1", "action_names": ["NOOP", "MOVE_FORWARD+TURN_LEFT", "TURN_RIGHT"]},
    actions=np.eye(3, dtype=np.float32)[[2, 1, 1, 1, 2, 0, 0, 0, 0]],
)


def caption(span: Span, config: CaptionConfig | None = None) -> str:
    [verdict] = CaptionStage(config or CaptionConfig()).decide([span], {})
    assert verdict.kept
    return verdict.span.caption


def test_the_caption_of_an_episode_names_view_world_and_actions_of_its_span() -> None:
    whole = Span(EPISODE, 0, 10, 10.0)
    assert caption(whole) == "first-person view, VizdoomMyWayHome, actions: move forward and turn left, turn right"
    # Frames 4 to 9 carry actions 4 to 8: one turn to the right, and nothing after it.
    assert caption(replace(whole, start=4)).endswith("actions: turn right")
    assert caption(replace(whole, start=5)) == "first-person view, VizdoomMyWayHome"
    assert caption(whole, CaptionConfig(most_actions=1)).endswith("actions: move forward and turn left")


def test_the_caption_leaves_out_what_is_not_known() -> None:
    assert caption(Span(FILE, 0, 10, 10.0)) == ""
    assert caption(Span(FILE, 0, 10, 10.0), CaptionConfig(video="a street")) == "a street"
    bare = replace(EPISODE, facts={"env_id": "CartPole-v1"}, actions=None)
    assert caption(Span(bare, 0, 10, 10.0)) == "CartPole"
    told = replace(EPISODE, facts={"caption": "a robot"}, actions=None)
    assert caption(Span(told, 0, 10, 10.0)) == "a robot"
    assert fill("{view}, in {env}", {"view": "", "env": "X"}) == "in X"
    assert words("MOVE_FORWARD") == "move forward"


def test_continuous_actions_are_not_named() -> None:
    assert frequent_actions(np.full((9, 2), 0.7, np.float32), ["steer", "gas"], 0, 10) == []


def test_a_template_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(WorldloomError, match="a field that is not known"):
        CaptionConfig(template="{colour}")


@pytest.mark.parametrize(
    ("size", "recorded", "short_side", "stored"),
    [
        ((720, 1280), False, 256, (256, 456)),
        ((1280, 720), False, 256, (456, 256)),
        ((144, 176), False, 256, (144, 176)),
        ((145, 177), False, 256, (144, 176)),
        ((145, 177), True, 256, (145, 177)),
        ((720, 1280), True, 256, (720, 1280)),
        ((720, 1280), False, 0, (720, 1280)),
    ],
)
def test_stored_size(size: tuple[int, int], recorded: bool, short_side: int, stored: tuple[int, int]) -> None:
    assert stored_size(*size, recorded, WriteConfig(short_side=short_side)) == stored


@pytest.mark.parametrize(
    ("size", "aspect", "stored"),
    [
        ((720, 1280), "1:1", (256, 256)),
        ((720, 1280), "4:3", (256, 342)),
        ((576, 720), "16:9", (256, 456)),
        ((100, 100), "2:1", (50, 100)),
        ((720, 1280), "16:9", (256, 456)),
    ],
)
def test_stored_size_of_another_shape(size: tuple[int, int], aspect: str, stored: tuple[int, int]) -> None:
    assert stored_size(*size, False, WriteConfig(aspect=aspect)) == stored
    assert stored_size(*size, True, WriteConfig(aspect=aspect)) == size


@pytest.mark.parametrize("aspect", ["16", "16:", "0:9", "a:b", "16:9:1", "1.5:1"])
def test_a_shape_that_is_none_is_refused(aspect: str) -> None:
    with pytest.raises(WorldloomError, match="W:H"):
        WriteConfig(aspect=aspect)


def test_arrays_are_cut_with_the_span() -> None:
    arrays = {"actions": np.arange(9, dtype=np.float32)[:, None], "depth": np.arange(10, dtype=np.uint8)[:, None, None]}
    cut = cut_arrays(arrays, Span(EPISODE, 4, 8, 10.0), 10)
    assert cut["actions"].ravel().tolist() == [4, 5, 6]
    assert cut["depth"].ravel().tolist() == [4, 5, 6, 7]
    with pytest.raises(WorldloomError, match="the actions of the episode do not fit its video"):
        cut_arrays(arrays, Span(EPISODE, 4, 8, 10.0), 11)
