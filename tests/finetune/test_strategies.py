"""One process or two, plain, DDP or ZeRO: the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_runs import curve, make_latents, trained_by
from safetensors.torch import load_file

DEEPSPEED = "trainer.strategy=deepspeed"


def _weights(out: Path):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latents(tmp_path_factory.mktemp("data") / "latents")


def _assert_same(one: Path, other: Path, steps: int) -> None:
    first, second = curve(one), curve(other)
    assert len(first) == len(second) == steps
    for (step, loss, norm), (_, other_loss, other_norm) in zip(first, second, strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-5), step
        assert other_norm == pytest.approx(norm, rel=1e-3), step
    for name, weight in _weights(one).items():
        assert (_weights(other)[name] - weight).abs().max() < 1e-4, name


def test_two_zero_processes_give_the_losses_of_ddp(data: Path, tmp_path: Path) -> None:
    # Two micro-batches a step and clipping that bites: both are done by DeepSpeed there and by us here.
    common = ["trainer.max_steps=8", "trainer.accumulate=2", "optim.grad_clip=0.1"]
    runs = [
        {"out": tmp_path / "ddp", "data": data, "world": 2, "set": [*common, "trainer.strategy=ddp"]},
        {"out": tmp_path / "zero", "data": data, "world": 2, "set": [*common, DEEPSPEED, "trainer.zero_stage=2"]},
    ]
    runs.append({"out": tmp_path / "one", "data": data, "world": 1, "set": common})
    trained_by(runs, tmp_path)
    _assert_same(tmp_path / "ddp", tmp_path / "zero", steps=8)
    assert curve(tmp_path / "one")[0][1] != curve(tmp_path / "ddp")[0][1], "the second rank has no data of its own"
    assert curve(tmp_path / "ddp")[-1][1] < curve(tmp_path / "ddp")[0][1] - 0.1, "the weights did not move"


def test_every_zero_stage_gives_the_losses_of_one_plain_process(data: Path, tmp_path: Path) -> None:
    common = ["trainer.max_steps=6", "ema.decay=0"]
    runs = [{"out": tmp_path / "plain", "data": data, "set": common}]
    runs += [
        {"out": tmp_path / f"zero{stage}", "data": data, "set": [*common, DEEPSPEED, f"trainer.zero_stage={stage}"]}
        for stage in range(4)
    ]
    trained_by(runs, tmp_path)
    for stage in range(4):
        _assert_same(tmp_path / "plain", tmp_path / f"zero{stage}", steps=6)
