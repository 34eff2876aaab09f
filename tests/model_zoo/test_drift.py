"""Drift: statistics by hand, worlds that stay and worlds that do not, its way through JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom_model_zoo.drift import DriftResult, frame_statistics, measure_drift

CLIPS = np.stack([tiny_models.moving_square(40, seed) for seed in range(6)])
ACTIONS = [np.eye(3, dtype=np.float32)[np.random.default_rng(seed).integers(0, 3, 39)] for seed in range(6)]
STARTS = [(clip[:5], actions[:4]) for clip, actions in zip(CLIPS[:3], ACTIONS[:3], strict=True)]


class Replays:
    """A world that plays given videos, whatever is done: `Steps` without a network."""

    action_dim, frames_per_step, device = 3, 4, "cpu"

    device = "cpu"

    def __init__(self, videos: np.ndarray, tokenizer: Any = None) -> None:
        self.videos, self.at = media.to_tensor(videos), 0
        self.tokenizer = tokenizer or Blurs(1)

    def reset(self, video: torch.Tensor, actions: torch.Tensor | None = None, *, seed: int = 0) -> torch.Tensor:
        self.at = 0
        return video

    def step(self, actions: torch.Tensor) -> torch.Tensor:
        assert actions.shape == (len(self.videos), 4, 3)
        self.at += 4
        return self.videos[:, :, self.at - 4 : self.at]


class Blurs:
    """A tokenizer that shows frames in blocks."""

    temporal_ratio = 4

    def __init__(self, block: int) -> None:
        self.block = block

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return video[..., :: self.block, :: self.block]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)


def test_statistics_are_those_of_their_definitions() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[1, :, 3:] = 200  # a vertical edge
    frames[1, :, 3:, 2] = 255
    found = {name: values[1] for name, values in frame_statistics(frames).items()}
    pixels = frames[1].astype(float)
    assert found["brightness"] == pytest.approx(pixels.mean())
    assert found["contrast"] == pytest.approx(pixels.std())
    assert found["sharpness"] == pytest.approx((655 / 3) / 5, rel=1e-5)  # one of five columns of differences
    assert found["clipped"] == pytest.approx(0.5 + 0.5 / 3)
    assert found["colourfulness"] == pytest.approx(0.5 * (2 * 55 / 3 + 110 / 3) / 3, rel=1e-5)
    assert found["motion"] == pytest.approx(pixels.mean())
    assert np.isnan(frame_statistics(frames)["motion"][0])


def replayed(videos: np.ndarray, distance: bool = False) -> DriftResult:
    world: Any = Replays(videos)
    return measure_drift(world, STARTS, CLIPS, ACTIONS, frames=40, distance=distance)


def test_real_videos_do_not_drift() -> None:
    result = replayed(CLIPS[3:6])
    assert result.stable
    assert result.stretches == [(1, 8), (9, 16), (17, 24), (25, 32), (33, 40)]
    assert set(result.statistics) >= {"brightness", "sharpness", "motion"}
    assert all(0.5 < value < 1.6 for value in result.variety)
    assert not result.alike
    assert result.shown[0].shape == (41, 32, 32, 3)


def test_a_world_that_fades_and_stops_is_caught() -> None:
    fade = np.linspace(1, 0, 40)[None, :, None, None, None]
    result = replayed((CLIPS[3:6] * fade).astype(np.uint8), distance=True)
    assert not result.stable
    assert not result.statistics["brightness"].stable
    assert result.statistics["brightness"].inside[0] > result.statistics["brightness"].inside[-1]
    assert result.statistics["distance"].means[-1] > result.statistics["distance"].high
    assert result.variety[-1] < result.variety[0] / 2
    curve = result.statistics["brightness"].curve
    assert [frame for frame, _ in curve] == list(range(1, 41))
    assert curve[0][1] > curve[-1][1]


def test_what_the_tokenizer_shows_has_a_range_of_its_own() -> None:
    """Frames without detail are outside the range of real ones, and inside that of a tokenizer which shows none."""
    plain = np.repeat(np.repeat(CLIPS[3:6, :, ::32, ::32], 32, 2), 32, 3)
    world: Any = Replays(plain, Blurs(32))
    result = measure_drift(world, STARTS, CLIPS, ACTIONS, frames=40, distance=True)
    sharpness = result.statistics["sharpness"]
    assert not sharpness.stable
    assert sharpness.stable_as_trained
    assert sharpness.trained[1] < sharpness.low
    assert result.statistics["distance"].trained[1] > result.statistics["distance"].high

    usual = replayed(CLIPS[3:6])
    assert usual.stable_as_trained
    assert all(s.trained == (s.low, s.high) for s in usual.statistics.values())


def test_worlds_that_become_one_have_no_variety() -> None:
    one = tiny_models.moving_square(40, 10)
    result = replayed(np.stack([one, one, one]))
    assert max(result.variety) == 0
    assert result.alike


def test_a_model_is_stepped_with_recorded_actions_and_the_result_survives_json(tmp_path: Path) -> None:
    pipeline = load_model(tiny_models.world(tmp_path))
    done = []
    result = measure_drift(
        pipeline,
        STARTS,
        CLIPS,
        ACTIONS,
        frames=22,
        distance=False,
        progress=lambda now, total, note="": done.append((now, total, note)),
    )
    assert done == [(step, 6, "drift") for step in range(1, 7)]
    assert (result.frames, result.worlds) == (22, 3)
    assert result.stretches[-1][1] == 22
    again = measure_drift(pipeline, STARTS, CLIPS, ACTIONS, distance=False, frames=22)
    assert again.statistics == result.statistics
    plain = dataclasses.asdict(dataclasses.replace(result, shown=()))
    del plain["shown"]
    assert DriftResult.from_dict(json.loads(json.dumps(plain))) == dataclasses.replace(result, shown=())


def test_too_short_a_rollout_is_refused(tmp_path: Path) -> None:
    pipeline = load_model(tiny_models.world(tmp_path))
    with pytest.raises(WorldloomError, match="at least 20 frames"):
        measure_drift(pipeline, STARTS, CLIPS, ACTIONS, frames=10)


def test_without_the_encoder_the_distance_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldloom_tokenizers.efficientnet._FILE", "not_installed/weights.pth")
    monkeypatch.setenv("WORLDLOOM_HOME", "/nonexistent")
    result = replayed(CLIPS[3:6], distance=True)
    assert "distance" not in result.statistics
    assert any("not measured" in note for note in result.notes)
