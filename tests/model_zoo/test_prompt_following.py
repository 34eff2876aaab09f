"""Prompt following: a model that obeys scores 1, one that does not listen scores by chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.schema import Clip, clip_id
from worldloom.shards import ShardSample, ShardWriter, commit_dataset
from worldloom_model_zoo.predict.config import PredictCheckpoint
from worldloom_model_zoo.prompt_following import PromptConfig, measure

WORDS = {"stripes": ["wide stripes", "bars"], "checks": ["a chessboard"]}


def _frames(world: str, seed: int) -> np.ndarray:
    shift, colour = np.random.default_rng(seed).integers(0, 16), 150 + seed % 8 * 10
    y, x = np.mgrid[:64, :64] + shift
    lit = (x // 16 % 2 == 0) if world == "stripes" else ((x // 8 + y // 8) % 2 == 0)
    return np.repeat((lit[None, :, :, None] * np.array([colour, colour, 40])).astype(np.uint8), 5, axis=0)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, made = tmp_path_factory.mktemp("worlds"), []
    for world, words in WORDS.items():
        with ShardWriter(root / world, kind="clips") as writer:
            for i in range(12):
                source = f"{world}{i:030d}"
                caption = words[i % len(words)]
                clip = Clip(clip_id(source, 0, 5), "x.mp4", source, 0, 5, 10.0, 64, 64, caption=caption)
                writer.write(ShardSample(clip, media.write_video(None, _frames(world, i), 10, lossless=True), {}))
            commit_dataset(root / world, writer.close())
        made.append(root / world)
    return made


class Painter:
    """Paints what a function of the prompt says."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.device = answer, torch.device("cpu")
        self.config = PredictCheckpoint(height=64, width=64)
        self.tokenizer = tiny_models.tokenizer()

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1, 1)

    def generate_video(self, start: None, actions: None, frames: int, *, text: list[str], seed: int) -> torch.Tensor:
        return media.to_tensor(_frames(self.answer(text[0]), 100 + seed)[:frames])


def test_obeying_scores_one_and_not_listening_scores_by_chance(worlds: list[Path]) -> None:
    config = PromptConfig(samples=4, frames=5, clips=12)
    obeys = Painter(lambda text: next(world for world, words in WORDS.items() if text in words))
    result = measure(obeys, worlds, config)  # pyright: ignore[reportArgumentType]
    assert (result.real, result.generated) == (1.0, 1.0)
    assert result.confusion == [[4, 0], [0, 4]]
    assert result.prompts == {"stripes": ["bars", "wide stripes"], "checks": ["a chessboard"]}
    deaf = measure(Painter(lambda text: "stripes"), worlds, config)  # pyright: ignore[reportArgumentType]
    assert deaf.generated == 0.5
    assert deaf.per_world == {"stripes": 1.0, "checks": 0.0}


def test_one_world_tells_nothing(worlds: list[Path]) -> None:
    with pytest.raises(WorldloomError, match="between worlds"):
        measure(Painter(str), worlds[:1])  # pyright: ignore[reportArgumentType]


def test_the_command_wants_data_or_prompts() -> None:
    from click.testing import CliRunner

    from worldloom_model_zoo.cli import evaluate

    result = CliRunner().invoke(evaluate, ["loom-world-nano"])
    assert result.exit_code == 2
    assert "--data or --prompts" in result.output
