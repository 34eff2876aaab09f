"""Any Gymnasium environment as a source of frames: RGB, depth and segmentation where the simulator has them.

ViZDoom gives all three from its buffers, MuJoCo from extra render passes, everything else its ``rgb_array``.
Actions are drawn here rather than with ``space.sample()``, so that a recording depends on its seed and not on how a
Gymnasium version draws.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import WorldloomError, missing_extra

_PLUGINS = (
    ("Vizdoom", "vizdoom.gymnasium_wrapper", "vizdoom", "curation"),
    ("ALE/", "ale_py", "ale-py", "sim"),
    ("MiniGrid-", "minigrid", "minigrid", ""),
    ("BabyAI-", "minigrid", "minigrid", ""),
    ("gym_pusht/", "gym_pusht", "gym-pusht", ""),
)
"""How an id begins, the module that registers it, its package, the extra that installs it (or none)."""


_SCRATCH = "worldloom-simulator-"


@dataclass
class View:
    """What the camera sees at one instant."""

    frame: np.ndarray
    """uint8 ``(h, w, 3)`` RGB."""
    depth: np.ndarray | None = None
    """uint8 or uint16 ``(h, w)``; `Simulator.depth_unit` says in what."""
    segmentation: np.ndarray | None = None
    """uint8 ``(h, w)``: indices into `Simulator.classes`."""


class Simulator:
    """One open environment. Close it, or use it as a context manager.

    Args:
        env_id: Gymnasium id, e.g. ``VizdoomBasic-v1`` or ``ALE/Pong-v5``.
        frame_skip: simulator frames per step; None for the environment's own.
        depth: ask for depth.
        segmentation: ask for segmentation.

    Raises:
        WorldloomError: no such environment, its package is missing, or it cannot render on this machine.
    """

    def __init__(
        self, env_id: str, *, frame_skip: int | None = None, depth: bool = True, segmentation: bool = True
    ) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise missing_extra("gymnasium", "curation") from error
        if frame_skip is not None and frame_skip < 1:
            raise WorldloomError("frame_skip must be at least 1", got=frame_skip)
        self.env_id, self.repeat = env_id, 1
        self.classes: list[str] = ["background"]
        self.depth_unit = ""
        self.want_depth, self.want_segmentation = depth, segmentation
        self.packages = {"gymnasium": importlib.metadata.version("gymnasium")}
        _register(env_id, self.packages)
        entry = _entry_point(gymnasium, env_id)
        self.family = next((name for name in ("vizdoom", "ale_py", "mujoco") if name in entry.partition(":")[0]), "")
        options: dict[str, Any] = {"disable_env_checker": True}
        self._scratch = contextlib.ExitStack()
        self._folder = ""
        if self.family in ("vizdoom", "mujoco"):
            self._folder = self._scratch.enter_context(
                tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True)
            )
        self._started = False
        if self.family == "vizdoom":
            _end_orphans()
            self.classes = ["wall", "floor or ceiling"]
            options |= {"doom_config_path": str(Path(self._folder) / "vizdoom.ini")}
            options |= {"depth_buffer_enabled": depth, "labels_buffer_enabled": segmentation}
            options |= {"frame_skip": frame_skip} if frame_skip else {}
            self._look: Callable[[Any], View | None] = self._look_vizdoom
        else:
            options["render_mode"] = "rgb_array"
            self._look = self._look_mujoco if self.family == "mujoco" else self._look_plain
            if self.family == "ale_py":
                options |= {"frameskip": frame_skip} if frame_skip else {}
            else:
                self.repeat = frame_skip or 1
        if self.family == "mujoco":
            _prepare_mujoco(self.packages)
        try:
            with self._engine_folder():
                self.env: Any = gymnasium.make(env_id, **options)
        except Exception as error:  # any package may raise anything while it builds its world
            self._scratch.close()
            raise WorldloomError(
                "the environment cannot be made",
                got=f"{env_id}: {type(error).__name__}: {error}",
                do=_render_hint(self),
            ) from error
        self.world: Any = self.env.unwrapped
        self.space: Any = self.env.action_space
        self.action_names = _action_names(self.space, self.world, self.family)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.env.close()
        self._scratch.close()

    @property
    def fps(self) -> float:
        """Steps per second of simulated time."""
        if self.family == "vizdoom":
            return 35.0 / self.world.frame_skip
        if self.family == "ale_py":
            # The console runs at 60 Hz; render_fps of the package ignores the frame skip.
            skip = self.world._frameskip
            return 60.0 / (skip if isinstance(skip, int) else sum(skip) / 2)
        return float(self.env.metadata.get("render_fps") or 30) / self.repeat

    def reset(self, seed: int) -> View:
        """Start the episode that `seed` names; returns its first view."""
        with self._engine_folder():
            observation, _ = self.env.reset(seed=seed)
            view = self._see(observation)
        self._started = True
        if view is None:
            raise WorldloomError("the environment shows nothing after reset", got=f"{self.env_id}, seed {seed}")
        return view

    def step(self, action: Any) -> tuple[View | None, float, bool, bool]:
        """(view or None where the simulator has no picture of its last state, reward, terminated, truncated)."""
        total, terminated, truncated, observation = 0.0, False, False, None
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self._see(observation), total, bool(terminated), bool(truncated)

    def _see(self, observation: Any) -> View | None:
        try:
            return self._look(observation)
        except WorldloomError:
            raise
        except Exception as error:  # renderers raise their own library's errors
            raise WorldloomError(
                "the environment cannot render here",
                got=f"{self.env_id}: {type(error).__name__}: {error}",
                do=_render_hint(self),
            ) from error

    def _look_plain(self, observation: Any) -> View:
        if isinstance(observation, dict) and "screen" in observation:
            return View(_rgb(observation["screen"], self.env_id))
        return View(_rgb(self.env.render(), self.env_id))

    def _look_vizdoom(self, observation: Any) -> View | None:
        state = self.world.state
        if state is None:  # the episode is over: the wrapper would show a black screen
            return None
        view = View(_rgb(observation["screen"], self.env_id))
        if self.want_depth:
            self.depth_unit = "ViZDoom depth buffer, 0 (near) to 255 (far)"
            view.depth = np.array(observation["depth"][..., 0], np.uint8)
        if self.want_segmentation:
            # 0 is walls and 1 floors and ceilings; the buffer numbers objects anew in every frame, a class by its name
            # keeps its number.
            table = np.zeros(256, np.uint8)
            table[1] = 1
            for label in state.labels:
                table[label.value] = self._class(label.object_name)
            view.segmentation = table[observation["labels"][..., 0]]
        return view

    def _look_mujoco(self, observation: Any) -> View:
        renderer = self.world.mujoco_renderer
        if not self.want_depth:
            view = View(_rgb(renderer.render("rgb_array"), self.env_id))
        else:
            frame, z = renderer.render("rgbd_tuple")
            view = View(_rgb(frame, self.env_id))
            # OpenGL's z in [0, 1] -> distance along the view axis.
            extent, clip = self.world.model.stat.extent, self.world.model.vis.map
            near, far = clip.znear * extent, clip.zfar * extent
            metres = near / (1 - np.asarray(z, np.float64) * (1 - near / far))
            self.depth_unit = "millimetre"
            view.depth = np.clip(np.rint(metres * 1000), 0, 65535).astype(np.uint16)
        if self.want_segmentation:
            view.segmentation = self._mujoco_segmentation(renderer)
        return view

    def _mujoco_segmentation(self, renderer: Any) -> np.ndarray:
        """Draw once more with every object in a colour that is its number (Gymnasium's own way fails with numpy 2)."""
        mujoco: Any = importlib.import_module("mujoco")
        viewer = renderer._get_viewer("rgbd_tuple" if self.want_depth else "rgb_array")
        flags = (int(mujoco.mjtRndFlag.mjRND_SEGMENT), int(mujoco.mjtRndFlag.mjRND_IDCOLOR))
        for flag in flags:
            viewer.scn.flags[flag] = 1
        try:
            colours = viewer.render("rgb_array", camera_id=renderer.camera_id).astype(np.int32)
        finally:
            for flag in flags:
                viewer.scn.flags[flag] = 0
        numbers = colours[..., 0] + (colours[..., 1] << 8) + (colours[..., 2] << 16)  # 0 is the background
        table = np.zeros(viewer.scn.ngeom + 1, np.uint8)
        seen = set(np.unique(numbers).tolist())
        for geom in viewer.scn.geoms[: viewer.scn.ngeom]:
            if geom.segid + 1 in seen and geom.objtype == int(mujoco.mjtObj.mjOBJ_GEOM):
                name = self.world.model.geom(geom.objid).name or f"geom {geom.objid}"
                table[geom.segid + 1] = self._class(name)
        return table[np.where(numbers < len(table), numbers, 0)]

    def _class(self, name: str) -> int:
        if name not in self.classes:
            if len(self.classes) > 255:
                return 0
            self.classes.append(name)
        return self.classes.index(name)

    @contextlib.contextmanager
    def _engine_folder(self) -> Iterator[None]:
        """Let engines that write settings and logs into the working directory start in the scratch folder."""
        if not self._folder or self._started:
            yield
            return
        before = Path.cwd()
        os.chdir(self._folder)
        try:
            yield
        finally:
            os.chdir(before)


def sample_action(space: Any, rng: np.random.Generator) -> Any:
    """A uniformly random action. Unbounded (or absurdly wide) coordinates are standard normal.

    Raises:
        WorldloomError: a kind of space that has no fixed size.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return int(space.start + rng.integers(space.n))
    if kind == "MultiBinary":
        return rng.integers(0, 2, space.shape, dtype=np.int8)
    if kind == "MultiDiscrete":
        return (space.start + rng.integers(0, space.nvec)).astype(space.dtype)
    if kind == "Box":
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = np.isfinite(low) & np.isfinite(high) & (high - low < 1e6)
        drawn = np.where(
            bounded,
            rng.uniform(np.where(bounded, low, 0), np.where(bounded, high, 1)),
            np.clip(rng.standard_normal(space.shape), low, high),
        )
        return np.clip(drawn.astype(space.dtype), space.low, space.high)
    if kind == "Dict":
        return {name: sample_action(part, rng) for name, part in space.spaces.items()}
    if kind == "Tuple":
        return tuple(sample_action(part, rng) for part in space.spaces)
    raise WorldloomError("actions of this kind of space cannot be recorded", got=space)


def encode_action(space: Any, action: Any) -> np.ndarray:
    """An action as a flat float32 vector: Discrete one-hot, everything else its numbers, parts joined in order."""
    kind = type(space).__name__
    if kind == "Discrete":
        vector = np.zeros(int(space.n), np.float32)
        vector[int(action) - int(space.start)] = 1
        return vector
    if kind == "Dict":
        return np.concatenate([encode_action(part, action[name]) for name, part in space.spaces.items()])
    if kind == "Tuple":
        return np.concatenate([encode_action(part, item) for part, item in zip(space.spaces, action, strict=True)])
    return np.asarray(action, np.float32).reshape(-1)


def _action_names(space: Any, world: Any, family: str) -> list[str]:
    """A name for each entry of the encoded action."""
    kind = type(space).__name__
    if family == "vizdoom":
        buttons = [button.name for button in world.game.get_available_buttons()]
        if kind == "Discrete":
            chosen = [[buttons[i] for i in np.flatnonzero(pressed)] for pressed in world.button_map]
            return ["+".join(names) or "NOOP" for names in chosen]
        if kind in ("MultiBinary", "MultiDiscrete", "Box"):
            return buttons
    if kind == "Discrete":
        if hasattr(world, "get_action_meanings"):
            return [str(name) for name in world.get_action_meanings()]
        names = getattr(world, "actions", None)
        if isinstance(names, type) and hasattr(names, "__members__") and len(names.__members__) == space.n:
            return list(names.__members__)
        return [f"action {int(space.start) + i}" for i in range(int(space.n))]
    if kind == "Dict":
        return [f"{key}: {name}" for key, part in space.spaces.items() for name in _action_names(part, world, "")]
    if kind == "Tuple":
        return [f"{i}: {name}" for i, part in enumerate(space.spaces) for name in _action_names(part, world, "")]
    return [f"axis {i}" for i in range(int(np.prod(space.shape)))]


def _register(env_id: str, packages: dict[str, str]) -> None:
    module, colon, _ = env_id.partition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise WorldloomError(
                f"the package that registers the environment is not installed: {error}", got=env_id
            ) from error
    for prefix, module, package, extra in _PLUGINS:
        if env_id.startswith(prefix):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # pygame and friends, while they are imported
                    imported = importlib.import_module(module)
            except ImportError as error:
                if extra:
                    raise missing_extra(package, extra) from error
                raise WorldloomError(f"{package} is not installed", do=f"pip install {package}") from error
            packages[package] = importlib.metadata.version(package)
            if prefix == "ALE/":
                import gymnasium

                gymnasium.register_envs(imported)
                # Its banner goes to stderr once per environment.
                imported.ALEInterface.setLoggerMode(imported.LoggerMode.Error)


def _end_orphans() -> None:
    """End ViZDoom engines whose recorder was killed: they wait for it for ever. Linux only.

    An engine's command line names the scratch folder of its recorder, and the folder's name holds the recorder's pid;
    only engines of recorders that are gone are ended.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        owner = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if Path("/proc", owner).exists():
            continue
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    shutil.rmtree(folder, ignore_errors=True)


def _entry_point(gymnasium: Any, env_id: str) -> str:
    try:
        entry = gymnasium.spec(env_id).entry_point
    except gymnasium.error.Error as error:
        raise WorldloomError(
            "Gymnasium knows no such environment",
            got=f"{env_id}: {error}",
            do="check the id, or write module:Id where a package registers it, e.g. my_package:MyEnv-v0",
        ) from error
    return entry if isinstance(entry, str) else str(getattr(entry, "__module__", ""))


def _prepare_mujoco(packages: dict[str, str]) -> None:
    # Read once, when mujoco is imported; without a display only EGL (GPU or Mesa) and OSMesa work.
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        packages["mujoco"] = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError as error:
        raise missing_extra("mujoco", "sim") from error


def _render_hint(simulator: Simulator) -> str:
    if simulator.family == "mujoco":
        library = {"egl": "libEGL (Debian: libegl1)", "osmesa": "libOSMesa (Debian: libosmesa6)"}
        wanted = os.environ.get("MUJOCO_GL", "glfw")
        return (
            f"MuJoCo draws through MUJOCO_GL={wanted}, which needs {library.get(wanted, 'libGL and a display')}; "
            "install it, or set MUJOCO_GL to egl, osmesa or glfw"
        )
    return "check that the environment supports render_mode='rgb_array' and that its packages are installed"


def _rgb(image: Any, env_id: str) -> np.ndarray:
    """uint8 ``(h, w, 3)`` of what an environment shows; grey becomes RGB."""
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise WorldloomError(
            "the environment's picture is not uint8 (h, w, 3)", got=f"{env_id}: {type(image).__name__}"
        )
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
