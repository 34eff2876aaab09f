"""Physics checks: a random policy in the model and in the true simulator, from one start; where do the objects end up?

The simulator's state is known. A small network is fitted to read it off real frames (`state_readers`), and then looks
at those that the model makes. Errors are reported for each number of frames
ahead, beside the reader's own error on the simulator's true frames, which no model can be expected to beat (the floor),
and the error of claiming that nothing moved since the start, which a model must beat to have any physics.

Actions are drawn from the action space, uniformly, one for each step of `WorldModelEnv`, and held for its r frames in
both worlds. An episode of the simulator that ends before the horizon is left out and the next seed is taken.

Letters: n episodes, T frames given, r frames of a step, k numbers of a state.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom_model_zoo.action_following import through_tokenizer
from worldloom_model_zoo.probes import ProbeConfig
from worldloom_model_zoo.state_readers import LEAD, Quantity, StateReader

if TYPE_CHECKING:
    from worldloom.progress import Report
    from worldloom_curation.simulators import Simulator
    from worldloom_model_zoo.predict.pipeline import PredictPipeline


def _vizdoom(*names: str) -> Callable[[Any], list[float]]:
    def read(world: Any) -> list[float]:
        variables = importlib.import_module("vizdoom").GameVariable
        return [float(world.game.get_game_variable(getattr(variables, name))) for name in names]

    return read


def _ram(*addresses: int) -> Callable[[Any], list[float]]:
    return lambda world: [float(world.ale.getRAM()[address]) for address in addresses]


QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "Vizdoom": (
        Quantity("player's position", "map units", _vizdoom("POSITION_X", "POSITION_Y"), inside=True),
        Quantity(
            "player's heading", "degrees", lambda w: np.radians(_vizdoom("ANGLE")(w)).tolist(), "angle", inside=True
        ),
    ),
    "CartPole": (
        Quantity("cart's position", "units", lambda w: [w.state[0]]),
        Quantity("pole's angle", "degrees", lambda w: [w.state[2]], "angle"),
    ),
    "MountainCar": (Quantity("car's position", "units", lambda w: [w.state[0]]),),
    "Pendulum": (Quantity("pendulum's angle", "degrees", lambda w: [w.state[0]], "angle"),),
    "Acrobot": (
        Quantity("first link's angle", "degrees", lambda w: [w.state[0]], "angle"),
        Quantity("second link's angle", "degrees", lambda w: [w.state[1]], "angle"),
    ),
    "gym_pusht/": (
        Quantity("block's position", "of 512 units", lambda w: list(w.block.position)),
        Quantity("block's angle", "degrees", lambda w: [w.block.angle], "angle"),
        Quantity("agent's position", "of 512 units", lambda w: list(w.agent.position)),
    ),
    # Addresses of the console's memory: Anand et al. 2019 (https://arxiv.org/abs/1906.08226), its table of Atari RAM.
    "ALE/Pong": (
        Quantity("ball's position", "pixels", _ram(49, 54)),
        Quantity("player's paddle", "pixels", _ram(51)),
    ),
}
"""How an environment's id begins, and what is known of its state. Any MuJoCo environment has its joints besides."""
_FIT_SEEDS = 1_000_000  # the episodes that the reader is fitted to have seeds so much higher
_HOLD = 6  # mean steps for which they hold an action
_JOINTS = Quantity("joints", "radians or metres", lambda w: [float(x) for x in w.data.qpos])


@dataclass(frozen=True)
class PhysicsConfig:
    """How the check is made."""

    episodes: int = 24
    """Episodes of the random policy in which model and simulator are compared."""
    horizon: int = 16
    """Frames ahead; a multiple of r."""
    fit_episodes: int = 60
    """Episodes of the simulator that the reader is fitted to."""
    fit_steps: int = 150
    """Steps of each."""
    frame_skip: int | None = None
    """Simulator frames per action; the one the model was trained with. None for the environment's own."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """How the reader is fitted."""
    seed: int = 500_000
    """Of the first compared episode; the reader is fitted to others."""


@dataclass(frozen=True)
class QuantityErrors:
    """Mean errors of one quantity, for each frame ahead from 1 to the horizon."""

    unit: str
    model: list[float]
    """As read off the model's frames, against the simulator's truth."""
    floor: list[float]
    """As read off the simulator's own frames."""
    still: list[float]
    """Of the true value at the last given frame."""
    spread: float
    """Of always claiming the middle of all compared states."""


@dataclass(frozen=True)
class PhysicsResult:
    """Model against simulator."""

    env_id: str
    errors: dict[str, QuantityErrors]
    episodes: int
    given: int
    """Frames given before the policy took over."""
    fitted: int
    """Real frames that the reader was fitted to."""
    shown: tuple[tuple[np.ndarray, np.ndarray], ...] = field(default=(), compare=False)
    """Some episodes as (simulator, model), uint8 ``(T + horizon, H, W, 3)``; not written to JSON."""

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PhysicsResult:
        """The reverse of ``dataclasses.asdict`` without frames."""
        errors = {name: QuantityErrors(**values) for name, values in plain["errors"].items()}
        return cls(**{**plain, "errors": errors})


def known_quantities(simulator: Simulator) -> tuple[Quantity, ...]:
    """What can be checked in an environment.

    Raises:
        WorldloomError: its state is not known here.
    """
    for prefix, quantities in QUANTITIES.items():
        if simulator.env_id.startswith(prefix):
            return quantities
    if simulator.family == "mujoco":
        return (_JOINTS,)
    raise WorldloomError(
        "the state of this environment is not known",
        got=simulator.env_id,
        do=f"use one whose id begins with {', '.join(QUANTITIES)}, a MuJoCo one, or give quantities= in Python",
    )


def measure_physics(
    pipeline: PredictPipeline,
    env_id: str,
    config: PhysicsConfig | None = None,
    *,
    quantities: Sequence[Quantity] | None = None,
    progress: Report | None = None,
) -> PhysicsResult:
    """Roll a random policy in a model and in the simulator it imitates.

    Args:
        quantities: what is compared; None takes what is known of the environment.

    Raises:
        WorldloomError: an environment that cannot be made, whose state is not known, whose actions the model does not
            know, or whose episodes end before the horizon.
    """
    from worldloom_curation.simulators import Simulator
    from worldloom_model_zoo.environment import WorldModelEnv

    config = config or PhysicsConfig()
    ratio, size = pipeline.frames_per_step, (pipeline.config.height, pipeline.config.width)
    if config.horizon % ratio or config.horizon < ratio:
        raise WorldloomError(f"the horizon must be a multiple of {ratio} frames", got=config.horizon)
    with Simulator(env_id, frame_skip=config.frame_skip, depth=False, segmentation=False) as simulator:
        chosen = tuple(quantities or known_quantities(simulator))
        worlds = WorldModelEnv(
            pipeline, action_space=simulator.space, action_names=simulator.action_names, num_envs=config.episodes
        )
        recorder = _Recorder(simulator, chosen, size)
        tests = _compared(recorder, config, worlds, progress)
        fits = _fitting(recorder, config, progress)

    given = worlds.context
    start = {
        "video": np.stack([test.frames[:given] for test in tests]),
        "actions": np.stack([test.known for test in tests]),
    }
    worlds.reset(seed=config.seed, options=start)
    parts = []
    for step in range(config.horizon // ratio):
        parts.append(worlds.step(np.stack([test.choices[step] for test in tests]))[4]["frames"])
        if progress is not None:
            progress(step + 1, config.horizon // ratio, "physics: the model")
    made = np.concatenate(parts, axis=1)  # (n, horizon, H, W, 3)

    reader = StateReader.fit(pipeline, fits, chosen, config.probe, progress)
    # The model's frames follow the start as the model sees it, not the sharper one of the simulator.
    known = np.stack([through_tokenizer(pipeline, test.frames[:given])[-LEAD:] for test in tests])
    states = [np.stack([test.states[i] for test in tests]) for i in range(len(chosen))]  # (n, T + horizon, k)
    last = [each[:, given - 1] for each in states]
    of_model = reader(np.concatenate([known, made], axis=1), last)
    of_truth = reader(np.stack([test.frames[given - LEAD :] for test in tests]), last)
    errors = {}
    for number, quantity in enumerate(chosen):
        truth = states[number][:, given:]
        errors[quantity.name] = QuantityErrors(
            quantity.unit,
            model=quantity.error(of_model[number], truth).mean(0).tolist(),
            floor=quantity.error(of_truth[number], truth).mean(0).tolist(),
            still=quantity.error(np.broadcast_to(last[number][:, None], truth.shape), truth).mean(0).tolist(),
            spread=quantity.spread(truth),
        )
    shown = tuple((test.frames, np.concatenate([test.frames[:given], made[i]])) for i, test in enumerate(tests[:6]))
    return PhysicsResult(env_id, errors, len(tests), given, reader.frames, shown)


# -- in the simulator ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Episode:
    """What the random policy did in the simulator."""

    frames: np.ndarray
    """uint8 ``(T + horizon, H, W, 3)``."""
    states: list[np.ndarray]
    """``(T + horizon, k)`` for each quantity."""
    known: np.ndarray
    """Actions between the given frames, as the model takes them ``(T - 1, a)``."""
    choices: list[np.ndarray]
    """The policy's choice in each step of `WorldModelEnv`."""


class _Recorder:
    """Frames and states of one episode after another."""

    def __init__(self, simulator: Simulator, quantities: Sequence[Quantity], size: tuple[int, int]) -> None:
        self.simulator, self.quantities, self.size = simulator, quantities, size
        self.frames: list[np.ndarray] = []
        self.states: list[list[Sequence[float]]] = []

    def reset(self, seed: int) -> None:
        self.frames, self.states = [], []
        self._take(self.simulator.reset(seed).frame)

    def step(self, action: Any) -> bool:
        """False where the episode is over; a last state that the simulator does not show is left out."""
        view, _, terminated, truncated = self.simulator.step(action)
        if view is not None:
            self._take(view.frame)
        return view is not None and not (terminated or truncated)

    def _take(self, frame: np.ndarray) -> None:
        self.frames.append(media.resize(frame, self.size))  # stretched, as recordings are
        self.states.append([quantity.read(self.simulator.world) for quantity in self.quantities])

    def since(self, first: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Frames, and the states of each quantity, from a frame on."""
        columns = zip(*self.states[first:], strict=True)
        return np.stack(self.frames[first:]), [np.array(column, np.float64) for column in columns]


def _compared(recorder: _Recorder, config: PhysicsConfig, worlds: Any, progress: Report | None) -> list[_Episode]:
    """Episodes of a random policy: some steps to get anywhere, the given frames, then one action for r frames each."""
    from worldloom_curation.simulators import encode_action, sample_action

    found: list[_Episode] = []
    space, ratio, given = recorder.simulator.space, worlds.frames_per_step, worlds.context
    for attempt in range(40 * config.episodes):
        random = np.random.default_rng(config.seed + attempt)
        recorder.reset(config.seed + attempt)
        before = int(random.integers(31)) if attempt % 2 else 0  # every other episode is looked at from its beginning
        first = before + given - 1  # the step in which the policy takes over
        vectors, choices, action = [], [], None
        for step in range(first + config.horizon):
            if (step - first) % ratio == 0 or action is None:
                action = sample_action(space, random)
            if step >= first and (step - first) % ratio == 0:
                choices.append(np.asarray(action))
            vectors.append(encode_action(space, action))
            if not recorder.step(action):
                break
        if len(recorder.frames) <= first + config.horizon:
            continue
        frames, states = recorder.since(before)
        known = worlds.align(np.array(vectors[before:first], np.float32).reshape(given - 1, -1))
        found.append(_Episode(frames, states, known, choices))
        if progress is not None:
            progress(len(found), config.episodes, "physics: the simulator")
        if len(found) == config.episodes:
            return found
    raise WorldloomError(
        f"episodes of a random policy end before {given} + {config.horizon} frames",
        got=f"{len(found)} of {config.episodes} lasted, in {recorder.simulator.env_id}",
        do="lower the horizon",
    )


def _fitting(
    recorder: _Recorder, config: PhysicsConfig, progress: Report | None
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Episodes to fit a reader to: frames and states. Actions are held for a while, so that places are seen."""
    from worldloom_curation.simulators import sample_action

    episodes = []
    for number in range(config.fit_episodes):
        random = np.random.default_rng(config.seed + _FIT_SEEDS + number)
        recorder.reset(config.seed + _FIT_SEEDS + number)
        left, action = 0, None
        for _ in range(config.fit_steps):
            if left == 0:
                action, left = sample_action(recorder.simulator.space, random), int(random.geometric(1 / _HOLD))
            left -= 1
            if not recorder.step(action):
                break
        episodes.append(recorder.since(0))
        if progress is not None:
            progress(number + 1, config.fit_episodes, "physics: real frames")
    return episodes
