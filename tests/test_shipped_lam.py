"""The latent action model that ships finds the actions of episodes recorded here with seeds that training never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from worldloom import media, registry
from worldloom.cli import main
from worldloom.shards import open_dataset
from worldloom_tokenizers.latent_actions import LatentActionModel, load_latent_actions


@pytest.fixture(scope="module")
def model() -> LatentActionModel:
    return load_latent_actions("loom-lam-nano")


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes; training used the seeds from 20,000 to 20,239."""
    from worldloom_curation.record import record

    out = tmp_path_factory.mktemp("health")
    record(
        "VizdoomHealthGathering-v1", 8, out, seed=95_000, size=(64, 64), max_steps=150, frame_skip=4, hold=10.0,
        depth=False, segmentation=False, quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def found(episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the measuring command, as a user runs it."""
    out = tmp_path_factory.mktemp("eval")
    words = ["tokenize", "actions", "eval", str(episodes), "--out", str(out)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads((out / "summary.json").read_text())


def test_its_codes_are_the_actions(found: dict[str, Any]) -> None:
    assert found["model"]["name"] == "loom-lam-nano"
    assert found["actions"] == ["NOOP", "MOVE_FORWARD", "TURN_RIGHT", "TURN_LEFT"]
    assert found["purity"] >= 0.8
    assert found["purity"] > max(found["majority"], found["random"]) + 0.3
    assert found["nmi"] > 0.4


def test_its_codes_steer_the_next_frame(found: dict[str, Any]) -> None:
    assert found["controllability"] > 1
    assert found["psnr"] > found["psnr_still"] + 1


def test_the_codes_of_turns_shift_every_frame_to_opposite_sides(
    model: LatentActionModel, episodes: Path, found: dict[str, Any]
) -> None:
    """Also frames that were recorded under other actions: a right turn moves the picture left, a left turn right."""
    counts = torch.tensor(found["counts"])
    video = torch.cat(
        [media.to_tensor(media.read_frames(sample.video or b"")[5:60:5]) for sample in open_dataset(episodes)], dim=2
    )
    shifts = {}
    for action in (0, 2, 3):
        code = int(counts[:, action].argmax())
        made = model.predict(video, torch.full((1, video.shape[2]), code))
        errors = {s: (made - video.roll(s, dims=4))[..., 12:-12].square().mean().item() for s in range(-12, 13)}
        shifts[found["actions"][action]] = min(errors, key=errors.__getitem__)
    assert shifts["NOOP"] == 0
    assert -12 < shifts["TURN_RIGHT"] < -2
    assert 2 < shifts["TURN_LEFT"] < 12


def test_it_is_small_and_its_card_says_how_it_was_made() -> None:
    entry = registry.entry("tokenizers", "loom-lam-nano")
    assert entry.folder is not None
    assert (entry.folder / "model.safetensors").stat().st_size < 5e6
    card = (entry.folder / "README.md").read_text()
    for command in ("curate record", "finetune latent-actions", "tokenize actions eval"):
        assert f"worldloom {command}" in card
