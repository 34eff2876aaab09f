"""A world model as a Gymnasium environment: agents act in it as they would in a simulator.

`WorldModelEnv` runs a batch of worlds as a `gymnasium.vector.VectorEnv`, `SingleWorldModelEnv` one world as a
`gymnasium.Env`. Both are registered, so that ``gymnasium.make("worldloom_model_zoo.environment:worldloom/World-v0",
model="loom-world-nano", starts="data/maze")`` and ``gymnasium.make_vec`` with ``num_envs`` make them.

One step of an environment is one step of the model: r = ``frames_per_step`` video frames. An action is held for all of
them, as frame skipping does in a simulator, or a step takes ``actions_per_step`` of them, each held for its share. The
observation is the newest frame; ``infos["frames"]`` has all r.

A model's `reset` starts a whole batch, while episodes of a batch end one by one. Worlds that start together form a
group that is stepped as one batch by a shallow copy of the model, which shares its weights: so no world notices the
others' resets. Worlds that ended stay in their group's batch until it is empty, and cost what a live one costs.

Letters: n worlds, r video frames of a step, a action size, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom import media
from worldloom.errors import WorldloomError, missing_extra
from worldloom.protocols import Steps, capabilities
from worldloom.shards import Dataset
from worldloom_model_zoo.starts import Start, StartPool, discrete_size, one_hot

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise missing_extra("gymnasium", "curation") from error

Head = Callable[[Tensor], Any]
"""Latent frames before and after a step, ``(n, 2, c, h, w)`` -> a number or a truth value for each world."""
Starts = StartPool | Dataset | str | Path | Sequence[np.ndarray]


@dataclass
class _Group:
    """Worlds that started together."""

    world: Steps
    rows: np.ndarray
    """Place of each world of the batch in the environment; -1 for one that left."""
    encoder: dict[Any, Tensor] = field(default_factory=dict)
    """State of the streaming encoder that heads see through."""
    latents: Tensor | None = None
    """The last latent frame of each world ``(b, c, h, w)``, where there are heads."""


class WorldModelEnv(VectorEnv):
    """Worlds of a model as a vectorised environment.

    ``reset(seed=...)`` decides the starts and the noise. Its options: ``video``, uint8 ``(T, H, W, 3)`` for all worlds
    or ``(n, T, H, W, 3)``, of which the last 1 + r k frames are the start, with ``actions`` ``(T-1, a)`` or
    ``(n, T-1, a)`` in the model's order where they are known; ``clip``, a clip of the pool by number or id or one for
    each world, with ``frame``, where it starts; ``reset_mask``, bool ``(n,)``: which worlds. ``infos["start"]`` says
    what was drawn.

    Args:
        model: what is stepped, or its name.
        starts: where worlds begin: a dataset of clips with its actions, or videos. None: every reset is given one.
        num_envs: n.
        max_steps: an episode is truncated after so many steps; None never.
        action_space: what an agent chooses at once: ``Discrete`` (one-hot to the model), ``Box`` or ``MultiBinary`` of
            the model's action size. None takes it from the dataset: Discrete where every recorded action is one-hot,
            otherwise a Box of the range of the recorded actions.
        action_names: of the components of a given ``action_space``, to match them with the model's; empty if they are
            the model's own.
        actions_per_step: actions taken in a step, a divisor of r; above 1 the space has one more axis.
        context: frames of a start, 1 + r k; None takes the model's.
        reward: a head; without one every reward is 0.
        termination: a head; without one no episode terminates.
        encoder: tokenizer whose latents the heads see; None takes the model's.
        size: (height, width) of the frames; None takes the model's, else that of the starts.
        prompt: what the worlds are, for models that take text.
        autoreset_mode: Gymnasium's: next step, same step or disabled.
        render_mode: ``rgb_array`` or None.
        device: where a model that is given by name is loaded.

    Raises:
        WorldloomError: a model that cannot be stepped, or one of the above that does not fit it.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's declaration

    def __init__(
        self,
        model: Steps | str,
        starts: Starts | None = None,
        *,
        num_envs: int = 1,
        max_steps: int | None = None,
        action_space: spaces.Space[Any] | None = None,
        action_names: Sequence[str] = (),
        actions_per_step: int = 1,
        context: int | None = None,
        reward: Head | None = None,
        termination: Head | None = None,
        encoder: Any = None,
        size: tuple[int, int] | None = None,
        prompt: str = "",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        device: str = "cpu",
    ) -> None:
        if isinstance(model, str):
            from worldloom.loading import load_model

            model = load_model(model, device=device)
        if not isinstance(model, Steps) or "Steps" not in capabilities(model):
            raise WorldloomError("this model cannot be stepped", got=type(model).__name__, do="give a causal one")
        if num_envs < 1 or (max_steps is not None and max_steps < 1):
            raise WorldloomError("num_envs and max_steps must be at least 1", got=(num_envs, max_steps))
        if render_mode not in (None, "rgb_array"):
            raise WorldloomError("frames are rendered as rgb_array", got=render_mode)
        self.model, self.num_envs, self.max_steps, self.render_mode = model, num_envs, max_steps, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.frames_per_step = model.frames_per_step
        self.actions_per_step = actions_per_step
        if actions_per_step < 1 or self.frames_per_step % actions_per_step:
            raise WorldloomError(
                f"actions_per_step divides the {self.frames_per_step} frames of a step", got=actions_per_step
            )
        config: Any = getattr(model, "config", None)
        if size is None and hasattr(config, "height") and hasattr(config, "width"):
            size = (config.height, config.width)
        pool = starts
        if pool is not None and not isinstance(pool, StartPool):
            pool = StartPool(pool, size)
        self.pool, self.size = pool, size or _first_size(pool)
        default = getattr(getattr(model, "sampler", None), "context_frames", 1 + self.frames_per_step)
        self.context = default if context is None else context
        if self.context < 1 or (self.context - 1) % self.frames_per_step:
            raise WorldloomError(f"context must be 1 + {self.frames_per_step}k frames", got=self.context)
        self._choices = action_space if action_space is not None else _space_of(pool, model.action_dim)
        self._names = tuple(action_names) if action_space is not None or pool is None else pool.action_names
        _check_space(self._choices, model, self._names)
        self._reward, self._termination, self._prompt = reward, termination, prompt
        self._encoder: Any = encoder if encoder is not None else getattr(model, "tokenizer", None)
        if (reward or termination) and self._encoder is None:
            raise WorldloomError("heads see latents, and the model has no tokenizer", do="give encoder=")

        self.single_observation_space = spaces.Box(0, 255, (*self.size, 3), np.uint8)
        self.single_action_space = _repeated(self._choices, actions_per_step)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        fps = getattr(config, "fps", 30.0) / self.frames_per_step
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode, "render_fps": fps}
        self._groups: list[_Group] = []
        self._observations = np.zeros((num_envs, *self.size, 3), np.uint8)
        self._steps = np.zeros(num_envs, int)
        self._done = np.zeros(num_envs, bool)
        self._started = np.zeros(num_envs, bool)

    # -- Gymnasium ------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start worlds; returns their newest frames uint8 ``(n, H, W, 3)``, as the model sees them, and infos.

        Raises:
            WorldloomError: no start, or one that does not fit.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(_mask(mask, self.num_envs))
        infos: dict[str, Any] = {}
        self._begin(rows, self._chosen(rows, options), infos)
        return self._observations.copy(), infos

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every world: observations, rewards float64, terminations, truncations, infos.

        A world that ended before is started anew in place of a step (`AutoresetMode.NEXT_STEP`).

        Raises:
            WorldloomError: worlds that were not reset, or actions outside the action space.
        """
        if not self._started.all():
            raise WorldloomError("these worlds have no start yet", got=np.flatnonzero(~self._started), do="call reset")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._done.any():
            raise WorldloomError(
                "these worlds have ended", got=np.flatnonzero(self._done), do="reset them with options reset_mask"
            )
        vectors = self._vectors(actions)
        infos: dict[str, Any] = {}
        over = np.flatnonzero(self._done)
        rewards, terminations = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if len(over):
            self._begin(over, self._drawn(over), infos)
        for group in self._groups:
            live = np.flatnonzero((group.rows >= 0) & ~np.isin(group.rows, over))
            if not len(live):
                continue
            rows = group.rows[live]
            given = vectors.new_zeros(len(group.rows), *vectors.shape[1:])
            given[live] = vectors[rows]
            video = group.world.step(given)
            made = media.to_frames(video)[live]
            self._observations[rows] = made[:, -1]
            self._steps[rows] += 1
            if self._reward or self._termination:
                pair = self._look(group, video)[live]
                if self._reward:
                    rewards[rows] = _values(self._reward(pair), len(rows), float)
                if self._termination:
                    terminations[rows] = _values(self._termination(pair), len(rows), bool)
            for row, frames in zip(rows, made, strict=True):
                self._add_info(infos, {"frames": frames}, int(row))
        truncations = self._steps >= self.max_steps if self.max_steps else np.zeros(self.num_envs, bool)
        self._done = terminations | truncations
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._done.any():
            ended = np.flatnonzero(self._done)
            for row in ended:
                final = {"frames": infos["frames"][row].copy()}
                self._add_info(infos, {"final_obs": self._observations[row].copy(), "final_info": final}, int(row))
            self._begin(ended, self._drawn(ended), infos)
        return self._observations.copy(), rewards, terminations, truncations, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The newest frame of each world, uint8 ``(H, W, 3)``; None without a render mode."""
        return tuple(frame.copy() for frame in self._observations) if self.render_mode else None

    def close_extras(self, **kwargs: Any) -> None:
        """Forget the worlds; the model stays."""
        self._groups = []
        self._started[:] = False

    # -- worlds ---------------------------------------------------------------------------------------------------

    def _begin(self, rows: np.ndarray, starts: Sequence[Start], infos: dict[str, Any]) -> None:
        """Take worlds out of their groups and start them together."""
        for group in self._groups:
            group.rows[np.isin(group.rows, rows)] = -1
        self._groups = [group for group in self._groups if (group.rows >= 0).any()]
        lengths = {len(start.frames) for start in starts}
        assert len(lengths) == 1, lengths
        video = media.to_tensor(np.stack([start.frames for start in starts]))
        actions = None
        if all(start.actions is not None for start in starts):
            stacked = np.stack([np.asarray(start.actions, np.float32) for start in starts])
            actions = torch.from_numpy(stacked) if stacked.shape[1] else None
        # A session of its own on the same weights.
        group = _Group(copy.copy(self.model), rows.copy())
        text: dict[str, Any] = {"text": [self._prompt] * len(rows)} if self._prompt else {}
        seen = group.world.reset(video, actions, seed=int(self.np_random.integers(1 << 31)), **text)
        self._observations[rows] = media.to_frames(seen[:, :, -1:])[:, 0]
        if self._reward or self._termination:
            self._look(group, seen)
        self._groups.append(group)
        self._steps[rows], self._done[rows], self._started[rows] = 0, False, True
        for row, start in zip(rows, starts, strict=True):
            self._add_info(infos, {"start": start.source}, int(row))

    @torch.no_grad()
    def _look(self, group: _Group, video: Tensor) -> Tensor:
        """Encode new frames of a group; returns its last latent frame before and after, ``(b, 2, c, h, w)``."""
        latents = self._encoder.encode_step(video, group.encoder)[:, :, -1]
        before = latents if group.latents is None else group.latents
        group.latents = latents
        return torch.stack([before, latents], dim=1)

    def _drawn(self, rows: np.ndarray) -> list[Start]:
        if self.pool is None:
            raise WorldloomError(
                "there is nothing to start a world from", do="give starts=, or reset(options={'video': frames})"
            )
        drawn = [self.pool.draw(self.np_random, self.context) for _ in rows]
        return [self._aligned(start) for start in drawn]

    def _chosen(self, rows: np.ndarray, options: dict[str, Any]) -> list[Start]:
        """Starts that the options of a reset name, else drawn ones."""
        unknown = set(options) - {"video", "actions", "clip", "frame"}
        if unknown:
            raise WorldloomError(
                "a reset has no such option", got=sorted(unknown), do="use video, actions, clip, frame, reset_mask"
            )
        if "video" in options:
            return self._given(options["video"], options.get("actions"), rows)
        if "clip" in options:
            if self.pool is None:
                raise WorldloomError("there is no pool to take a clip from", got=options["clip"], do="give starts=")
            clips, frames = (
                [value] * self.num_envs if isinstance(value, (str, int, np.integer)) else list(value)
                for value in (options["clip"], options.get("frame", 0))
            )
            if len(clips) != self.num_envs or len(frames) != self.num_envs:
                raise WorldloomError(f"give one clip and frame, or {self.num_envs}", got=(len(clips), len(frames)))
            return [self._aligned(self.pool.at(clips[row], int(frames[row]), self.context)) for row in rows]
        return self._drawn(rows)

    def _given(self, video: Any, actions: Any, rows: np.ndarray) -> list[Start]:
        video = np.asarray(video)
        if video.ndim == 4:
            video = np.broadcast_to(video, (self.num_envs, *video.shape))
        if video.ndim != 5 or video.dtype != np.uint8 or len(video) != self.num_envs or not video.shape[1]:
            raise WorldloomError(
                f"a start is uint8 (T, H, W, 3) or ({self.num_envs}, T, H, W, 3), at least one frame",
                got=f"{video.dtype} {video.shape}",
            )
        length = (video.shape[1] - 1) // self.frames_per_step * self.frames_per_step + 1
        known: list[np.ndarray | None] = [None] * self.num_envs
        if actions is not None:
            given = np.asarray(actions, np.float32)
            given = np.broadcast_to(given, (self.num_envs, *given.shape)) if given.ndim == 2 else given
            expected = (self.num_envs, video.shape[1] - 1, self.model.action_dim)
            if given.shape != expected:
                raise WorldloomError(f"actions of the start are {expected}", got=given.shape)
            known = list(given[:, given.shape[1] - length + 1 :])
        fitted = [media.fit(np.ascontiguousarray(video[row, -length:]), self.size) for row in rows]
        return [Start(frames, known[row], "given") for row, frames in zip(rows, fitted, strict=True)]

    def _aligned(self, start: Start) -> Start:
        """A start of the pool with its actions in the model's order."""
        if start.actions is None or not self.model.action_dim:
            return Start(start.frames, None, start.source)
        assert self.pool is not None
        actions = _align(self.model, torch.from_numpy(start.actions)[None], self.pool.action_names)[0].numpy()
        return Start(start.frames, actions, start.source)

    def align(self, actions: np.ndarray) -> np.ndarray:
        """Actions ``(t, k)`` of the environment's components, as the model takes them ``(t, a)``."""
        return _align(self.model, torch.from_numpy(actions)[None], self._names)[0].numpy()

    # -- actions --------------------------------------------------------------------------------------------------

    def _vectors(self, actions: Any) -> Tensor:
        """What an agent chose, as the model takes it: ``(n, r, a)``."""
        array = np.asarray(actions)
        space = self.action_space
        if array.shape != space.shape or not space.contains(array.astype(space.dtype)):
            raise WorldloomError("these actions are not in the action space", got=actions, do=f"give one of {space}")
        array = array if self.actions_per_step > 1 else array[:, None]  # (n, k, ...)
        choices = self._choices
        if isinstance(choices, spaces.Discrete):
            vectors = np.eye(int(choices.n), dtype=np.float32)[array - int(choices.start)]
        else:
            vectors = array.astype(np.float32)
        held = vectors.repeat(self.frames_per_step // self.actions_per_step, axis=1)  # (n, r, a)
        return _align(self.model, torch.from_numpy(held), self._names)


class SingleWorldModelEnv(gymnasium.Env):
    """One world of a model as an environment: `WorldModelEnv` of one, with the same arguments and options.

    An episode that ended is started anew by `reset`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's declaration

    def __init__(self, model: Steps | str, starts: Starts | None = None, **options: Any) -> None:
        self.worlds = WorldModelEnv(model, starts, num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **options)
        self.observation_space = self.worlds.single_observation_space
        self.action_space = self.worlds.single_action_space
        self.render_mode = self.worlds.render_mode
        self.metadata = {**self.metadata, "render_fps": self.worlds.metadata["render_fps"]}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the world; returns its newest frame uint8 ``(H, W, 3)`` and infos."""
        super().reset(seed=seed)
        self.worlds.np_random = self.np_random
        observations, infos = self.worlds.reset(options=options)
        return observations[0], _of_first(infos)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance the world by one step of the model."""
        made, rewards, terminations, truncations, infos = self.worlds.step(np.asarray(action)[None])
        return made[0], float(rewards[0]), bool(terminations[0]), bool(truncations[0]), _of_first(infos)

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The newest frame; None without a render mode."""
        frames = self.worlds.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Forget the world; the model stays."""
        self.worlds.close()


gymnasium.register(
    "worldloom/World-v0",
    entry_point="worldloom_model_zoo.environment:SingleWorldModelEnv",
    vector_entry_point="worldloom_model_zoo.environment:WorldModelEnv",
)


# -- spaces ----------------------------------------------------------------------------------------------------------


def _space_of(pool: StartPool | None, action_dim: int) -> spaces.Space[Any]:
    """The action space of recorded episodes."""
    if not action_dim:
        raise WorldloomError("this model takes no actions", do="give a model that was trained with actions")
    if pool is None or not pool.action_dim:
        raise WorldloomError(
            f"nothing says what the {action_dim} numbers of an action mean",
            do=f"give action_space=gymnasium.spaces.Discrete({action_dim}) for choices, a Box for numbers, or starts "
            "from a dataset with actions",
        )
    if n := discrete_size(pool.metadata.get("action_space")):
        return spaces.Discrete(n)
    recorded = [pool.whole(number).actions for number in list(pool.samples())[:64]]
    actions = np.concatenate([part for part in recorded if part is not None])
    if one_hot(actions):
        return spaces.Discrete(actions.shape[1])
    return spaces.Box(actions.min(0), actions.max(0), dtype=np.float32)


def _check_space(space: spaces.Space[Any], model: Steps, names: tuple[str, ...]) -> None:
    size = int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape or (0,)))
    if not isinstance(space, (spaces.Discrete, spaces.Box, spaces.MultiBinary)) or len(space.shape or ()) > 1:
        raise WorldloomError("actions are Discrete, or a Box or MultiBinary of one axis", got=space)
    _align(model, torch.zeros(1, 1, size), names)


def _repeated(space: spaces.Space[Any], k: int) -> spaces.Space[Any]:
    """k actions of a space as one."""
    if k == 1:
        return copy.deepcopy(space)
    if isinstance(space, spaces.Discrete):
        return spaces.MultiDiscrete(np.full(k, space.n), start=np.full(k, space.start))
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary((k, *space.shape))
    assert isinstance(space, spaces.Box)
    return spaces.Box(np.stack([space.low] * k), np.stack([space.high] * k), dtype=np.float32)


def _align(model: Steps, actions: Tensor, names: tuple[str, ...]) -> Tensor:
    """Actions ``(b, n, k)`` in the model's order and size; models without names take their own size only."""
    if hasattr(model, "align"):
        return model.align(actions, names)  # pyright: ignore[reportAttributeAccessIssue]
    if actions.shape[-1] != model.action_dim:
        raise WorldloomError(
            "the actions have another size than the model's", got=actions.shape[-1], do=f"give {model.action_dim}"
        )
    return actions


def _first_size(pool: StartPool | None) -> tuple[int, int]:
    if pool is None:
        raise WorldloomError("nothing says how large the frames are", do="give size=(height, width)")
    height, width = pool.whole(0).frames.shape[1:3]
    return height, width


def _mask(mask: Any, n: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != (n,) or mask.dtype != bool or not mask.any():
        raise WorldloomError(f"reset_mask is bool ({n},) with at least one True", got=f"{mask.dtype} {mask.shape}")
    return mask


def _values(values: Any, n: int, kind: type) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (n,):
        raise WorldloomError(f"a head gives one value for each of {n} worlds", got=array.shape)
    return array.astype(kind)


def _of_first(infos: Mapping[str, Any]) -> dict[str, Any]:
    """Infos of the only world."""
    return {key: values[0] for key, values in infos.items() if not key.startswith("_")}
