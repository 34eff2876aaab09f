"""World models as Gymnasium environments: the checker, spaces, starts, batches against single worlds, heads, resets."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import tiny_models
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.shards import Dataset
from worldloom_model_zoo.environment import SingleWorldModelEnv, WorldModelEnv
from worldloom_model_zoo.starts import StartPool, discrete_size

CONTEXT = 5
NAME = "worldloom_model_zoo.environment:worldloom/World-v0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_models.world(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_models.clips(tmp_path_factory.mktemp("data") / "clips")


def make(model: Any, dataset: Any, **options: Any) -> WorldModelEnv:
    return WorldModelEnv(model, dataset, **{"context": CONTEXT, "num_envs": 3, **options})


def bright(limit: float) -> Any:
    """A termination head: the mean of the newest latent frame is above a limit."""
    return lambda latents: latents[:, 1].mean((1, 2, 3)) > limit


# -- the contract of Gymnasium ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions_per_step", [1, 4])
def test_gymnasiums_checker_passes_without_a_warning(model: Any, dataset: Dataset, actions_per_step: int) -> None:
    env = gymnasium.make(
        NAME, model=model, starts=dataset, context=CONTEXT, max_steps=6, actions_per_step=actions_per_step,
        render_mode="rgb_array",
    )  # fmt: skip
    assert isinstance(env.unwrapped, SingleWorldModelEnv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_the_checker_passes_where_actions_are_numbers(model: Any, dataset: Dataset) -> None:
    env = SingleWorldModelEnv(model, dataset, context=CONTEXT, action_space=spaces.Box(-1, 1, (3,)))
    check_env(env, skip_render_check=True)


def test_a_batch_is_made_by_the_registered_name(model: Any, dataset: Dataset) -> None:
    envs = gymnasium.make_vec(NAME, num_envs=2, model=model, starts=dataset, context=CONTEXT)
    observations, _ = envs.reset(seed=1)
    assert observations.shape == (2, 32, 32, 3)
    assert envs.action_space == spaces.MultiDiscrete([3, 3])


def test_observations_are_in_their_space_and_episodes_end_in_time(model: Any, dataset: Dataset) -> None:
    envs = make(model, dataset, max_steps=2, render_mode="rgb_array")
    observations, infos = envs.reset(seed=0)
    assert observations in envs.observation_space
    assert all("@" in source for source in infos["start"])
    envs.action_space.seed(0)
    flags = []
    for _ in range(4):
        observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        assert rewards.dtype == np.float64
        assert not terminations.any()
        assert not rewards.any()
        flags.append(truncations.tolist())
        rendered = envs.render()
        assert rendered is not None
        assert np.array_equal(np.stack(rendered), observations)
    # two steps, a reset in place of the third
    assert flags == [[False] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert envs.metadata["render_fps"] == 2.5


# -- against the model itself -----------------------------------------------------------------------------------------


def test_a_step_gives_the_frames_of_the_model(model: Any, dataset: Dataset) -> None:
    """The same start, actions and noise by hand."""
    envs = make(model, dataset)
    observations, _ = envs.reset(seed=3, options={"clip": [0, 1, 0], "frame": [2, 0, 7]})
    random = np.random.default_rng(3)
    pool = StartPool(dataset)
    starts = [pool.at(clip, frame, CONTEXT) for clip, frame in ((0, 2), (1, 0), (0, 7))]
    seed = int(random.integers(1 << 31))
    known = torch.from_numpy(np.stack([start.actions for start in starts if start.actions is not None]))
    seen = model.reset(media.to_tensor(np.stack([start.frames for start in starts])), known, seed=seed)
    assert np.array_equal(observations, media.to_frames(seen)[:, -1])
    chosen = np.array([2, 0, 1])
    made, _, _, _, infos = envs.step(chosen)
    held = torch.eye(3)[chosen][:, None].expand(-1, 4, -1)
    expected = media.to_frames(model.step(held))
    assert np.array_equal(infos["frames"], expected)
    assert np.array_equal(made, expected[:, -1])


def test_actions_of_their_own_for_each_frame(model: Any, dataset: Dataset) -> None:
    both = make(model, dataset, actions_per_step=2)
    assert both.single_action_space == spaces.MultiDiscrete([3, 3])
    held = make(model, dataset)
    for envs in (both, held):
        envs.reset(seed=0)
    one = held.step(np.array([0, 1, 2]))[4]["frames"]
    two = both.step(np.array([[0, 0], [1, 1], [2, 0]]))[4]["frames"]
    assert np.array_equal(one[:2], two[:2])
    assert not np.array_equal(one[2], two[2])


def test_a_seed_decides_everything(model: Any, dataset: Dataset) -> None:
    def play(seed: int) -> np.ndarray:
        envs = make(model, dataset, max_steps=2)
        first, _ = envs.reset(seed=seed)
        return np.stack([first, *(envs.step(np.array([0, 1, 2]))[0] for _ in range(4))])

    assert np.array_equal(play(5), play(5))
    assert not np.array_equal(play(5), play(6))


def test_one_worlds_reset_does_not_touch_the_others(model: Any, dataset: Dataset) -> None:
    """World 1 ends early; worlds 0 and 2 go on bit by bit as if it had not."""
    alone, shared = (make(model, dataset, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    for envs in (alone, shared):
        envs.reset(seed=1)
    actions = np.array([0, 1, 2])
    for step in range(4):
        if step == 2:
            shared.reset(options={"reset_mask": np.array([False, True, False])})
        left, right = alone.step(actions)[0], shared.step(actions)[0]
        assert np.array_equal(left[[0, 2]], right[[0, 2]])
        assert np.array_equal(left[1], right[1]) == (step < 2)
    assert len(shared._groups) == 2


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_ended_worlds_start_anew(model: Any, dataset: Dataset, mode: AutoresetMode) -> None:
    envs = make(model, dataset, max_steps=1, autoreset_mode=mode)
    envs.reset(seed=0)
    actions = np.zeros(3, int)
    made, _, _, truncations, infos = envs.step(actions)
    assert truncations.all()
    if mode == AutoresetMode.SAME_STEP:
        assert all(np.array_equal(infos["final_obs"][row], infos["final_info"]["frames"][row, -1]) for row in range(3))
        assert not np.array_equal(infos["final_obs"][0], made[0])
        assert infos["_start"].all()
    else:
        assert "start" not in infos
        _, rewards, _, truncations, infos = envs.step(actions)
        assert infos["_start"].all()
        assert "frames" not in infos
        assert not truncations.any()
        assert not rewards.any()


def test_ended_worlds_wait_where_nothing_resets_them(model: Any, dataset: Dataset) -> None:
    envs = make(model, dataset, max_steps=1, autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.zeros(3, int))
    with pytest.raises(WorldloomError, match="have ended"):
        envs.step(np.zeros(3, int))
    envs.reset(options={"reset_mask": np.array([True, True, True])})
    envs.step(np.zeros(3, int))


# -- heads ------------------------------------------------------------------------------------------------------------


def test_heads_see_the_latents_of_the_whole_video(model: Any, dataset: Dataset) -> None:
    """What a head is given equals encoding all frames of the world at once."""
    given = []
    envs = make(model, dataset, reward=lambda pair: given.append(pair) or pair.mean((1, 2, 3, 4)))
    frames = [envs.reset(seed=0)[0][:, None]]
    world = model.reset(*_start(envs), seed=int(_after_starts(envs)))
    rewards = []
    for _ in range(2):
        _, reward, _, _, infos = envs.step(np.array([0, 1, 2]))
        frames.append(infos["frames"])
        rewards.append(reward)
    shown = torch.cat([world, *(model.step(_held([0, 1, 2])) for _ in range(2))], dim=2)
    latents = model.tokenizer.encode(shown)
    for step, pair in enumerate(given):
        torch.testing.assert_close(pair, latents[:, :, 1 + step : 3 + step].transpose(1, 2), atol=1e-5, rtol=1e-5)
        assert rewards[step] == pytest.approx(pair.mean((1, 2, 3, 4)).double().numpy())


def _held(chosen: list[int]) -> torch.Tensor:
    return torch.eye(3)[chosen][:, None].expand(-1, 4, -1)


def _start(envs: WorldModelEnv) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reset(seed=0)` drew."""
    assert envs.pool is not None
    random = np.random.default_rng(0)
    starts = [envs.pool.draw(random, CONTEXT) for _ in range(3)]
    known = [start.actions for start in starts if start.actions is not None]
    return media.to_tensor(np.stack([start.frames for start in starts])), torch.from_numpy(np.stack(known))


def _after_starts(envs: WorldModelEnv) -> int:
    random = np.random.default_rng(0)
    assert envs.pool is not None
    for _ in range(3):
        envs.pool.draw(random, CONTEXT)
    return int(random.integers(1 << 31))


def test_a_termination_head_ends_worlds_one_by_one(model: Any, dataset: Dataset) -> None:
    values = []

    def never(pair: torch.Tensor) -> torch.Tensor:
        values.append(pair[:, 1].mean((1, 2, 3)))
        return torch.zeros(3, dtype=torch.bool)

    watch = make(model, dataset, termination=never)
    watch.reset(seed=2)
    watch.step(np.zeros(3, int))
    limit = float(values[0].sort().values[1:].mean())  # between the two largest
    envs = make(model, dataset, termination=bright(limit), max_steps=5)
    envs.reset(seed=2)
    terminations = envs.step(np.zeros(3, int))[2]
    assert terminations.tolist() == (values[0] > limit).tolist()
    assert terminations.sum() == 1
    infos = envs.step(np.zeros(3, int))[4]
    assert infos["_start"].tolist() == terminations.tolist()
    assert infos["_frames"].tolist() == (~terminations).tolist()


# -- starts and spaces ------------------------------------------------------------------------------------------------


def test_every_span_is_as_likely_and_none_crosses_a_clip(dataset: Dataset) -> None:
    pool = StartPool(dataset)
    random = np.random.default_rng(0)
    found = {pool.draw(random, 39).source for _ in range(60)}
    assert len(found) == 4  # two spans in each clip of 40 frames, none in that of 23
    with pytest.raises(WorldloomError, match="no clip has the 50 frames"):
        pool.draw(random, 50)


def test_worlds_start_from_a_given_video(model: Any) -> None:
    envs = WorldModelEnv(model, num_envs=2, action_space=spaces.Discrete(3))
    video = tiny_models.moving_square(7, 0)
    observations, infos = envs.reset(seed=0, options={"video": video, "actions": np.zeros((6, 3))})
    assert observations.shape == (2, 32, 32, 3)
    assert infos["start"].tolist() == ["given", "given"]
    pair = np.stack([video, tiny_models.moving_square(7, 1)])
    other, _ = envs.reset(seed=0, options={"video": pair, "actions": np.zeros((2, 6, 3))})
    assert np.array_equal(other[0], observations[0])
    assert not np.array_equal(other[1], observations[1])
    # seven frames hold a start of five: the last ones
    short, _ = envs.reset(seed=0, options={"video": video[2:], "actions": np.zeros((4, 3))})
    assert np.array_equal(short, observations)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "nothing to start a world from"),
        ({"video": np.zeros((0, 32, 32, 3), np.uint8)}, "at least one frame"),
        ({"video": np.zeros((5, 32, 32, 3), np.float32)}, "a start is uint8"),
        ({"video": np.zeros((5, 32, 32, 3), np.uint8), "actions": np.zeros((4, 7))}, "actions of the start"),
        ({"image": 1}, "no such option"),
    ],
)
def test_a_start_that_is_none_is_refused(model: Any, options: dict[str, Any], what: str) -> None:
    envs = WorldModelEnv(model, num_envs=2, action_space=spaces.Discrete(3))
    with pytest.raises(WorldloomError, match=what):
        envs.reset(options=options)


def test_the_action_space_is_that_of_the_recording(model: Any, dataset: Dataset, tmp_path: Path) -> None:
    assert make(model, dataset).single_action_space == spaces.Discrete(3)
    assert discrete_size("Discrete(6)") == 6
    assert discrete_size("Discrete(4, start=2)") == 4
    assert discrete_size("Box(-1.0, 1.0, (2,), float32)") == 0
    with pytest.raises(WorldloomError, match="what the 3 numbers of an action mean"):
        WorldModelEnv(model, [tiny_models.moving_square(9, 0)])
    with pytest.raises(WorldloomError, match="another size"):
        WorldModelEnv(model, dataset, action_space=spaces.Discrete(5))
    with pytest.raises(WorldloomError, match="takes no actions"):
        WorldModelEnv(load_model(tiny_models.world(tmp_path, actions=())), dataset)


def test_discrete_actions_are_matched_by_name(model: Any, tmp_path: Path) -> None:
    """A recording that knows two of the model's three actions, in another order."""
    few = tiny_models.clips(tmp_path / "few", names=("fire", "left"))
    envs = make(model, few)
    assert envs.single_action_space == spaces.Discrete(2)
    vectors = envs._vectors(np.array([0, 1, 1]))
    assert vectors.shape == (3, 4, 3)
    assert vectors[:, 0].argmax(1).tolist() == [2, 0, 0]  # left, right, fire


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"context": 4}, "context must be 1 \\+ 4k"),
        ({"actions_per_step": 3}, "divides the 4 frames"),
        ({"num_envs": 0}, "at least 1"),
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_impossible_settings_are_refused(model: Any, dataset: Dataset, options: dict[str, Any], what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        make(model, dataset, **options)


def test_a_model_that_sees_the_future_cannot_be_stepped(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="cannot be stepped"):
        WorldModelEnv(load_model(tiny_models.world(tmp_path, attention="full")), dataset)


def test_worlds_are_started_before_they_are_stepped(model: Any, dataset: Dataset) -> None:
    envs = make(model, dataset)
    with pytest.raises(WorldloomError, match="no start yet"):
        envs.step(np.zeros(3, int))
    envs.reset(seed=0)
    for wrong in (np.array([0, 1]), np.array([0, 1, 3]), np.zeros((3, 3))):
        with pytest.raises(WorldloomError, match="not in the action space"):
            envs.step(wrong)


def test_gymnasium_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "worldloom_model_zoo.environment")
    with pytest.raises(WorldloomError, match="worldloom\\[curation\\]"):
        import worldloom_model_zoo.environment  # noqa: F401
