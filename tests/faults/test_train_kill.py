"""SIGKILL at random instants, and the same command again: the same losses, weights and nothing torn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finetune_runs import SMALL, curve, make_latents, trained_by

KILLS = 6


@pytest.mark.parametrize("strategy", ["plain", "zero2"])
def test_a_killed_run_resumes_to_the_same_curve(strategy: str, tmp_path: Path) -> None:
    data = make_latents(tmp_path / "data")
    settings = ["trainer.max_steps=40", "trainer.keep=2"]
    if strategy == "zero2":
        settings += ["trainer.strategy=deepspeed", "trainer.zero_stage=2"]
    runs = [
        {"out": tmp_path / "whole", "data": data, "set": settings},
        {"out": tmp_path / "killed", "data": data, "set": settings, "kills": KILLS, "seed": os.getpid()},
    ]
    _, killed = trained_by(runs, tmp_path)

    assert killed["killed"] >= KILLS // 2
    assert any("" < name < "step-00000040" for name in killed["latest"]), "no kill fell into the training"
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert [step for step, _, _ in curve(tmp_path / "killed")] == list(range(1, 41))
    for name in ("model/model.safetensors", "model/config.toml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    validated = [_validations(tmp_path / out) for out in ("killed", "whole")]
    assert validated[0] == validated[1]
    left = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert sorted(left) == ["latest", "step-00000039", "step-00000040"]
    # A kill loses at most what came after the newest committed step.
    steps = [int(name.rpartition("-")[2] or 0) for name in killed["latest"]]
    assert steps == sorted(steps)


def _validations(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]


@pytest.mark.slow
def test_killing_the_parent_of_two_ranks_ends_them_and_the_command_resumes(tmp_path: Path) -> None:
    data = make_latents(tmp_path / "data")
    run = ("objective.pixel_weighting=0", "trainer.max_steps=40", "trainer.strategy=deepspeed", "trainer.devices=2")
    settings = [*SMALL, *run]
    flags = [part for setting in settings for part in ("--set", setting)]

    def command(out: str) -> list[str]:
        inputs = ["--data", str(data), "--model", "predict/tiny", "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "worldloom", "finetune", "world", *inputs, *flags]

    subprocess.run(command("whole"), check=True, timeout=200, capture_output=True)
    parent = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    deadline = time.monotonic() + 100
    while not latest.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert latest.is_file()
    assert not (tmp_path / "killed" / "summary.json").exists()
    subprocess.run(command("killed"), check=True, timeout=200, capture_output=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
