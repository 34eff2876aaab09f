from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from robot_episodes import NAMES, RobotEpisode, encode, episode

from worldloom import WorldloomError
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig
from worldloom_curation.episode_folders import read_array
from worldloom_curation.episodes import EpisodeConfig
from worldloom_curation.export import export
from worldloom_curation.ledger import load_ledger
from worldloom_curation.pipeline import run
from worldloom_curation.sources import discover


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=["stages=['split','caption']", *overrides])


def save(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".csv":
        lines = [",".join(NAMES), *(",".join(str(float(x)) for x in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"actions": rows.tolist(), "names": NAMES}))
    else:
        parquet.write_table(pa.table({name: rows[:, i] for i, name in enumerate(NAMES)}), path)


@pytest.mark.parametrize("ext", [".npy", ".csv", ".json", ".parquet"])
@pytest.mark.parametrize("rows", ["steps", "frames"])
def test_a_video_with_actions_of_its_name_is_an_episode(tmp_path: Path, ext: str, rows: str) -> None:
    made = episode(1, 40)
    encode(tmp_path / "in" / "pick.mp4", [made.frames])
    save(tmp_path / "in" / f"pick.actions{ext}", made.actions if rows == "frames" else made.actions[:-1])
    (tmp_path / "in" / "pick.json").write_text('{"task": "Pick it up.", "success": false, "operator": "A"}')
    save(tmp_path / "in" / "pick.state.npy", made.state)
    run(tmp_path / "in", tmp_path / "out", settings())
    [sample] = open_dataset(tmp_path / "out")
    np.testing.assert_array_equal(sample.arrays["actions"], made.actions[:-1])
    np.testing.assert_array_equal(sample.arrays["state"], made.state)
    assert (sample.clip.source, sample.clip.caption) == ("pick.mp4", "Pick it up.")
    assert (sample.clip.metadata["success"], sample.clip.metadata["operator"]) == (False, "A")
    if ext != ".npy":
        assert sample.clip.metadata["action_names"] == NAMES


def test_a_folder_with_actions_is_an_episode_of_all_its_cameras(tmp_path: Path) -> None:
    made = episode(1, 30)
    for number in range(2):
        folder = tmp_path / "in" / f"episode_{number}"
        for camera in ("front", "wrist"):
            encode(folder / f"{camera}.mp4", [made.frames])
        save(folder / "actions.npy", made.actions[:-1] + number)
        (folder / "episode.json").write_text(json.dumps({"task": f"Task {number}", "action_names": NAMES}))
    (tmp_path / "in" / "notes.txt").write_text("no video")
    sources, inputs = discover(tmp_path / "in")
    assert [source.name for source in sources] == [
        *("episode_0#front", "episode_0#wrist", "episode_1#front", "episode_1#wrist", "notes.txt")
    ]
    assert len(inputs) == 2 * 3 + 1
    assert [source.facts["episode_id"] for source in sources[:4]] == ["episode_0"] * 2 + ["episode_1"] * 2
    chosen, _ = discover(tmp_path / "in", config=EpisodeConfig(cameras=("wrist",)))
    assert [source.name for source in chosen if source.recorded] == ["episode_0#wrist", "episode_1#wrist"]
    one, _ = discover(tmp_path / "in" / "episode_1")
    assert [source.name for source in one] == ["episode_1#front", "episode_1#wrist"]


def test_what_cannot_be_read_is_said_in_the_ledger(tmp_path: Path) -> None:
    made = episode(1, 30)
    for name in ("ragged", "twice", "pickled", "long"):
        encode(tmp_path / "in" / f"{name}.mp4", [made.frames])
    (tmp_path / "in" / "ragged.actions.csv").write_text("1,2\n3\n")
    save(tmp_path / "in" / "twice.actions.npy", made.actions)
    save(tmp_path / "in" / "twice.actions.csv", made.actions)
    np.save(tmp_path / "in" / "pickled.actions.npy", np.array([{"a": 1}], object), allow_pickle=True)
    save(tmp_path / "in" / "long.actions.npy", np.zeros((60, 2)))
    (tmp_path / "in" / "lonely").mkdir()
    save(tmp_path / "in" / "lonely" / "actions.npy", made.actions)
    with pytest.raises(WorldloomError, match="no clip was kept"):
        run(tmp_path / "in", tmp_path / "out", settings())
    reasons = {row.source: row.reason for row in load_ledger(tmp_path / "out") if row.failed}
    assert "the actions cannot be read" in reasons["ragged.mp4"]
    assert "the same array is there twice" in reasons["twice.mp4"]
    assert "the actions cannot be read" in reasons["pickled.mp4"]
    assert "do not fit its video" in reasons["long.mp4"]
    assert "no video" in reasons["lonely"]


def test_exported_plain_files_are_curated_to_the_same_episodes(tmp_path: Path) -> None:
    made = episode(2, 30)
    encode(tmp_path / "in" / "a.mp4", [made.frames])
    save(tmp_path / "in" / "a.actions.csv", made.actions)
    (tmp_path / "in" / "a.json").write_text('{"task": "Push."}')
    run(tmp_path / "in", tmp_path / "one", settings())
    export(open_dataset(tmp_path / "one"), tmp_path / "plain")
    run(tmp_path / "plain", tmp_path / "two", settings())
    [before], [after] = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    np.testing.assert_array_equal(after.arrays["actions"], before.arrays["actions"])
    assert (after.clip.caption, after.clip.fps) == (before.clip.caption, before.clip.fps)
    assert after.clip.metadata["action_names"] == NAMES


def test_arrays_of_any_form_are_rows_of_numbers(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    (tmp_path / "a.json").write_text(json.dumps(rows.tolist()))
    parquet.write_table(pa.table({"action": rows.tolist(), "time": [0, 1, 2]}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", rows[:, 0])
    np.testing.assert_array_equal(read_array(tmp_path / "a.json")[0], rows)
    np.testing.assert_array_equal(read_array(tmp_path / "a.parquet")[0], rows)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy")[0], rows[:, :1])
    for text in ("[]", "{}", '{"actions": "many"}', "[1, [2]]", "nonsense"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(WorldloomError):
            read_array(tmp_path / "b.json")


def test_workers_give_the_same_dataset(tmp_path: Path) -> None:
    for seed in range(2):
        made: RobotEpisode = episode(seed, 25)
        encode(tmp_path / "in" / f"{seed}.mp4", [made.frames])
        save(tmp_path / "in" / f"{seed}.actions.npy", made.actions)
    stages = "stages=['split','idle','sync','outliers','jerk','success','caption']"
    ids = [
        run(tmp_path / "in", tmp_path / str(n), load(CurateConfig, overrides=[stages, f"workers={n}"])) for n in (1, 2)
    ]
    assert ids[0]["dataset"] == ids[1]["dataset"]
