"""The recorder: what is on disk is what the simulator showed, in step with the actions, and the same every time."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from worldloom import media
from worldloom.artifacts import Store, tree_digest
from worldloom.errors import WorldloomError
from worldloom.shards import Dataset, open_dataset

gymnasium = pytest.importorskip("gymnasium")

from worldloom_curation import simulators  # noqa: E402
from worldloom_curation.record import record, record_command  # noqa: E402

TINY: dict[str, Any] = {"size": (24, 32), "max_steps": 12, "quiet": True}


class Echo(gymnasium.Env):
    """Shows, as grey levels, how many steps were taken (left) and which action was the last (right)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(self, render_mode: str | None = None, ends_after: int = 1000) -> None:
        self.render_mode, self.ends_after = render_mode, ends_after
        self.action_space = gymnasium.spaces.Discrete(5, start=2)
        self.observation_space = gymnasium.spaces.Box(0, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps, self.last, self.tint = 0, 0, int(self.np_random.integers(256))
        return np.zeros(1, np.float32), {}

    def step(self, action: int):
        self.steps, self.last = self.steps + 1, int(action)
        return np.zeros(1, np.float32), float(action) / 2, self.steps >= self.ends_after, False, {}

    def render(self):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[:, :8], frame[:, 8:], frame[..., 2] = self.steps % 256, self.last * 10, self.tint
        return frame


@pytest.fixture(autouse=True)
def echo():
    gymnasium.register("WorldloomEcho-v0", Echo)
    gymnasium.register("WorldloomEchoShort-v0", Echo, kwargs={"ends_after": 4})
    yield
    for name in ("WorldloomEcho-v0", "WorldloomEchoShort-v0"):
        del gymnasium.registry[name]


def made(env_id: str, episodes: int, out: Path, **changes: Any) -> Dataset:
    index = record(env_id, episodes, out, store=Store(out.parent / "store"), **{**TINY, **changes})
    dataset = open_dataset(out)
    assert dataset.index == index
    assert dataset.verify() == []
    return dataset


def test_frames_and_actions_are_in_step(tmp_path: Path) -> None:
    dataset = made("WorldloomEcho-v0", 3, tmp_path / "out", size=None, policy="random")
    assert (dataset.index.samples, dataset.index.frames, dataset.index.action_dim) == (3, 39, 5)
    assert (dataset.index.fps, dataset.index.size) == (10.0, (16, 16))
    for episode, sample in enumerate(dataset):
        frames, actions = media.read_frames(sample.video or b""), sample.arrays["actions"]
        assert len(frames) == sample.clip.frames == 13
        assert actions.shape == (12, 5)
        np.testing.assert_array_equal(actions.sum(1), 1)
        np.testing.assert_array_equal(frames[:, 0, 0, 0], np.arange(13))  # frame 0 is the one after reset
        taken = actions.argmax(1) + 2
        np.testing.assert_array_equal(frames[1:, 0, 15, 0], taken * 10)  # actions[t] leads to frame t+1
        np.testing.assert_array_equal(sample.arrays["rewards"], taken / 2)
        assert sample.clip.metadata["episode"] == episode
        assert sample.clip.metadata["seed"] == episode
        assert not sample.clip.metadata["terminated"]
        assert sample.clip.metadata["truncated"]
    assert len({media.read_frames(s.video or b"")[0, 0, 0, 2] for s in dataset}) == 3  # each episode has its own seed


def test_an_episode_that_ends(tmp_path: Path) -> None:
    (sample,) = made("WorldloomEchoShort-v0", 1, tmp_path / "out")
    assert sample.clip.frames == 5
    assert sample.clip.metadata["terminated"]
    assert not sample.clip.metadata["truncated"]


def test_frame_skip_repeats_the_action_and_adds_rewards(tmp_path: Path) -> None:
    (sample,) = made("WorldloomEcho-v0", 1, tmp_path / "out", size=None, frame_skip=3)
    frames = media.read_frames(sample.video or b"")
    np.testing.assert_array_equal(frames[:, 0, 0, 0], 3 * np.arange(13))
    np.testing.assert_allclose(sample.arrays["rewards"], 3 * (sample.arrays["actions"].argmax(1) + 2) / 2)
    assert sample.clip.fps == pytest.approx(10 / 3)


def test_episodes_do_not_depend_on_those_before(tmp_path: Path) -> None:
    long = made("WorldloomEcho-v0", 4, tmp_path / "a", seed=5)
    short = made("WorldloomEcho-v0", 1, tmp_path / "b", seed=7)
    np.testing.assert_array_equal(long.load(2).arrays["actions"], short.load(0).arrays["actions"])
    assert long.load(2).video == short.load(0).video


@pytest.mark.parametrize(
    ("policy", "hold", "mean"), [("random", 4.0, 1.25), ("sticky", 4.0, 5.0), ("sticky", 1.0, 1.25)]
)
def test_sticky_holds_actions(policy: Any, hold: float, mean: float, tmp_path: Path) -> None:
    """Runs of equal actions: a fifth of the draws repeat the one before, so runs are 5/4 as long as a hold."""
    (sample,) = made("WorldloomEcho-v0", 1, tmp_path / "out", max_steps=1000, policy=policy, hold=hold)
    changes = np.count_nonzero(np.diff(sample.arrays["actions"].argmax(1))) + 1
    assert 1000 / changes == pytest.approx(mean, rel=0.12)


def test_vizdoom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vizdoom")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dataset = made("VizdoomMyWayHome-v1", 2, tmp_path / "a", frame_skip=2)
    assert (dataset.index.fps, dataset.index.size, dataset.index.frames) == (17.5, (24, 32), 26)
    assert dataset.index.metadata["action_names"][0] == "NOOP"
    assert "MOVE_FORWARD" in dataset.index.metadata["action_names"]
    for sample in dataset:
        frames = media.read_frames(sample.video or b"")
        depth, segmentation = sample.arrays["depth"], sample.arrays["segmentation"]
        assert depth.shape == segmentation.shape == frames.shape[:3] == (13, 24, 32)
        assert depth.dtype == segmentation.dtype == np.uint8
        assert frames.std() > 10
        assert len(np.unique(depth)) > 3
        assert set(np.unique(segmentation)) <= set(range(len(sample.clip.metadata["segmentation_classes"])))
        assert sample.clip.metadata["segmentation_classes"][:2] == ["wall", "floor or ceiling"]
        assert (segmentation[:, -1] == 1).mean() > 0.5  # the floor is at the bottom
        assert sample.clip.metadata["packages"]["vizdoom"]
    again = made("VizdoomMyWayHome-v1", 2, tmp_path / "b", frame_skip=2)
    assert tree_digest(again.root / "shards") == tree_digest(dataset.root / "shards")
    assert again.index.id == dataset.index.id
    assert not list((tmp_path / "here").iterdir())  # the engine litters where it starts
    assert Path.cwd() == tmp_path / "here"


def test_vizdoom_actions_replay_to_the_same_frames(tmp_path: Path) -> None:
    """The recording is a recording of the simulator: its own wrapper, given the seed and the actions, shows it."""
    pytest.importorskip("vizdoom")
    (sample,) = made("VizdoomBasic-v1", 1, tmp_path / "out", size=None, seed=11)
    frames = media.read_frames(sample.video or b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make("VizdoomBasic-v1", doom_config_path=str(tmp_path / "v.ini"), disable_env_checker=True)
    cwd = Path.cwd()
    os.chdir(tmp_path)
    try:
        observation, _ = env.reset(seed=11)
        np.testing.assert_array_equal(frames[0], observation["screen"])
        for frame, action in zip(frames[1:], sample.arrays["actions"], strict=True):
            observation, *_ = env.step(int(action.argmax()))
            np.testing.assert_array_equal(frame, observation["screen"])
    finally:
        os.chdir(cwd)
        env.close()


def test_vizdoom_has_no_black_last_frame(tmp_path: Path) -> None:
    """Its wrapper shows a black screen when an episode is over; that frame and its action are left out."""
    pytest.importorskip("vizdoom")
    (sample,) = made("VizdoomBasic-v1", 1, tmp_path / "out", frame_skip=10, max_steps=400, seed=1)
    assert sample.clip.frames < 401
    assert sample.arrays["actions"].shape[0] == sample.arrays["rewards"].shape[0] == sample.clip.frames - 1
    assert media.read_frames(sample.video or b"")[-1].mean() > 5
    assert "dropped_final_reward" in sample.clip.metadata
    assert sample.clip.metadata["terminated"] or sample.clip.metadata["truncated"]


def test_ale(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    dataset = made("ALE/Pong-v5", 2, tmp_path / "a")
    assert dataset.index.metadata["action_names"] == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    assert dataset.index.fps == 15.0  # 60 Hz, four frames a step
    assert set(dataset.load(0).arrays) == {"actions", "rewards"}
    again = made("ALE/Pong-v5", 2, tmp_path / "b")
    assert tree_digest(again.root / "shards") == tree_digest(dataset.root / "shards")


def mujoco_renders() -> bool:
    if importlib.util.find_spec("mujoco") is None:
        return False
    code = (
        "import gymnasium as g; e = g.make('InvertedPendulum-v5', render_mode='rgb_array', width=8, height=8);"
        "e.reset(); e.render(); e.close()"
    )
    environment = {"MUJOCO_GL": "egl"} | os.environ
    return (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120).returncode == 0
    )


@pytest.mark.filterwarnings("ignore")  # PyOpenGL and gymnasium's viewers warn while they are loaded and freed
def test_mujoco(tmp_path: Path) -> None:
    if not mujoco_renders():
        pytest.skip("MuJoCo is not installed or cannot render here (no EGL)")
    (sample,) = made("HalfCheetah-v5", 1, tmp_path / "out", size=(48, 48), max_steps=3)
    depth, segmentation = sample.arrays["depth"], sample.arrays["segmentation"]
    classes = sample.clip.metadata["segmentation_classes"]
    assert sample.clip.metadata["depth_unit"] == "millimetre"
    assert depth.dtype == np.uint16
    assert {"floor", "torso"} <= set(classes)
    floor, torso = segmentation == classes.index("floor"), segmentation == classes.index("torso")
    assert floor.mean() > 0.5
    assert 0 < torso.mean() < 0.1
    assert 2000 < depth[torso].mean() < 5000  # the camera follows at about three metres
    assert depth[0, 40].mean() < depth[0, 5].mean()  # the floor recedes upwards in the picture
    assert sample.arrays["actions"].shape == (3, 6)


def test_mujoco_without_its_library_says_which(tmp_path: Path) -> None:
    if importlib.util.find_spec("mujoco") is None:
        pytest.skip("MuJoCo is not installed")
    code = (
        "import sys\nfrom worldloom_curation.record import record\n"
        "try: record('InvertedPendulum-v5', 1, sys.argv[1], max_steps=2, quiet=True)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out")],
        env=os.environ | {"MUJOCO_GL": "osmesa"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if not done.stdout:
        pytest.skip("OSMesa is installed here")
    assert "WorldloomError" in done.stdout
    assert "libOSMesa" in done.stdout


def digest(out: Path) -> str:
    return tree_digest(out / "shards")


def test_running_again_does_nothing(tmp_path: Path) -> None:
    dataset = made("WorldloomEcho-v0", 2, tmp_path / "out")
    stamps = {item: item.stat().st_mtime_ns for item in (tmp_path / "out").rglob("*")}
    assert made("WorldloomEcho-v0", 2, tmp_path / "out").index == dataset.index
    assert {item: item.stat().st_mtime_ns for item in (tmp_path / "out").rglob("*")} == stamps
    assert not (tmp_path / "out" / ".episodes").exists()


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    made("WorldloomEcho-v0", 2, tmp_path / "out")
    for changes, named in [({"seed": 1}, "seed"), ({"max_steps": 13}, "max_steps"), ({"size": None}, "size")]:
        with pytest.raises(WorldloomError, match=named):
            made("WorldloomEcho-v0", 2, tmp_path / "out", **changes)
    with pytest.raises(WorldloomError, match="episodes = 3"):
        made("WorldloomEcho-v0", 3, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(WorldloomError, match="something else"):
        made("WorldloomEcho-v0", 1, tmp_path / "mine")
    with pytest.raises(WorldloomError, match="not a folder"):
        made("WorldloomEcho-v0", 1, tmp_path / "mine" / "thesis.tex")


def test_a_stopped_recording_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made("WorldloomEcho-v0", 5, tmp_path / "whole")
    played = []
    original = simulators.Simulator.reset

    def reset(self, seed: int):
        played.append(seed)
        if len(played) == 3:
            raise KeyboardInterrupt
        return original(self, seed)

    monkeypatch.setattr(simulators.Simulator, "reset", reset)
    with pytest.raises(KeyboardInterrupt):
        made("WorldloomEcho-v0", 5, tmp_path / "out")
    with pytest.raises(WorldloomError, match="not a finished dataset"):
        open_dataset(tmp_path / "out")
    assert made("WorldloomEcho-v0", 5, tmp_path / "out").index == whole.index
    assert played == [0, 1, 2, 2, 3, 4]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """SIGKILL, again and again, at random instants: the end result is that of a run that was never disturbed."""
    script = tmp_path / "play.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "import pygame\n"
        "from worldloom_curation.record import record\nfrom worldloom.artifacts import Store\n"
        "record('CartPole-v1', 12, sys.argv[1], max_steps=15, size=(16, 16), samples_per_shard=5, quiet=True,"
        " store=Store(Path(sys.argv[1]).parent / 'store'))\n"
    )

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-W", "ignore", str(script), str(out)], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(120) == 0
    out, chance = tmp_path / "out", random.Random(0)
    kills = 0
    for _ in range(8):
        process = start(out)
        while process.poll() is None and not (out / "config.toml").exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        kills += process.wait(120) != 0
        if (out / "dataset.json").exists():
            assert open_dataset(out).verify() == []
    assert kills >= 2
    assert start(out).wait(120) == 0
    assert digest(out) == digest(tmp_path / "whole")
    assert open_dataset(out).index == open_dataset(tmp_path / "whole").index
    assert not list(out.rglob("*worldloom-tmp*"))


def test_spaces() -> None:
    spaces = gymnasium.spaces
    rng = np.random.default_rng(0)
    for space, size in [
        (spaces.Discrete(4), 4),
        (spaces.Discrete(4, start=-1), 4),
        (spaces.MultiBinary(3), 3),
        (spaces.MultiDiscrete([2, 5, 7]), 3),
        (spaces.Box(-1, 2, (2, 3)), 6),
        (spaces.Box(-np.inf, np.inf, (2,)), 2),
        (spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)), 2),
        (spaces.Box(0, 255, (2,), np.uint8), 2),
        (spaces.Dict({"b": spaces.MultiBinary(2), "a": spaces.Box(0, 1, (2,))}), 4),
        (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]), 5),
    ]:
        drawn = [simulators.sample_action(space, rng) for _ in range(50)]
        assert all(space.contains(action) for action in drawn), space
        vectors = np.stack([simulators.encode_action(space, action) for action in drawn])
        assert vectors.shape == (50, size)
        assert vectors.dtype == np.float32
        assert np.isfinite(vectors).all()
        assert np.abs(vectors).max() < 300
        assert (vectors.std(0) > 0).all(), space
    with pytest.raises(WorldloomError, match="cannot be recorded"):
        simulators.sample_action(spaces.Text(5), rng)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("NoSuchEnvironment-v0", "knows no such environment"),
        ("CartPole-v99", "knows no such environment"),
        ("no_such_package:Env-v0", "not installed"),
        ("", "knows no such environment"),
    ],
)
def test_environments_that_cannot_be_made(env_id: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match=message):
        made(env_id, 1, tmp_path / "out")
    made("WorldloomEcho-v0", 1, tmp_path / "out")  # nothing is left that stands in the way of the right id


@pytest.mark.parametrize(
    "changes", [{"episodes": 0}, {"max_steps": 0}, {"hold": 0.5}, {"policy": "greedy"}, {"size": (0, 4)}, {"seed": -1}]
)
def test_impossible_parameters(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WorldloomError):
        made("WorldloomEcho-v0", changes.pop("episodes", 1), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--env", "WorldloomEcho-v0", "--episodes", "2", "--out", str(out), "--size", "8x12", "--steps", "5"]
    done = CliRunner().invoke(record_command, options, catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 episodes, 12 frames of 12x8, 5 actions" in done.output
    dataset = open_dataset(out)
    assert dataset.index.size == (8, 12)
    assert dataset.index.id in done.output
    assert Store().get(dataset.index.id).inputs == ("env:WorldloomEcho-v0#seed=0",)
    assert {item.name for item in out.iterdir()} == {"config.toml", "dataset.json", "shards", "summary.json"}
    with pytest.raises(WorldloomError, match="HEIGHTxWIDTH"):
        CliRunner().invoke(record_command, [*options, "--size", "64"], catch_exceptions=False)
