"""Probes: they learn what can be learnt, optical flow is right, action following tells obedient videos from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F

from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom_model_zoo.action_following import (
    FollowingMeter,
    InverseDynamics,
    through_tokenizer,
)
from worldloom_model_zoo.probes import ProbeConfig, fit_probe, optical_flow

MOVES = np.array([(0, 0), (0, 3), (0, -3), (3, 0), (-3, 0)])  # rows down, columns to the right


def told(length: int, seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A texture that moves as it is told: frames uint8 ``(T, size, size, 3)``, one-hot actions ``(T-1, 5)``."""
    random = np.random.default_rng(seed)
    actions = np.repeat(random.integers(0, len(MOVES), length), 3)[: length - 1]
    texture = torch.from_numpy(random.normal(128, 60, (1, 3, 16, 16))).float()
    wide = (
        F.interpolate(texture, size=(size * 2, size * 2), mode="bicubic")[0]
        .clamp(0, 255)
        .byte()
        .permute(1, 2, 0)
        .numpy()
    )
    at = np.concatenate([[[0, 0]], np.cumsum(MOVES[actions], axis=0)])
    frames = np.stack([np.roll(wide, tuple(place), axis=(0, 1))[:size, :size] for place in at])
    return frames, np.eye(len(MOVES), dtype=np.float32)[actions]


def test_optical_flow_measures_a_shift() -> None:
    frames, _ = told(2, 0, size=64)
    grey = torch.from_numpy(frames[:1]).float().mean(-1) / 127.5 - 1
    for down, right in ((0, 1), (2, 0), (-1, 2)):
        flow = optical_flow(grey, torch.roll(grey, (down, right), (1, 2)))
        assert flow.shape == (1, 6, 32, 32)
        u, v, left = flow[0, :3, 6:-6, 6:-6].flatten(1).median(1).values.tolist()
        assert u == pytest.approx(right, abs=0.4)
        assert v == pytest.approx(down, abs=0.4)
        assert left < 0.2
    still = optical_flow(grey, grey)
    assert not still.any()


def test_a_probe_reads_a_position_and_is_the_same_again() -> None:
    random = np.random.default_rng(0)
    frames = np.full((400, 32, 32, 3), 30, np.uint8)
    places = random.integers(0, 24, (400, 2))
    for frame, (y, x) in zip(frames, places, strict=True):
        frame[y : y + 8, x : x + 8] = 220
    index, config = np.arange(400)[:, None], ProbeConfig(steps=120, batch_size=16, width=8)
    reader = fit_probe(frames, index[:300], places[:300].astype(float), config)
    found = reader(frames, index[300:])
    assert np.abs(found - places[300:]).mean() < 2  # a constant errs by 6
    again = fit_probe(frames, index[:300], places[:300].astype(float), config)
    assert np.array_equal(again(frames, index[300:]), found)


def test_large_frames_are_read_too() -> None:
    frames = np.zeros((8, 100, 160, 3), np.uint8)
    frames[4:] = 255
    labels = np.repeat([0, 1], 4)
    reader = fit_probe(frames, np.arange(8)[:, None], labels, ProbeConfig(steps=20, batch_size=8))
    assert np.array_equal(reader(frames, np.arange(8)[:, None]), labels)
    with pytest.raises(WorldloomError, match="needs examples"):
        fit_probe(frames, np.zeros((0, 1), int), labels)


def test_actions_are_read_off_obedient_videos_and_not_off_others(tmp_path: Path) -> None:
    pipeline = load_model(tiny_models.world(tmp_path, actions=tuple("abcde")))
    clips = [told(61, seed) for seed in range(12)]
    dynamics = InverseDynamics.fit(pipeline, clips[:8], ProbeConfig(steps=150, batch_size=16, width=12))
    assert dynamics.choices
    assert dynamics.fitted == 4 * 58 + 4 * 58
    meter = FollowingMeter(dynamics)
    for frames, actions in clips[8:]:
        meter.add("real", frames[None], actions[None])
        meter.add("swapped", frames[None], clips[0][1][None])
        meter.add("frozen", np.repeat(frames[:1], 61, axis=0)[None], actions[None])
    result = meter.result()
    assert result.measure == "accuracy"
    assert result.actions == 4 * 58
    assert result.score["real"] > 0.8
    assert result.score["real"] > 2 * result.score["swapped"]
    assert result.score["frozen"] < 0.4
    assert 0.2 <= result.chance < 0.4
    assert set(result.by_action) == set("abcde")


def test_numbers_are_read_with_their_r2(tmp_path: Path) -> None:
    pipeline = load_model(tiny_models.world(tmp_path, actions=("down", "right", "unused")))
    clips = []
    for seed in range(10):
        frames, chosen = told(61, seed)
        moves = MOVES[chosen.argmax(1)].astype(np.float32)
        clips.append((frames, np.concatenate([moves, np.zeros((60, 1), np.float32)], axis=1)))
    dynamics = InverseDynamics.fit(pipeline, clips[:8], ProbeConfig(steps=150, batch_size=16, width=12))
    meter = FollowingMeter(dynamics)
    for frames, actions in clips[8:]:
        meter.add("real", frames[None], actions[None])
    result = meter.result()
    assert result.measure == "R^2"
    assert result.chance == 0
    assert result.score["real"] > 0.5
    assert set(result.by_action) == {"down", "right"}  # what never varies has no R^2


def test_the_tokenizers_view_keeps_as_many_frames_as_fit(tmp_path: Path) -> None:
    pipeline = load_model(tiny_models.world(tmp_path))
    assert through_tokenizer(pipeline, tiny_models.moving_square(12, 0)).shape == (9, 32, 32, 3)
