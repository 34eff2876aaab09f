"""Our LeRobot v3.0 against lerobot itself, both ways.

lerobot pins a torch of its own, so it lives in another environment: name that one's interpreter in
WORLDLOOM_LEROBOT_PYTHON. Without it these tests skip; `tests/curation/test_lerobot.py` holds the layout meanwhile.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from robot_episodes import episode, write_lerobot_dataset

from worldloom import media
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.export import export
from worldloom_curation.pipeline import run
from worldloom_curation.sources import discover

PYTHON = os.environ.get("WORLDLOOM_LEROBOT_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="WORLDLOOM_LEROBOT_PYTHON names no environment with lerobot")

READ = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("local/ours", root=sys.argv[1], video_backend="pyav")
rows = [data[i] for i in range(len(data))]
pictures = {
    key.rpartition(".")[2]: np.stack([np.rint(row[key].numpy() * 255).transpose(1, 2, 0) for row in rows])
    for key in data.meta.camera_keys
}
np.savez(
    sys.argv[2],
    action=np.stack([row["action"].numpy() for row in rows]),
    state=np.stack([row["observation.state"].numpy() for row in rows]),
    episode=np.array([int(row["episode_index"]) for row in rows]),
    task=np.array([row["task"] for row in rows]),
    mean=data.meta.stats["action"]["mean"],
    **pictures,
)
"""

WRITE = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
given = np.load(sys.argv[2])
vector = lambda names: {"dtype": "float32", "shape": (len(names),), "names": names}
data = LeRobotDataset.create("local/theirs", fps=20, root=sys.argv[1], robot_type="toy", use_videos=True, features={
    "action": vector(["a", "b"]),
    "observation.state": vector(["x", "y"]),
    "observation.images.top": {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
})
for number in range(3):
    for t in range(len(given[f"actions{number}"])):
        data.add_frame({
            "action": given[f"actions{number}"][t],
            "observation.state": given[f"state{number}"][t],
            "observation.images.top": given[f"frames{number}"][t],
            "task": f"Task {number}.",
        })
    data.save_episode()
data.finalize()
"""


def lerobot(script: str, *arguments: Path) -> None:
    environment = {**os.environ, "HF_LEROBOT_HOME": str(arguments[0].parent / "home")}
    done = subprocess.run(
        [PYTHON, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_lerobot_reads_what_we_wrote(tmp_path: Path) -> None:
    cameras = ("observation.images.top", "observation.images.side")
    write_lerobot_dataset(tmp_path / "in", [episode(i, 30 + 5 * i) for i in range(3)], cameras=cameras)
    run(tmp_path / "in", tmp_path / "clips", load(CurateConfig, overrides=["stages=['split','caption']"]))
    dataset = open_dataset(tmp_path / "clips")
    export(dataset, tmp_path / "out", "lerobot")
    lerobot(READ, tmp_path / "out", tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    for sample in dataset:
        rows = read["episode"] == sample.clip.metadata["episode"]
        np.testing.assert_array_equal(read["action"][rows][:-1], sample.arrays["actions"])
        np.testing.assert_array_equal(read["state"][rows], sample.arrays["state"])
        assert set(read["task"][rows]) == {sample.clip.caption}
        assert sample.video is not None
        camera = str(sample.clip.metadata["camera"]).rpartition(".")[2]
        np.testing.assert_array_equal(read[camera][rows], media.read_frames(sample.video))
    np.testing.assert_allclose(read["mean"], read["action"].mean(axis=0), atol=1e-5)


def test_we_read_what_lerobot_wrote(tmp_path: Path) -> None:
    made = [episode(i, 30 + 5 * i) for i in range(3)]
    given = {f"{name}{i}": getattr(one, name) for i, one in enumerate(made) for name in ("actions", "state", "frames")}
    np.savez(tmp_path / "given.npz", **given)
    lerobot(WRITE, tmp_path / "theirs", tmp_path / "given.npz")
    sources, _ = discover(tmp_path / "theirs")
    for i, (source, one) in enumerate(zip(sources, made, strict=True)):
        assert not source.error
        np.testing.assert_array_equal(source.arrays["actions"], one.actions[:-1])
        np.testing.assert_array_equal(source.arrays["state"], one.state)
        assert (source.facts["task"], source.facts["action_names"], source.rate) == (f"Task {i}.", ["a", "b"], 20)
        assert source.window is not None
        frames = np.stack(list(media.iter_frames(source.path, *source.window))).astype(float)
        off = [np.abs(frames[1:-1] - one.frames[1 + by : len(frames) - 1 + by]).mean() for by in (-1, 0, 1)]
        assert off[1] < min(off[0], off[2])
