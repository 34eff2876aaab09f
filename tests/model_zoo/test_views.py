"""Several cameras of one world: every view starts from its own frames, and all are denoised together."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from torch import Tensor

from worldloom import config as configs
from worldloom import media
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.schema import GenerationRequest
from worldloom.weights import write_weights
from worldloom_model_zoo.predict.config import PredictCheckpoint, SamplerConfig, TokenizerRef, tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline
from worldloom_model_zoo.samplers import flow_levels

CAMERAS = [2, 0]
GUIDED = SamplerConfig(steps=3, guidance_scale=2.5, condition_level=0.1)


def pipeline(**options: Any) -> PredictPipeline:
    torch.manual_seed(0)
    settings = {"latent_channels": 4, "attention": "full", "context_dim": 8, "views": 3, "view_dim": 2, **options}
    model = PredictTransformer(replace(tiny(), condition_mask=True, **settings)).eval()
    tiny_models.scatter(model, 0)
    config = PredictCheckpoint(height=32, width=32, fps=10.0, model=model.config, sampler=GUIDED)
    return PredictPipeline(model, tiny_models.tokenizer(), config)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(batch: int, frames: int = 5) -> Tensor:
    return drawn(batch, len(CAMERAS), 3, frames, 32, 32, seed=5).clamp(-1, 1)


@torch.no_grad()
def test_views_are_denoised_together_each_after_its_own_start() -> None:
    """By hand: the network is asked about all frames of both cameras, and Euler's steps move the new ones."""
    world, start, text, negative = pipeline(), starts(1), drawn(1, 2 * 4, 8), drawn(1, 2 * 4, 8, seed=1)
    given, t, known = world.tokenizer.encode(start[0]), 4, 2  # (v, c, k, h, w)
    noise = drawn(4, 2 * (t - known), 4, 4, seed=7)  # as seed 7 draws it
    x = [noise[:, : t - known], noise[:, t - known :]]
    mask = torch.zeros(1, 1, 2 * t, 4, 4)
    mask[:, :, [0, 1, t, t + 1]] = 1
    levels = flow_levels(3).tolist()
    for level, following in itertools.pairwise(levels):
        whole = torch.cat([given[0], x[0], given[1], x[1]], dim=1)[None]
        told = torch.tensor([([0.1] * known + [level] * (t - known)) * 2])
        options = {"condition_mask": mask, "fps": 10.0, "views": torch.tensor(CAMERAS)}
        one, other = (world.model(whole, told, text=words, **options)[0] for words in (text, negative))
        velocity = other + 2.5 * (one - other)
        for camera in range(2):
            x[camera] = x[camera] + (following - level) * velocity[:, camera * t + known : (camera + 1) * t]
    expected = world.tokenizer.decode(
        torch.stack([torch.cat([g, new], dim=1) for g, new in zip(given, x, strict=True)])
    )

    for batched in (False, True):
        sampler, ticks = replace(GUIDED, guidance_batched=batched), []
        made = world.generate_views(
            start, 13, views=CAMERAS, text=text, negative=negative, seed=7, sampler=sampler,
            progress=lambda *at, ticks=ticks: ticks.append(at),
        )  # fmt: skip
        assert made.shape == (1, 2, 3, 13, 32, 32)
        assert torch.equal(made[:, :, :, :5], start)
        torch.testing.assert_close(made[0, :, :, 5:], expected[:, :, 5:], atol=1e-4, rtol=0)
        assert ticks == [(1, 3), (2, 3), (3, 3)]


def test_the_first_view_alone_is_a_video() -> None:
    world, start, text = pipeline(), starts(2), drawn(2, 4, 8)
    alone = world.generate_views(start[:, :1], 13, views=[0], text=text, seed=3)
    torch.testing.assert_close(alone[:, 0], world.generate_video(start[:, 0], None, 13, text=text, seed=3))
    beside = world.generate_views(start, 13, views=[0, 1], text=torch.cat([text, text], dim=1), seed=3)
    assert not torch.allclose(beside[:, :1], alone, atol=1e-2)  # they see each other


def test_a_row_does_not_depend_on_its_batch() -> None:
    world, start, text = pipeline(), starts(2), drawn(2, 2 * 4, 8)
    both = world.generate_views(start, 9, views=CAMERAS, text=text, seed=3)
    second = world.generate_views(start[1:], 9, views=CAMERAS, text=text[1:], seed=4)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=0)


def test_views_from_text_alone_where_an_empty_text_is_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    world, words = pipeline(), {"a": drawn(4, 8), "b": drawn(4, 8, seed=1), "no": drawn(4, 8, seed=2)}
    monkeypatch.setattr(world, "encode_text", lambda texts: torch.stack([words[text] for text in texts]))
    zeros = torch.zeros(4, 8)

    def row(*parts: Tensor) -> Tensor:
        return torch.cat(parts)[None]

    made = world.generate_views(None, 9, text=[["a", "", "b"]], negative=[["no", "", ""]], seed=1)
    assert made.shape == (1, 3, 3, 9, 32, 32)
    vectors = row(words["a"], zeros, words["b"])
    away = row(words["no"], zeros, zeros)
    assert torch.equal(made, world.generate_views(None, 9, text=vectors, negative=away, seed=1))
    by_setting = replace(GUIDED, negative_prompt="no")
    assert torch.equal(made, world.generate_views(None, 9, text=[["a", "", "b"]], seed=1, sampler=by_setting))
    assert not torch.equal(made, world.generate_views(None, 9, text=vectors, seed=1))


def test_views_that_cannot_be_made_are_refused() -> None:
    world, text = pipeline(), drawn(1, 2 * 4, 8)
    for options, what in (
        ({"views": [0, 3]}, "views 0 to 2"),
        ({"views": [0]}, r"a start is \(b, 1, 3"),
        ({"views": CAMERAS, "text": [["a"]]}, "2 texts"),
        ({"views": CAMERAS, "sampler": replace(GUIDED, chunk_frames=5)}, "one chunk"),
        ({"views": CAMERAS, "frames": 8}, r"1 \+ 4k"),
    ):
        with pytest.raises(WorldloomError, match=what):
            world.generate_views(starts(1), **{"frames": 9, "text": text, **options})
    with pytest.raises(WorldloomError, match="a start is needed"):
        world.generate_views(None, 9)
    with pytest.raises(WorldloomError, match="one view only"):
        pipeline(views=0).generate_views(starts(1), 9)


def saved(tmp_path: Path, **options: Any) -> str:
    """The pipeline's checkpoint and tokenizer, in folders."""
    world = pipeline(**options)
    folder = tiny_models.tokenizer_folder(tmp_path / "tokenizer")
    config = replace(world.config, tokenizer=TokenizerRef(str(folder)), sampler=replace(GUIDED, guidance_scale=1.0))
    (tmp_path / "world").mkdir()
    write_weights(world.model.state_dict(), tmp_path / "world")
    configs.save(config, tmp_path / "world" / "config.toml")
    return str(tmp_path / "world")


def test_views_of_a_request_are_shown_beside_each_other(tmp_path: Path) -> None:
    model, rng = saved(tmp_path), np.random.default_rng(0)
    files = [str(tmp_path / f"{name}.png") for name in ("front", "left", "right")]
    for file in files:
        media.write_image(file, rng.integers(0, 255, (32, 32, 3)).astype(np.uint8))
    views = [word for file in files for word in ("--view", file)]
    words = ["generate", model, *views, "--frames", "9", "--guardrails", "off", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    (sidecar,) = [path for path in (tmp_path / "out").glob("*.json") if path.name != "summary.json"]
    told = json.loads(sidecar.read_text())
    assert [entry.rpartition(":")[2] for entry in told["inputs"] if entry.startswith("file:")] == files
    world = load_model(model)
    made = world.generate(GenerationRequest(model, views=tuple(files), frames=9))
    assert made.shape == (1, 3, 9, 32, 96)
    start = torch.stack([media.to_tensor(media.read_image(file)[None])[0] for file in files])[None]
    expected = world.generate_views(start, 9, seed=0)
    for camera in range(3):
        assert torch.equal(made[..., 32 * camera : 32 * camera + 32], expected[:, camera])
    assert "found finished" in CliRunner().invoke(main, words).output
    media.write_image(files[1], rng.integers(0, 255, (32, 32, 3)).astype(np.uint8))
    assert "found finished" not in CliRunner().invoke(main, words).output  # another picture, under the same name


def test_requests_for_views_that_cannot_be_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    picture, film = str(tmp_path / "a.png"), str(tmp_path / "a.mp4")
    media.write_image(picture, np.zeros((32, 32, 3), np.uint8))
    media.write_video(film, np.zeros((5, 32, 32, 3), np.uint8), 10.0)
    world, single = load_model(model), pipeline(views=0)
    for asked, said in (
        ({"views": (picture,) * 4}, "knows 3 views"),
        ({"views": (picture,), "image": picture}, "the views are the start"),
        ({"views": (picture, film)}, "different lengths"),
        ({"views": (picture,), "prompt": "a truck"}, "text encoder"),
        ({"views": (picture,), "frames": 10}, "1 \\+ 4k"),
    ):
        with pytest.raises(WorldloomError, match=said):
            world.complete(GenerationRequest(model, **asked))
    with pytest.raises(WorldloomError, match="one view only"):
        single.complete(GenerationRequest(model, views=(picture,)))
