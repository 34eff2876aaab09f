"""The models that ship do what their cards say, on episodes recorded here with seeds that training never saw."""

from pathlib import Path

import numpy as np
import pytest
import torch

from worldloom import media, registry
from worldloom.artifacts import file_digest
from worldloom.loading import load_model
from worldloom.protocols import Generates, Steps, VideoTokenizer
from worldloom.shards import open_dataset
from worldloom_model_zoo.evaluate import TOKENIZER, EvalConfig, EvalResult, evaluate
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.evaluate import TokenizerEvalConfig
from worldloom_tokenizers.evaluate import evaluate as evaluate_tokenizer

SHIPPED = [(group, name) for group in ("tokenizers", "models") for name in registry.names(group)]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes of the maze; training used seeds from 10,000 on."""
    from worldloom_curation.record import record

    out = tmp_path_factory.mktemp("maze")
    record(
        "VizdoomMyWayHome-v1", 8, out, seed=95_000, size=(64, 64), max_steps=120, frame_skip=2, hold=6.0,
        depth=False, segmentation=False, quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def result(episodes: Path) -> EvalResult:
    return evaluate(load_model("loom-world-nano"), episodes, EvalConfig(clips=48, videos=0))


@pytest.mark.parametrize(("group", "name"), SHIPPED)
def test_weights_are_those_of_the_catalog_and_come_with_a_card(group: str, name: str) -> None:
    entry = registry.entry(group, name)
    assert entry.folder is not None
    weights = entry.folder / "model.safetensors"
    assert file_digest(weights) == entry.meta["sha256"]
    assert weights.stat().st_size < 40e6
    assert len((entry.folder / "README.md").read_text()) > 500


def test_they_have_the_capabilities_they_are_shipped_for() -> None:
    assert isinstance(load_tokenizer("loom-cv-nano"), VideoTokenizer)
    model = load_model("loom-world-nano")
    assert isinstance(model, Generates)
    assert isinstance(model, Steps)
    assert model.action_dim == len(model.config.action_names)


def test_the_tokenizer_reconstructs_unseen_episodes_at_28_db(result: EvalResult) -> None:
    assert result.psnr[TOKENIZER] >= 28


def test_the_discrete_tokenizer_reconstructs_unseen_episodes_at_26_db(episodes: Path) -> None:
    config = TokenizerEvalConfig(frames=17, size=(64, 64), clips=32, videos=0)
    found = evaluate_tokenizer(load_tokenizer("loom-dv-nano"), episodes, config)
    assert found.psnr >= 26
    assert found.codes is not None
    assert min(found.codes.usage) >= 0.25  # of a thousand each, by 40,960 codes of one environment
    assert found.bits_per_pixel < 0.2


def test_the_world_model_beats_repeating_the_last_frame_by_1_db(result: EvalResult) -> None:
    assert result.config.horizon == 8
    assert result.gain >= 1


def test_the_world_model_follows_its_actions_by_half_a_db(result: EvalResult) -> None:
    assert result.action_sensitivity is not None
    assert result.action_sensitivity >= 0.5


def test_stepping_makes_the_same_world_as_generating(episodes: Path) -> None:
    model = load_model("loom-world-nano")
    sample = open_dataset(episodes).load(0)
    video = media.to_tensor(media.read_frames(sample.video or b"")[:9])
    names = tuple(sample.clip.metadata["action_names"])
    actions = model.align(torch.from_numpy(sample.arrays["actions"][None, :24]), names)
    whole = model.generate_video(video, actions, 25, seed=3)
    model.reset(video, actions[:, :8], seed=3)
    stepped = model.rollout(actions[:, 8:])
    assert (whole[:, :, 9:] - stepped).abs().max() < 1e-3


def test_a_long_rollout_stays_in_the_range_of_its_world(episodes: Path) -> None:
    """Two hundred frames under random actions: neither black, nor white, nor noise, nor frozen."""
    model = load_model("loom-world-nano")
    truth = media.read_frames(open_dataset(episodes).load(0).video or b"")
    model.reset(media.to_tensor(truth[:9]), seed=0)
    chosen = np.random.default_rng(0).integers(0, model.action_dim, 50).repeat(4)
    actions = torch.nn.functional.one_hot(torch.from_numpy(chosen), model.action_dim).float()[None]
    frames = media.to_frames(model.rollout(actions))[0].astype(float)
    late = frames[-40:]
    assert 15 < late.mean() < 160
    assert 8 < late.std() < 90
    roughness = np.abs(np.diff(late, axis=2)).mean()
    assert roughness < 3 * np.abs(np.diff(truth.astype(float), axis=2)).mean()
    assert np.abs(np.diff(late, axis=0)).mean() > 0.2


def test_a_prompt_decides_which_world_is_shown() -> None:
    """Told apart by colour: Pong is orange, the medkits lie on a green floor."""
    model = load_model("loom-predict-nano")
    prompts = ["a game of Pong", "first-person view of a room with green acid floor and medical kits"]
    made = media.to_frames(model.generate_video(None, None, 5, text=prompts, seed=11)).astype(float)
    pong, health = made[:, -1]
    assert pong.mean((0, 1))[0] > pong.mean((0, 1))[1] + 40  # red over green
    floor = health[40:].mean((0, 1))
    assert floor[1] > floor[0] + 10  # green over red
    assert floor[1] > floor[2] + 10


def test_given_frames_are_kept_exactly(episodes: Path) -> None:
    model = load_model("loom-predict-nano")
    start = media.to_tensor(media.read_frames(open_dataset(episodes).load(1).video or b"")[:5])
    for given in (start[:, :, :1], start):
        made = model.generate_video(given, None, 9, text=["walking through a maze"], seed=1)
        assert torch.equal(made[:, :, : given.shape[2]], given)
        assert made.shape[2] == 9
