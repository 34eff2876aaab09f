"""The recipe "latent-actions": a small world's actions are found, a stopped run goes on bit by bit, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import latent_worlds
import pytest
import torch
from finetune_runs import SMALL, curve, make_clips
from safetensors.torch import load_file

from worldloom.errors import WorldloomError
from worldloom_finetune import train
from worldloom_tokenizers.config import LatentActionConfig
from worldloom_tokenizers.evaluate_actions import evaluate
from worldloom_tokenizers.latent_actions import load_latent_actions

TINY = (*SMALL, "data.size=none", "data.frames=2", "ema.decay=0")
NANO = "latent-actions/nano"


def _train(data: Path, out: Path, *overrides: str, model: str | Path = NANO) -> dict[str, Any]:
    small = ("model.width=16", "model.balance=0.02") if model == NANO else ()
    config = train.load_config("latent-actions", None, (*TINY, *small, *overrides))
    request = train.Request("latent-actions", str(data), str(model), str(out), command="a test", quiet=True)
    return train.run(request, config)


@pytest.fixture(scope="session")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty clips of a square that moves in four ways."""
    return latent_worlds.make_moves(tmp_path_factory.mktemp("moves") / "train", clips=20)


@pytest.fixture(scope="session")
def run(moves: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training long enough to find them."""
    settings = ("data.batch_size=32", "optim.lr=3e-3", "trainer.max_steps=250", "trainer.checkpoint_every=0")
    return _train(moves, tmp_path_factory.mktemp("run") / "lam", *settings, "trainer.val_every=0")


def test_the_actions_of_unseen_clips_are_found(run: dict[str, Any], tmp_path: Path) -> None:
    model = load_latent_actions(run["model"])
    assert model.config == dataclasses.replace(LatentActionConfig(), width=16, balance=0.02)
    result = evaluate(model, latent_worlds.make_moves(tmp_path / "unseen", clips=6, seed=500))
    assert result.majority < 0.35
    assert result.purity > 0.9
    assert result.controllability > 3


def test_what_a_run_reports(run: dict[str, Any]) -> None:
    figures = run["figures"]
    assert figures["psnr_db"] > figures["psnr_db_still"] + 5
    assert 4 <= figures["codes_used"] <= 8
    assert 3 < figures["perplexity"] <= 8
    assert figures["loss_last"] < 0.3 * figures["loss_first"]
    out = Path(run["model"]).parent
    assert list((out / "samples").glob("*.png"))
    assert "without actions" in (out / "model" / "README.md").read_text()


def test_a_stopped_run_goes_on_bit_by_bit(moves: Path, tmp_path: Path) -> None:
    settings = ("ema.decay=0.9", "optim.schedule=constant", "trainer.max_steps=7")
    _train(moves, tmp_path / "stopped", *settings, "trainer.max_steps=3")
    _train(moves, tmp_path / "stopped", *settings)
    _train(moves, tmp_path / "straight", *settings)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("stopped", "straight"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_moves_every_weight(moves: Path, tmp_path: Path) -> None:
    """So that none is left out of the loss, and what is saved is all there is: there are no buffers."""
    summary = _train(moves, tmp_path / "run", "trainer.max_steps=8", "optim.weight_decay=0", "data.batch_size=8")
    before = load_file(_first_checkpoint(moves, tmp_path))
    after = load_file(Path(summary["model"]) / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert not list(load_latent_actions(summary["model"]).buffers())


def _first_checkpoint(moves: Path, tmp_path: Path) -> Path:
    settings = ("trainer.max_steps=1", "optim.lr=1e-12", "optim.weight_decay=0", "data.batch_size=8")
    return Path(_train(moves, tmp_path / "first", *settings)["model"]) / "model.safetensors"


def test_training_goes_on_from_a_checkpoint(run: dict[str, Any], moves: Path, tmp_path: Path) -> None:
    summary = _train(moves, tmp_path / "more", "trainer.max_steps=1", model=run["model"])
    assert summary["figures"]["loss_first"] < 0.3 * run["figures"]["loss_first"]
    assert any(item.startswith("model:") for item in summary["inputs"])
    with pytest.raises(WorldloomError, match="keeps its configuration"):
        _train(moves, tmp_path / "other", "model.codes=4", model=run["model"])


def test_what_cannot_be_trained_is_refused(moves: Path, tmp_path: Path) -> None:
    for number, (overrides, model, what) in enumerate(
        (
            (("data.frames=1",), NANO, "a frame and the next"),
            (("data.frames=99",), NANO, "no clip is long enough"),
            (("lora.rank=4",), NANO, "trained whole"),
            ((), "latent-actions/huge", "presets: latent-actions/nano"),
            (("data.size=[20,20]",), NANO, "multiples of 8"),
            (("model.codes=1",), NANO, "at least 2"),
        )
    ):
        with pytest.raises(WorldloomError, match=what):
            _train(moves, tmp_path / str(number), *overrides, model=model)


def test_clips_need_no_actions_and_several_frames_make_a_window(tmp_path: Path) -> None:
    data = make_clips(tmp_path / "clips")
    summary = _train(data, tmp_path / "run", "data.frames=5", "model.past=3", "trainer.max_steps=2")
    assert load_latent_actions(summary["model"]).config.past == 3
