"""The latent action model and its codebook: recovered moves, shapes, a closed code bottleneck, refusals, folders."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import latent_worlds
import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from finetune_runs import make_clips
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional as F

from worldloom import media
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom_tokenizers.config import LatentActionConfig
from worldloom_tokenizers.evaluate_actions import contingency, evaluate, nmi, purity
from worldloom_tokenizers.latent_actions import LatentActionModel, load_latent_actions, save
from worldloom_tokenizers.vq import VectorQuantizer

TINY = LatentActionConfig(width=16, balance=0.02)


def model(config: LatentActionConfig = TINY, seed: int = 0) -> LatentActionModel:
    """Random weights, no layer left at zero."""
    torch.manual_seed(seed)
    made = LatentActionModel(config)
    tiny_models.stir(made, seed)
    return made.eval()


def video(frames: int, batch: int = 1, size: tuple[int, int] = (16, 24), seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- what it learns --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt() -> LatentActionModel:
    """A model that saw the moving square for a few seconds, without its moves."""
    torch.manual_seed(0)
    clips = torch.cat([media.to_tensor(latent_worlds.moves(65, seed)[0]) for seed in range(20)])
    pairs = torch.stack([clips[:, :, :-1], clips[:, :, 1:]], dim=3).movedim(2, 1).flatten(0, 1)  # (n, 3, 2, H, W)
    made, generator = LatentActionModel(TINY), torch.Generator().manual_seed(0)
    made.initialise(pairs[:256])
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3, betas=(0.9, 0.99))
    for _ in range(300):
        chosen = torch.randint(len(pairs), (32,), generator=generator)
        loss, _ = made.loss(pairs[chosen], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made.eval()


@pytest.fixture(scope="module")
def unseen() -> tuple[Tensor, np.ndarray]:
    worlds = [latent_worlds.moves(65, seed) for seed in range(100, 106)]
    return torch.cat([media.to_tensor(frames) for frames, _ in worlds]), np.stack([taken for _, taken in worlds])


def test_the_moves_of_a_square_are_recovered(learnt: LatentActionModel, unseen: tuple[Tensor, np.ndarray]) -> None:
    frames, taken = unseen
    counts = contingency(learnt.infer(frames).flatten().numpy(), taken.flatten(), (8, 4))
    assert counts.sum(axis=0).max() / counts.sum() < 0.35  # so that purity says something
    assert purity(counts) > 0.9
    assert nmi(counts) > 0.7


def test_a_code_decides_what_comes_next(learnt: LatentActionModel, unseen: tuple[Tensor, np.ndarray]) -> None:
    frames, _ = unseen
    past, following, found = frames[:, :, :-1], frames[:, :, 1:], learnt.infer(frames)
    error = (learnt.predict(past, found) - following).square().mean()
    assert error < 0.2 * (past - following).square().mean()
    assert error < 0.2 * (learnt.predict(past, found.roll(1, dims=0)) - following).square().mean()


# -- shapes and causality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [1, 3])
def test_shapes(past: int) -> None:
    made = model(dataclasses.replace(TINY, past=past))
    frames = video(6, batch=2)
    actions = made.infer(frames)
    assert actions.shape == (2, 5)
    assert actions.dtype == torch.int64
    assert made.predict(frames, torch.zeros(2, 6, dtype=torch.int64)).shape == frames.shape
    loss, metrics = made.loss(frames)
    assert loss.shape == ()
    assert set(metrics) == {"error", "still", "perplexity"}


@pytest.mark.parametrize("past", [1, 3])
def test_actions_and_predictions_look_back_as_far_as_they_say(past: int) -> None:
    made = model(dataclasses.replace(TINY, past=past))
    frames, codes = video(8), torch.arange(8)[None]
    actions, predicted = made.infer(frames), made.predict(frames, codes)
    changed = frames.clone()
    changed[:, :, 4] = video(1, seed=9)[:, :, 0]
    again = made.predict(changed, codes)
    differs = (again != predicted).flatten(3).any(dim=3).any(dim=1)[0]
    assert differs.tolist() == [4 <= t < 4 + past for t in range(8)]
    assert torch.equal(made.infer(changed)[:, :3], actions[:, :3])
    assert torch.equal(made.infer(changed)[:, 4 + past :], actions[:, 4 + past :])


def test_long_videos_are_computed_in_parts() -> None:
    made, frames = model(), video(300, size=(8, 8))
    actions = made.infer(frames)
    parts = [made.infer(frames[:, :, i : i + 2]) for i in range(299)]
    assert torch.equal(actions, torch.cat(parts, dim=1))


def test_the_decoder_hears_of_the_next_frame_through_the_code_alone() -> None:
    """The loss of pairs with equal codes and equal pasts differs by their targets only."""
    made = model()
    past, code = video(1, batch=2)[:, :, 0], torch.tensor([3, 3])
    one = made.decoder(past, made.quantizer.lookup(code))
    assert torch.equal(one, made.predict(past[:, :, None], code[:, None])[:, :, 0].where(one.abs() <= 1, one))
    assert len({made.predict(past[:1, :, None], torch.tensor([[c]])).sum().item() for c in range(8)}) == 8


def test_moving_pixels_count_more() -> None:
    frames = video(2, size=(8, 8)) * 0.0
    frames[:, :, 1, :4] = 0.5  # half of the picture moves
    still = model(dataclasses.replace(TINY, moving_weight=3.0)).loss(frames)[1]["still"]
    assert still == pytest.approx(0.25 * 4 / 5)  # 4 parts of weight in 5 lie where the error is 0.25
    assert model(dataclasses.replace(TINY, moving_weight=0.0)).loss(frames)[1]["still"] == pytest.approx(0.125)


# -- the codebook ----------------------------------------------------------------------------------------------------


def test_the_nearest_code_is_chosen_and_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    book, vectors = VectorQuantizer(8, 3), torch.randn(50, 3, requires_grad=True)
    made = book(vectors)
    units = F.normalize(vectors, dim=1)
    assert torch.equal(made.indices, torch.cdist(units, F.normalize(book.codebook, dim=1)).argmin(dim=1))
    torch.testing.assert_close(made.codes, book.lookup(made.indices))
    weight = torch.randn(50, 3)
    (through,) = torch.autograd.grad((made.codes * weight).sum(), vectors, retain_graph=True)
    (direct,) = torch.autograd.grad((units * weight).sum(), vectors)
    torch.testing.assert_close(through, direct)


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    book, vectors = VectorQuantizer(4, 3, commitment=0.5), torch.randn(20, 3)
    made = book(vectors)
    apart = (F.normalize(vectors, dim=1) - book.lookup(made.indices)).square().sum(dim=1).mean()
    torch.testing.assert_close(made.loss, 1.5 * apart)


def test_balance_prefers_vectors_on_all_codes() -> None:
    book = VectorQuantizer(4, 3, commitment=0.0, balance=1.0)
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]))
    spread, collapsed = book(book.codebook).loss, book(book.codebook[:1].expand(4, -1)).loss
    assert spread.item() == pytest.approx(-math.log(4), abs=1e-3)
    assert collapsed.item() == pytest.approx(0, abs=2e-3)


def test_a_code_that_nothing_chooses_is_revived() -> None:
    torch.manual_seed(0)
    book = VectorQuantizer(4, 3, commitment=0.0)
    vectors = F.normalize(torch.randn(64, 3) * 0.2 + torch.tensor([1.0, 0, 0]), dim=1)
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[1.0, 0, 0], [-1, 0.1, 0], [-1, 0, 0.1], [-1, 0.1, 0.1]]))
    assert len(book(vectors).indices.unique()) == 1
    optimizer, generator = torch.optim.Adam(book.parameters(), 0.02), torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        book(vectors, generator).loss.backward()
        optimizer.step()
    assert len(book(vectors).indices.unique()) == 4


@pytest.mark.parametrize("bypass", [0.0, 0.3, 1.0])
def test_bypass_lets_that_share_through_in_training_only(bypass: float) -> None:
    torch.manual_seed(0)
    book, vectors = VectorQuantizer(4, 3, bypass=bypass), F.normalize(torch.randn(4000, 3), dim=1)
    trained = book(vectors, torch.Generator().manual_seed(0))
    free = torch.isclose(trained.codes, vectors, atol=1e-6).all(dim=1)
    assert free.double().mean() == pytest.approx(bypass, abs=0.03)
    torch.testing.assert_close(trained.codes[~free], book.lookup(trained.indices)[~free])
    torch.testing.assert_close(book(vectors).codes, book.lookup(trained.indices))


def test_codes_start_in_the_middle_of_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    vectors = middles.repeat(40, 1) + 0.02 * torch.randn(200, 4, generator=generator)
    book = VectorQuantizer(5, 4)
    book.initialise(vectors)
    assert (book.codebook @ middles.T).amax(dim=0).min() > 0.999
    assert book(vectors).indices.bincount().tolist() == [40] * 5


def test_initial_codes_all_have_their_pairs() -> None:
    made = LatentActionModel(TINY)
    frames = torch.cat([media.to_tensor(latent_worlds.moves(33, seed)[0]) for seed in range(8)])
    assert len(made.infer(frames).unique()) < 6  # what random weights make of them
    made.initialise(frames)
    assert len(made.infer(frames).unique()) == 8
    with pytest.raises(WorldloomError, match="8 codes need as many pairs"):
        made.initialise(frames[:1, :, :5])


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        (torch.zeros(1, 3, 1, 16, 16), "T at least 2"),
        (torch.zeros(1, 1, 4, 16, 16), r"\(b, 3, T, H, W\)"),
        (torch.zeros(3, 4, 16, 16), r"\(b, 3, T, H, W\)"),
        (torch.zeros(0, 3, 4, 16, 16), r"\(b, 3, T, H, W\)"),
        (torch.zeros(1, 3, 4, 16, 12), "multiples of 8"),
        (torch.zeros(1, 3, 4, 0, 16), "multiples of 8"),
        (torch.full((1, 3, 4, 16, 16), math.nan), "not finite"),
    ],
)
def test_what_is_no_video_is_refused(frames: Tensor, what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        model().infer(frames)


@pytest.mark.parametrize(
    ("actions", "what"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), "one for each frame"),
        (torch.zeros(1, 4), "are integers"),
        (torch.full((1, 4), 8), "are 0 to 7"),
        (torch.full((1, 4), -1), "are 0 to 7"),
    ],
)
def test_actions_that_are_none_are_refused(actions: Tensor, what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        model().predict(video(4), actions)


@pytest.mark.parametrize("change", [{"codes": 1}, {"code_dim": 1}, {"past": 0}, {"width": 12}, {"decoder_blocks": 0}])
def test_impossible_configurations_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(WorldloomError, match="must be"):
        dataclasses.replace(TINY, **change)
    with pytest.raises(WorldloomError, match="at least two codes"):
        VectorQuantizer(1, 3)


# -- folders ---------------------------------------------------------------------------------------------------------


def test_saved_is_loaded(tmp_path: Path) -> None:
    made = model(dataclasses.replace(TINY, codes=5))
    save(made, tmp_path / "lam", "# a card\n", torch.float32)
    again = load_latent_actions(tmp_path / "lam")
    assert again.config == made.config
    assert again.fingerprint == made.fingerprint
    assert not again.training
    assert torch.equal(again.infer(video(5)), made.infer(video(5)))
    assert (tmp_path / "lam" / "README.md").read_text() == "# a card\n"


def test_fingerprints_tell_models_apart() -> None:
    first, other = model(), model()
    assert first.fingerprint == other.fingerprint
    with torch.no_grad():
        other.quantizer.codebook[0, 0] += 1
    wider = model(dataclasses.replace(TINY, moving_weight=2.0))
    assert len({first.fingerprint, other.fingerprint, wider.fingerprint}) == 3


def test_what_is_no_latent_action_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no checkpoint here"):
        load_latent_actions(tmp_path / "absent")
    with pytest.raises(WorldloomError, match="no latent action model"):
        load_latent_actions(tiny_models.tokenizer_folder(tmp_path / "tokenizer"))
    with pytest.raises(WorldloomError, match="no latent action model"):
        load_latent_actions("loom-cv-nano")
    with pytest.raises(WorldloomError, match="no tokenizer of that name"):
        load_latent_actions("loom-lam-pico")


# -- evaluation ------------------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60)


@given(pairs)
def test_measures_agree_with_their_definitions(seen: list[tuple[int, int]]) -> None:
    codes, actions = np.array(seen).T
    counts = contingency(codes, actions, (6, 4))
    majorities = {c: np.bincount(actions[codes == c]).max() for c in set(codes.tolist())}
    assert purity(counts) == pytest.approx(sum(majorities.values()) / len(seen))
    if len(set(codes)) > 1 or len(set(actions)) > 1:
        assert nmi(counts) == pytest.approx(normalized_mutual_info_score(actions, codes), abs=1e-9)
    else:
        assert nmi(counts) == 0


def test_evaluation_of_a_dataset(learnt: LatentActionModel, tmp_path: Path) -> None:
    data = latent_worlds.make_moves(tmp_path / "data", clips=4, seed=200)
    result = evaluate(learnt, data)
    assert result.purity > 0.9
    assert result.majority == max(map(sum, zip(*result.counts, strict=True))) / 128
    assert result.majority <= result.random < 0.5
    assert result.actions == latent_worlds.MOVES
    assert (result.steps, result.episodes) == (128, 4)
    assert result.controllability > 3
    assert result.psnr > result.psnr_still + 5
    save(learnt, tmp_path / "lam", "# a card\n", torch.float32)
    words = [
        "tokenize",
        "actions",
        "eval",
        str(data),
        "--model",
        str(tmp_path / "lam"),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
    ]
    shown = CliRunner().invoke(main, words, catch_exceptions=False)
    assert shown.exit_code == 0
    assert f"{result.purity:.3f}" in shown.output
    assert "right" in shown.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["purity"] == result.purity
    assert summary["controllability"] == result.controllability
    assert summary["counts"] == [list(row) for row in result.counts]


def test_data_without_discrete_actions_cannot_be_compared_with(tmp_path: Path) -> None:
    tiny_models.clips(tmp_path / "none", lengths=(5,), names=None)
    with pytest.raises(WorldloomError, match="no actions"):
        evaluate(model(), tmp_path / "none")
    with pytest.raises(WorldloomError, match="stored one-hot"):
        evaluate(model(), make_clips(tmp_path / "continuous"))
