from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from robot_episodes import FPS, NAMES, RobotEpisode, delayed, episode, write_lerobot_dataset

from worldloom import WorldloomError
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig, Frame
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.pipeline import run
from worldloom_curation.robot import (
    FrameMotion,
    Statistics,
    action_spaces,
    are_choices,
    find_lag,
)
from worldloom_curation.stage import Source
from worldloom_curation.stages.sync import best_lag

LAGS = (0, 5, -5, 3, -2, 0)


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=overrides)


def motion_of(made: RobotEpisode) -> np.ndarray:
    observer = FrameMotion(64)
    for frame in made.frames:
        observer.add(Frame(frame))
    return observer.result()["motion"][1:]


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("by", [-7, -5, -1, 0, 1, 5, 7])
def test_a_planted_lag_is_found_to_the_frame_on_every_episode(kind: str, by: int) -> None:
    for seed in range(6):
        made = episode(seed, 150, kind=kind)
        # Actions that were written down late make the picture early.
        logged = delayed(made, -by)
        lag = best_lag(logged.actions[:-1], NAMES, motion_of(made), 15, "auto")
        assert lag is not None
        assert lag.frames == by
        assert lag.correlation > 0.6
        assert lag.sigma > 4
        assert lag.margin > 0.1


def test_actions_that_have_nothing_to_do_with_the_picture_are_not_trusted(tmp_path: Path) -> None:
    strangers = [
        RobotEpisode(episode(seed).frames, episode(seed + 50).actions, episode(seed).state) for seed in range(6)
    ]
    write_lerobot_dataset(tmp_path / "robot", strangers)
    summary = run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','sync']"))
    assert summary["dropped"]["sync"] == 0
    assert not any(clip.metadata["sync"]["trusted"] for clip in open_dataset(tmp_path / "out").clips())


def test_choices_are_matched_by_what_each_of_them_moves() -> None:
    rng = np.random.default_rng(3)
    for by in (-5, 0, 5):
        taken = rng.integers(0, 4, 200).repeat(3)[:200]
        one_hot = np.eye(4, dtype=np.float32)[taken]
        motion = np.array([0.0, 2.0, 1.0, 4.0])[taken] + rng.normal(0, 0.3, 200)
        lag = best_lag(one_hot, ["NOOP", "LEFT", "RIGHT", "JUMP"], np.roll(motion, by), 12, "auto")
        assert lag is not None
        assert (lag.frames, lag.correlation > 0.9) == (by, True)


def test_noise_is_no_lag() -> None:
    rng = np.random.default_rng(0)
    sigmas = []
    for _ in range(200):
        # Smooth series: the number of independent samples is far below the number of frames.
        x, y = (np.convolve(rng.normal(size=180), np.ones(8), "valid") for _ in range(2))
        lag = find_lag(np.abs(x), np.abs(y), 15)
        assert lag is not None
        sigmas.append(lag.sigma)
    assert np.mean(np.array(sigmas) >= 4.0) <= 0.03
    assert find_lag(np.zeros(50), rng.normal(size=50), 5) is None
    assert find_lag(rng.normal(size=11), rng.normal(size=11), 3) is None


def test_the_run_drops_late_episodes_and_keeps_clean_ones(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", [delayed(episode(i, 150), -by) for i, by in enumerate(LAGS)])
    summary = run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','sync','caption']"))
    rows = [row for row in load_ledger(tmp_path / "out") if row.stage == "sync"]
    assert [row.value for row in rows] == list(LAGS)
    assert [row.kept for row in rows] == [abs(by) <= 2 for by in LAGS]
    assert summary["clips"] == 3
    assert "5 frames late" in rows[1].reason
    assert "5 frames early" in rows[2].reason
    assert [clip.metadata["sync"]["lag"] for clip in open_dataset(tmp_path / "out").clips()] == [0, -2, 0]
    marked = run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','sync','caption']", "sync.drop=false"))
    assert marked["clips"] == 6
    assert marked["work"]["scan"] == {"cached": 6, "computed": 0, "copied": 0}


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_an_idle_episode_is_dropped_and_idle_ends_are_trimmed(tmp_path: Path, kind: str) -> None:
    made = [
        episode(0, 120, kind=kind),
        episode(1, 120, kind=kind, idle=[(0, 120)]),
        episode(2, 120, kind=kind, idle=[(0, 40), (90, 120)]),
        episode(3, 120, kind=kind, idle=[(50, 75)]),
    ]
    write_lerobot_dataset(tmp_path / "robot", made)
    summary = run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','idle','caption']"))
    ledger = load_ledger(tmp_path / "out")
    kept = {row.source[-1]: (row.start, row.end) for row in ledger if row.stage == "idle" and row.kept}
    assert set(kept) == {"0", "2", "3"}
    assert kept["3"] == (0, 120)  # a pause in the middle is no idle end
    whole = [row for row in ledger if row.stage == "idle" and row.source.endswith("1")]
    assert [(row.kept, row.start, row.end, row.value) for row in whole] == [(False, 0, 120, 1.0)]
    start, end = kept["2"]
    assert 40 - 0.5 * FPS <= start <= 40
    assert 90 <= end <= 90 + 0.75 * FPS
    assert all(account.balanced for account in accounts(ledger).values())
    [clip] = [clip for clip in open_dataset(tmp_path / "out").clips() if clip.metadata["episode"] == 2]
    sample = open_dataset(tmp_path / "out").load(clip.id)
    np.testing.assert_array_equal(sample.arrays["actions"], made[2].actions[start : end - 1])
    np.testing.assert_array_equal(sample.arrays["state"], made[2].state[start:end])
    assert summary["dropped"]["idle"] == 3


def test_trimmed_lengths_keep_their_form(tmp_path: Path) -> None:
    write_lerobot_dataset(tmp_path / "robot", [episode(0), episode(2, 121, idle=[(0, 41), (90, 121)])])
    run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','idle']", "idle.frames_multiple=8"))
    rows = [row for row in load_ledger(tmp_path / "out") if row.stage == "idle" and row.kept]
    assert (rows[1].end - rows[1].start) % 8 == 1
    assert rows[1].end - rows[1].start < 80


def test_what_moves_without_actions_and_what_acts_without_moving_is_not_idle(tmp_path: Path) -> None:
    moving, acting, usual = episode(0), episode(1, idle=[(0, 120)]), episode(2)
    still = np.zeros_like(moving.actions)
    made = [RobotEpisode(moving.frames, still, still), RobotEpisode(acting.frames, usual.actions, usual.state), usual]
    write_lerobot_dataset(tmp_path / "robot", made)
    summary = run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','idle']"))
    assert (summary["clips"], summary["dropped"]["idle"]) == (3, 0)


def test_outlying_actions_are_named_and_clean_episodes_stay(tmp_path: Path) -> None:
    made = [episode(i) for i in range(4)]
    made[1].actions[33, 1] = 90.0
    made[2].actions[7, 0] = np.nan
    write_lerobot_dataset(tmp_path / "robot", made)
    run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','outliers']"))
    rows = [row for row in load_ledger(tmp_path / "out") if row.stage == "outliers"]
    assert [row.kept for row in rows] == [True, False, False, True]
    assert "elbow at frame 33 is 90" in rows[1].reason
    assert rows[1].value is not None
    assert rows[1].value > 12
    assert "shoulder at frame 7 is no finite number" in rows[2].reason


def test_jerky_actions_are_found(tmp_path: Path) -> None:
    t = np.arange(120)[:, None] / FPS
    made = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        smooth = np.sin(2 * np.pi * t * rng.uniform(0.2, 0.4, 2) + rng.uniform(0, 6, 2)).astype(np.float32)
        shaken = smooth + (rng.normal(0, 0.05, smooth.shape).astype(np.float32) if seed == 3 else 0)
        made.append(RobotEpisode(episode(seed).frames, shaken, smooth))
    write_lerobot_dataset(tmp_path / "robot", made)
    run(tmp_path / "robot", tmp_path / "out", settings("stages=['split','jerk']"))
    rows = [row for row in load_ledger(tmp_path / "out") if row.stage == "jerk"]
    assert [row.kept for row in rows] == [True, True, True, False, True]
    assert all(clip.metadata["jerk"] > 0 for clip in open_dataset(tmp_path / "out").clips())


def test_failures_are_dropped_by_their_flag(tmp_path: Path) -> None:
    from dataclasses import replace

    made = [replace(episode(i, 40), success=flag) for i, flag in enumerate((True, False, True))]
    write_lerobot_dataset(tmp_path / "robot", made, per_file=1)
    config = settings("stages=['split','success']")
    run(tmp_path / "robot", tmp_path / "out", config)
    assert [clip.metadata["success"] for clip in open_dataset(tmp_path / "out").clips()] == [True, True]
    run(tmp_path / "robot", tmp_path / "bad", settings("stages=['split','success']", "success.keep=failures"))
    assert [clip.metadata["success"] for clip in open_dataset(tmp_path / "bad").clips()] == [False]


def test_the_kind_of_actions_is_told_by_the_state() -> None:
    def space(made: RobotEpisode, kind: str = "auto") -> str:
        arrays = {"actions": made.actions[:-1], "state": made.state}
        source = Source("a", "a", "d", "k", index=0, actions=arrays["actions"], arrays=arrays)
        return next(iter(action_spaces([source], kind).values())).kind

    assert space(episode(0, kind="absolute")) == "absolute"
    assert space(episode(0, kind="relative")) == "relative"
    assert space(episode(0, kind="relative"), "absolute") == "absolute"
    assert are_choices(np.eye(3)[[0, 2, 1]])


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal([5, -200], [1, 30], (5000, 2)).astype(np.float32)
    statistics = Statistics()
    for part in np.array_split(rows, 13):
        statistics.add(part)
    found = statistics.result()
    assert found["count"] == 5000
    for name, value in (
        ("mean", rows.mean(axis=0, dtype=np.float64)),
        ("std", rows.std(axis=0, dtype=np.float64)),
        ("min", rows.min(axis=0)),
        ("q01", np.quantile(rows.astype(np.float64), 0.01, axis=0)),
        ("q50", np.median(rows, axis=0)),
    ):
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_the_dataset_and_the_report_have_statistics_per_component(tmp_path: Path) -> None:
    from worldloom_curation.report import make_report

    made = [episode(i, 40) for i in range(2)]
    write_lerobot_dataset(tmp_path / "robot", made)
    run(tmp_path / "robot", tmp_path / "out", settings("stages=['split']"))
    table = open_dataset(tmp_path / "out").index.metadata["statistics"]
    actions = np.concatenate([e.actions[:-1] for e in made]).astype(np.float64)
    assert table["actions"]["names"] == NAMES
    assert table["actions"]["count"] == 78
    np.testing.assert_allclose(table["actions"]["mean"], actions.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(table["state"]["max"], np.concatenate([e.state for e in made]).max(axis=0), atol=1e-5)
    page = make_report(tmp_path / "out", clips=0).read_text()
    assert "Statistics: actions" in page
    assert "shoulder" in page


def test_robot_stages_let_videos_pass(tmp_path: Path) -> None:
    from curation_videos import scene, write

    write(tmp_path / "videos" / "a", scene(1, 40))
    stages = "stages=['split','idle','sync','outliers','jerk','success']"
    assert run(tmp_path / "videos", tmp_path / "out", settings(stages))["clips"] == 1


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ("idle.drop_share=0", "sync.search=2", "sync.max_lag=-1"):
        with pytest.raises(WorldloomError):
            settings(wrong)
