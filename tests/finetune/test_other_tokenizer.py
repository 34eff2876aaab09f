"""Latents know who made them: a model trained on those of one tokenizer refuses those of another, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from click.testing import CliRunner, Result

from worldloom.cli import main

pytestmark = pytest.mark.usefixtures("worldloom_home")


def worldloom(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env={"WORLDLOOM_TRACKING": "off"})


def finetune(data: Path, model: Path, out: Path, *more: object) -> Result:
    settings = ("trainer.max_steps=1", "data.batch_size=2", "data.frames=9")
    words = [word for setting in settings for word in ("--set", setting)]
    return worldloom("finetune", "world", "--data", data, "--model", model, "--out", out, *words, *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, two tokenizers and a world model that was trained with the first."""
    root = tmp_path_factory.mktemp("other-tokenizer")
    tiny_models.clips(root / "clips", lengths=(19, 19, 19))
    first = tiny_models.tokenizer_folder(root / "first", seed=0)
    tiny_models.tokenizer_folder(root / "second", seed=5)
    tiny_models.world_folder(root / "world", first)
    return root


def encode(root: Path, tokenizer: str, out: Path) -> Path:
    words = ("--tokenizer", root / tokenizer, "--frames", 9, "--size", 32, "--out", out)
    done = worldloom("tokenize", "encode", root / "clips", *words)
    assert done.exit_code == 0, done.output
    return out


def test_latents_of_another_tokenizer_are_refused(root: Path, tmp_path: Path) -> None:
    done = finetune(encode(root, "second", tmp_path / "latents"), root / "world", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert "another tokenizer" in done.stderr
    assert str(root / "second") in done.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_latents_of_its_own_are_trained_on(root: Path, tmp_path: Path) -> None:
    done = finetune(encode(root, "first", tmp_path / "latents"), root / "world", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_a_run_does_not_change_its_tokenizer_on_the_way(root: Path, tmp_path: Path) -> None:
    done = finetune(root / "clips", root / "world", tmp_path / "run")
    assert done.exit_code == 0, done.output
    done = finetune(root / "clips", root / "world", tmp_path / "run", "--tokenizer", root / "second")
    assert done.exit_code == 2, done.output
    assert "another tokenizer" in done.stderr
