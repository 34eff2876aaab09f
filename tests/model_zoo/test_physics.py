"""Physics against a simulator whose state is known: a square that goes where it is pushed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom_curation.simulators import Simulator
from worldloom_model_zoo.physics import (
    QUANTITIES,
    PhysicsConfig,
    PhysicsResult,
    known_quantities,
    measure_physics,
)
from worldloom_model_zoo.probes import ProbeConfig
from worldloom_model_zoo.state_readers import LEAD, Quantity, StateReader, movements, summed

gymnasium = pytest.importorskip("gymnasium")

WHERE = Quantity("square's position", "pixels", lambda world: world.at.tolist())
CONFIG = PhysicsConfig(
    episodes=4, horizon=8, fit_episodes=24, fit_steps=30, probe=ProbeConfig(steps=250, batch_size=32, width=8)
)


class Pushed(gymnasium.Env):
    """A white square of 8 pixels on black that is pushed left, right or down; it is over after `ends_after` steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, ends_after: int = 1000) -> None:
        self.render_mode, self.ends_after = render_mode, ends_after
        self.action_space = gymnasium.spaces.Discrete(3)
        self.observation_space = gymnasium.spaces.Box(0, 24, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.integers(0, 24, 2).astype(np.float32), 0
        return self.at, {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.at = (self.at + np.array([(-1, 0), (1, 0), (0, 1)])[action]).clip(0, 24).astype(np.float32)
        return self.at, 0.0, self.steps >= self.ends_after, False, {}

    def render(self) -> np.ndarray:
        frame = np.zeros((32, 32, 3), np.uint8)
        x, y = self.at.astype(int)
        frame[y : y + 8, x : x + 8] = 255
        return frame


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("WorldloomPushed-v0", Pushed)
    gymnasium.register("WorldloomPushedShort-v0", Pushed, kwargs={"ends_after": 10})
    yield
    for name in ("WorldloomPushed-v0", "WorldloomPushedShort-v0"):
        del gymnasium.registry[name]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    names = ("action 0", "action 1", "action 2")  # what the simulator calls them
    loaded = load_model(tiny_models.world(tmp_path_factory.mktemp("models"), actions=names))
    loaded.sampler = dataclasses.replace(loaded.sampler, context_frames=5)
    return loaded


@pytest.fixture(scope="module")
def result(pipeline: Any) -> PhysicsResult:
    return measure_physics(pipeline, "WorldloomPushed-v0", CONFIG, quantities=[WHERE])


def test_errors_of_each_frame_ahead_stand_beside_the_floor(result: PhysicsResult) -> None:
    errors = result.errors["square's position"]
    assert (result.episodes, result.given) == (4, 5)
    assert all(len(values) == 8 for values in (errors.model, errors.floor, errors.still))
    assert np.mean(errors.floor) < errors.spread / 2  # the reader reads
    assert np.mean(errors.model) > 2 * np.mean(errors.floor)  # random weights have no physics
    assert errors.still[0] <= 1
    assert errors.still[0] < errors.still[-1] <= 8


def test_the_true_frames_are_those_of_the_held_actions(result: PhysicsResult) -> None:
    """The square moves one way for four frames at a time, or stands at an edge."""
    for truth, made in result.shown:
        assert truth.shape == made.shape == (13, 32, 32, 3)
        assert np.array_equal(truth[:5], made[:5])
        places = np.array([np.argwhere(frame[..., 0] > 127).mean(0) for frame in truth])
        moves = np.diff(places, axis=0)[4:]
        for step in (moves[:4], moves[4:]):
            going = step[np.abs(step).sum(1) > 0]
            assert len(np.unique(going, axis=0)) <= 1


def test_it_is_the_same_again_and_survives_json(pipeline: Any, result: PhysicsResult) -> None:
    small = dataclasses.replace(CONFIG, fit_episodes=2, probe=ProbeConfig(steps=3))
    first, second = (measure_physics(pipeline, "WorldloomPushed-v0", small, quantities=[WHERE]) for _ in range(2))
    assert first.errors == second.errors
    plain = dataclasses.asdict(dataclasses.replace(result, shown=()))
    del plain["shown"]
    assert PhysicsResult.from_dict(json.loads(json.dumps(plain))) == dataclasses.replace(result, shown=())


def test_angles_are_compared_the_short_way_round() -> None:
    turn = Quantity("turn", "degrees", lambda world: [0.0], "angle")
    found, truth = np.radians([[179.0], [10.0]]), np.radians([[-179.0], [-10.0]])
    assert turn.error(found, truth) == pytest.approx([2, 20])
    assert turn.spread(np.radians([[170.0], [-170.0]])) == pytest.approx(10)
    place = Quantity("place", "m", lambda world: [0.0, 0.0])
    assert place.error(np.array([[3.0, 4.0]]), np.zeros((1, 2))) == pytest.approx([5])
    assert place.spread(np.array([[0.0, 0.0], [0.0, 2.0]])) == pytest.approx(1)


def test_the_state_of_known_simulators_can_be_read() -> None:
    for env_id, moved in (("CartPole-v1", "cart's position"), ("MountainCar-v0", "car's position")):
        with Simulator(env_id) as simulator:
            quantities = {quantity.name: quantity for quantity in known_quantities(simulator)}
            simulator.reset(0)
            before = list(quantities[moved].read(simulator.world))
            for _ in range(5):
                simulator.step(1)
            assert quantities[moved].read(simulator.world) != before
    with Simulator("WorldloomPushed-v0") as simulator, pytest.raises(WorldloomError, match="not known"):
        known_quantities(simulator)
    assert all(quantity.unit for group in QUANTITIES.values() for quantity in group)


def test_episodes_that_end_too_soon_and_odd_horizons_are_refused(pipeline: Any) -> None:
    with pytest.raises(WorldloomError, match="end before 5 \\+ 8 frames"):
        measure_physics(pipeline, "WorldloomPushedShort-v0", CONFIG, quantities=[WHERE])
    with pytest.raises(WorldloomError, match="multiple of 4"):
        measure_physics(pipeline, "WorldloomPushed-v0", dataclasses.replace(CONFIG, horizon=6), quantities=[WHERE])


def test_a_model_of_other_actions_is_refused(tmp_path: Path) -> None:
    other = load_model(tiny_models.world(tmp_path))
    with pytest.raises(WorldloomError, match="does not know these actions"):
        measure_physics(other, "WorldloomPushed-v0", CONFIG, quantities=[WHERE])


# -- where the camera moves with the player ---------------------------------------------------------------------------

PLAYER = (
    Quantity("place", "m", lambda world: [0.0, 0.0], inside=True),
    Quantity("heading", "degrees", lambda world: [0.0], "angle", inside=True),
)


def test_movements_summed_up_are_the_states_again() -> None:
    random = np.random.default_rng(0)
    states = [random.normal(size=(3, 9, 2)).cumsum(1), random.normal(size=(3, 9, 1)).cumsum(1)]
    changes = np.stack([movements(PLAYER, [each[row] for each in states]) for row in range(3)])
    assert changes.shape == (3, 8, 3)
    again = summed(PLAYER, [each[:, 0] for each in states], changes)
    for quantity, found, truth in zip(PLAYER, again, states, strict=True):
        assert quantity.error(found, truth[:, 1:]) == pytest.approx(0, abs=1e-9)


def test_a_step_ahead_is_one_whatever_the_heading() -> None:
    turn = np.array([[0.0], [np.pi / 2], [np.pi / 2]])
    place = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])  # ahead, a quarter to the left, ahead
    assert movements(PLAYER, [place, turn]) == pytest.approx(np.array([[1, 0, np.pi / 2], [1, 0, 0]]), abs=1e-12)


def test_movement_is_read_where_the_camera_moves(tmp_path: Path) -> None:
    """A camera that slides over a texture of its own in each episode: no frame says where it is."""
    random = np.random.default_rng(0)
    quantity = Quantity("camera's place", "pixels", lambda world: [0.0, 0.0], inside=True)
    episodes = []
    for _ in range(24):
        texture = np.kron(random.integers(0, 255, (32, 32, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        steps = np.repeat(random.integers(-2, 3, (10, 2)), 3, axis=0)
        place = np.concatenate([[[0, 0]], steps.cumsum(0)])
        frames = np.stack([np.roll(texture, (-y, -x), (0, 1))[:32, :32] for x, y in place])
        episodes.append((frames, [place.astype(float)]))
    pipeline = load_model(tiny_models.world(tmp_path))
    reader = StateReader.fit(pipeline, episodes[:20], [quantity], ProbeConfig(steps=200, batch_size=32, width=12))
    assert reader.looks is None
    videos = np.stack([frames[: LEAD + 8] for frames, _ in episodes[20:]])
    places = np.stack([states[0][: LEAD + 8] for _, states in episodes[20:]])
    (found,) = reader(videos, [places[:, LEAD - 1]])
    moved = quantity.error(np.broadcast_to(places[:, LEAD - 1 : LEAD], found.shape), places[:, LEAD:])
    assert quantity.error(found, places[:, LEAD:]).mean() < 0.6 * moved.mean()
