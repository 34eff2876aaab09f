"""Linear reward and termination heads: against plain least squares, on data where they can be right, saved and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.schema import Clip, clip_id
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_model_zoo.environment import WorldModelEnv
from worldloom_model_zoo.heads import LinearHead, _Moments, fit_head

LENGTH = 25


def grey_clips(root: Path, count: int = 20, *, rewards: bool = True, end: bool = True) -> Dataset:
    """Uniform frames whose brightness wanders; a reward is its change, an episode ends where it is bright."""
    with ShardWriter(root) as writer:
        for number in range(count):
            random = np.random.default_rng(number)
            level = np.clip(120 + np.cumsum(random.normal(0, 6, LENGTH)), 20, 180)
            if end and number % 2:
                level[-5:] = 250
            frames = np.broadcast_to(level.astype(np.uint8)[:, None, None, None], (LENGTH, 32, 32, 3)).copy()
            digest = f"{number:064x}"
            clip = Clip(
                clip_id(digest, 0, LENGTH), f"episode-{number}", digest, 0, LENGTH, 10.0, 32, 32,
                metadata={"terminated": bool(end and number % 2)},
            )  # fmt: skip
            arrays = {"rewards": np.diff(level.astype(np.uint8).astype(np.float32)) / 10} if rewards else {}
            writer.write(ShardSample(clip, media.write_video(None, frames, 10.0, lossless=True), arrays))
        refs = writer.close()
    commit_dataset(root, refs)
    return open_dataset(root)


def test_the_solution_is_that_of_ridge_regression() -> None:
    """Against the augmented least-squares problem: rows sqrt(penalty n v) I below centred X."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 7)) * 3 + 1, random.normal(size=50)
    moments = _Moments()
    for rows in (slice(0, 20), slice(20, 50)):
        moments.add(x[rows], y[rows])
    weight, bias = moments.solve(0.1, balance=False)
    centred = x - x.mean(0)
    spread = np.trace(centred.T @ centred) / 50 / 7
    wide = np.vstack([centred, np.sqrt(0.1 * 50 * spread) * np.eye(7)])
    expected = np.linalg.lstsq(wide, np.concatenate([y - y.mean(), np.zeros(7)]), rcond=None)[0]
    assert weight == pytest.approx(expected)
    assert bias == pytest.approx(y.mean() - x.mean(0) @ expected)


def test_classes_weigh_alike_where_they_are_balanced() -> None:
    random = np.random.default_rng(1)
    x = np.concatenate([random.normal(0, 1, (200, 3)), random.normal(3, 1, (5, 3))])
    y = np.concatenate([np.zeros(200), np.ones(5)])
    fair, plain = _Moments(), _Moments()
    fair.add(x, y)
    plain.add(np.concatenate([x[:200], *[x[200:]] * 40]), np.concatenate([y[:200], np.ones(200)]))
    left, right = fair.solve(0.01, balance=True), plain.solve(0.01, balance=False)
    assert left[0] == pytest.approx(right[0], rel=1e-6)
    assert left[1] == pytest.approx(right[1], rel=1e-6)


def test_heads_find_what_can_be_found_and_work_in_a_world(tmp_path: Path) -> None:
    data = grey_clips(tmp_path / "grey")
    model = load_model(tiny_models.world(tmp_path))
    reward = fit_head(model.tokenizer, data, "reward")
    ends = fit_head(model.tokenizer, data, "termination")
    assert reward.fit.score > 0.8
    assert ends.fit.score > 0.9
    assert reward.fit.steps + reward.fit.held_out == 20 * 6

    again = LinearHead.load(reward.save(tmp_path / "reward.safetensors"))
    latents = torch.randn(4, 2, 4, 4, 4)
    assert np.array_equal(again(latents), reward(latents))
    assert again.fit == reward.fit
    assert ends(latents).dtype == bool

    envs = WorldModelEnv(
        model, tiny_models.clips(tmp_path / "clips"), num_envs=2, context=5, reward=reward, termination=ends
    )
    envs.reset(seed=0)
    _, rewards, terminations, _, _ = envs.step(np.zeros(2, int))
    assert rewards.all()
    assert terminations.dtype == bool
    with pytest.raises(WorldloomError, match="fitted to other latents"):
        reward(torch.randn(4, 2, 5, 4, 4))


def test_data_that_does_not_say_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    silent = grey_clips(tmp_path / "silent", 6, rewards=False, end=False)
    with pytest.raises(WorldloomError, match="carries no rewards"):
        fit_head(tokenizer, silent, "reward")
    with pytest.raises(WorldloomError, match="its episode ended"):
        fit_head(tokenizer, silent, "termination")
    with pytest.raises(WorldloomError, match="at least 5 clips"):
        fit_head(tokenizer, grey_clips(tmp_path / "few", 2), "reward")
    (tmp_path / "x").write_text("no")
    with pytest.raises(WorldloomError, match="no head"):
        LinearHead.load(tmp_path / "x")
