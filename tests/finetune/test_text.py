"""Captions reach a world model, and a prompt makes a world of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import SMALL, make_clips

from worldloom.errors import WorldloomError
from worldloom.schema import GenerationRequest
from worldloom.shards import ShardWriter, commit_dataset, open_dataset
from worldloom_finetune import train
from worldloom_model_zoo import load_model

TEXT = (
    "model.context_dim=32",
    "model.text_dim=384",
    "data.frames=9",
    "data.size=[32,32]",
    "trainer.max_steps=3",
    "ema.decay=0",
)


def _captioned(root: Path, caption: str, seed: int, actions: int) -> Path:
    """Clips of the test's squares under one caption, each with its own size of actions."""
    plain = make_clips(root.parent / f"{root.name}-plain", seed=seed)
    with ShardWriter(root, kind="clips") as writer:
        for sample in open_dataset(plain):
            clip = dataclasses.replace(sample.clip, caption=caption, action_dim=actions)
            arrays = {"actions": np.zeros((clip.frames - 1, actions), np.float32)}
            writer.write(dataclasses.replace(sample, clip=clip, arrays=arrays))
        commit_dataset(root, writer.close())
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny model with text, trained for three steps on two datasets at once."""
    root = tmp_path_factory.mktemp("text")
    first = _captioned(root / "first", "a bright square moves", 0, 2)
    second = _captioned(root / "second", "rain on a window", 50, 3)
    request = train.Request(
        "world", f"{first},{second}", "predict/tiny", str(root / "run"), quiet=True, tokenizer=str(tokenizer_folder)
    )
    train.run(request, train.load_config("world", None, (*SMALL, *TEXT)))
    return root / "run"


def test_datasets_with_other_actions_are_one_set_of_latents_with_text(run: Path) -> None:
    latents = open_dataset(run / "latents")
    assert latents.index.action_dim == 0
    assert latents.index.metadata["text_encoder"]["name"] == "minilm"
    text = {sample.clip.caption: sample.arrays["text"] for sample in latents}
    assert {"actions"} & set(next(iter(latents)).arrays) == set()
    assert sorted(text) == ["a bright square moves", "rain on a window"]
    assert {vectors.shape for vectors in text.values()} == {(24, 384)}


def test_a_prompt_alone_makes_a_video_and_decides_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    pipeline = load_model(summary["model"])
    assert pipeline.config.text.name == "minilm"
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in pipeline.model.parameters():  # three steps leave the zeros of the output nearly as they were
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    made = [
        pipeline.generate(GenerationRequest("m", prompt=prompt, frames=5, seed=1))
        for prompt in ("a bright square moves", "rain on a window", "rain on a window")
    ]
    assert made[0].shape == (1, 3, 5, 32, 32)
    assert torch.equal(made[1], made[2])
    assert not torch.allclose(made[0], made[1], atol=1e-3)
    start = torch.zeros(1, 3, 5, 32, 32)
    both = pipeline.generate_video(start, None, 9, text=["rain on a window"], seed=1)
    assert torch.equal(both[:, :, :5], start)
    assert not torch.allclose(both[:, :, 5:], pipeline.generate_video(start, None, 9, seed=1)[:, :, 5:], atol=1e-3)


def test_the_null_text_is_no_text(run: Path) -> None:
    model = load_model(json.loads((run / "summary.json").read_text())["model"]).model
    x, level = torch.randn(2, 16, 2, 4, 4), torch.rand(2, 2)
    text = torch.randn(2, 7, 384)
    with torch.no_grad():
        dropped = model(x, level, None, text, text_mask=torch.tensor([False, True]))
        torch.testing.assert_close(dropped[0], model(x, level)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dropped[1], model(x, level, None, text)[1], rtol=1e-5, atol=1e-6)


def test_another_text_encoder_is_refused(run: Path) -> None:
    pipeline = load_model(json.loads((run / "summary.json").read_text())["model"])
    pipeline.config = dataclasses.replace(
        pipeline.config, text=dataclasses.replace(pipeline.config.text, fingerprint="0" * 64)
    )
    with pytest.raises(WorldloomError, match="another text encoder"):
        pipeline.generate(GenerationRequest("m", prompt="a square", frames=5))


def test_a_model_without_text_trains_on_latents_that_have_some(run: Path, tmp_path: Path) -> None:
    request = train.Request("world", str(run / "latents"), "predict/tiny", str(tmp_path / "run"), quiet=True)
    train.run(request, train.load_config("world", None, (*SMALL, "trainer.max_steps=2", "ema.decay=0")))
    assert not load_model(str(tmp_path / "run" / "model")).config.text.name
