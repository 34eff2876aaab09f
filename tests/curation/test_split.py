from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from curation_videos import CODECS, scene, write
from hypothesis import given
from hypothesis import strategies as st

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages.split import ContentScores, SplitConfig, SplitStage, find_cuts

CUTS = [24, 60]


def three_shots() -> np.ndarray:
    return np.concatenate([scene(1, 24), scene(2, 36), scene(3, 30)])


def scores(frames: np.ndarray) -> np.ndarray:
    observer = ContentScores(side=144)
    for frame in frames:
        observer.add(Frame(frame))
    return observer.result()["content"]


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_cuts_are_found_to_the_frame_in_every_codec(codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / "video", three_shots(), codec)
    assert find_cuts(scores(media.read_frames(path)), SplitConfig()) == CUTS


def test_cuts_are_those_of_the_detector_itself() -> None:
    import cv2
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    rng = np.random.default_rng(0)
    frames = np.concatenate([scene(seed, int(n), speed=1) for seed, n in enumerate(rng.integers(4, 20, 14))])
    detector = AdaptiveDetector(min_scene_len=1)
    expected: list[int] = []
    for i, frame in enumerate(frames):
        expected += [
            cut.frame_num
            for cut in detector.process_frame(FrameTimecode(i, 20.0), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        ]
    assert len(expected) >= 4
    assert find_cuts(scores(frames), SplitConfig()) == expected


def test_scores_are_those_of_the_detector_itself() -> None:
    import cv2
    from scenedetect import FrameTimecode, StatsManager
    from scenedetect.detectors import ContentDetector

    frames = three_shots()
    detector = ContentDetector()
    detector.stats_manager = stats = StatsManager()
    times = [FrameTimecode(i, 20.0) for i in range(len(frames))]
    for time, frame in zip(times, frames, strict=True):
        detector.process_frame(time, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    expected = [float(stats.get_metrics(time, ["content_val"])[0] or 0) for time in times]
    assert scores(frames) == pytest.approx(expected, rel=1e-6)
    assert max(expected) > 20


def test_other_thresholds_find_other_cuts() -> None:
    content = scores(three_shots())
    assert find_cuts(content, SplitConfig(min_content=200.0)) == []
    assert find_cuts(content, SplitConfig(adaptive_threshold=0.0, min_content=0.0))[:3] == [0, 1, 2]


def spans_of(
    config: SplitConfig, frames: int, cuts: list[int], fps: float = 20.0, recorded: bool = False
) -> list[tuple]:
    source = Source("a.mp4", "/a.mp4", "0" * 64, "key", index=0 if recorded else None)
    content = np.zeros(frames, np.float32)
    content[cuts] = 99.0
    verdicts = SplitStage(config).decide([Span(source, 0, frames, fps)], {"key": {"content": content}})
    return [(v.span.start, v.span.end, v.kept, v.span.frames) for v in verdicts]


def test_a_long_shot_is_cut_into_even_pieces() -> None:
    assert spans_of(SplitConfig(max_frames=100), 130, []) == [(0, 65, True, 65), (65, 130, True, 65)]


def test_a_fixed_length_leaves_the_short_end_out() -> None:
    config = SplitConfig(mode="fixed", max_frames=50, min_frames=20)
    assert spans_of(config, 110, []) == [(0, 50, True, 50), (50, 100, True, 50), (100, 110, False, 10)]


def test_a_fixed_length_keeps_an_end_that_is_long_enough() -> None:
    assert spans_of(SplitConfig(mode="fixed", max_frames=50), 120, [])[-1] == (100, 120, True, 20)


def test_a_recorded_episode_is_kept_whole_however_long() -> None:
    assert spans_of(SplitConfig(max_frames=50), 500, [200], recorded=True) == [(0, 500, True, 500)]


def test_lengths_of_one_plus_a_multiple() -> None:
    spans = spans_of(SplitConfig(frames_multiple=4), 103, [40])
    assert spans == [(0, 37, True, 37), (37, 40, False, 3), (40, 101, True, 61), (101, 103, False, 2)]


def test_thinning_takes_every_kth_frame() -> None:
    spans = spans_of(SplitConfig(fps=10.0, max_frames=60), 100, [], fps=20.0)
    assert spans == [(0, 100, True, 50)]


def test_seconds_limit_the_length_too() -> None:
    assert [s[3] for s in spans_of(SplitConfig(max_seconds=2.0), 120, [])] == [40, 40, 40]
    assert spans_of(SplitConfig(min_seconds=7.0, max_seconds=8.0), 120, []) == [(0, 120, False, 120)]


def test_a_short_shot_is_dropped() -> None:
    assert spans_of(SplitConfig(), 60, [50]) == [(0, 50, True, 50), (50, 60, False, 10)]


@given(
    frames=st.integers(1, 700),
    cuts=st.sets(st.integers(3, 690), max_size=5),
    multiple=st.sampled_from([1, 4, 8]),
    lengths=st.tuples(st.integers(1, 60), st.integers(0, 200)),
    mode=st.sampled_from(["shots", "fixed", "whole"]),
    fps=st.sampled_from([0.0, 7.0, 10.0, 30.0]),
)
def test_the_verdicts_cover_every_frame_once(
    frames: int, cuts: set[int], multiple: int, lengths: tuple[int, int], mode: str, fps: float
) -> None:
    shortest, more = lengths
    config = SplitConfig(
        mode=mode,  # pyright: ignore[reportArgumentType]
        frames_multiple=multiple,
        min_frames=shortest,
        max_frames=shortest + more,
        fps=fps,
    )
    spans = spans_of(config, frames, [cut for cut in cuts if cut < frames])
    assert spans[0][0] == 0
    assert spans[-1][1] == frames
    for before, after in pairwise(spans):
        assert before[1] == after[0]
    for start, end, kept, length in spans:
        assert end > start
        if kept:
            assert length >= shortest
            assert length % multiple == 1 % multiple
            assert mode == "whole" or length <= max(shortest + more, shortest)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(WorldloomError, match="min_frames is larger"):
        SplitConfig(min_frames=10, max_frames=5)
    with pytest.raises(WorldloomError, match=r"split\.window must be at least 1"):
        SplitConfig(window=0)
