"""The transformer tokenizer: causal within a window, streamed equals whole, masked training, what it saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom_tokenizers import checkpoint, load_tokenizer
from worldloom_tokenizers.codec import Tiling
from worldloom_tokenizers.config import ViTConfig
from worldloom_tokenizers.vit import CausalViT, angles, rotate

TINY = ViTConfig(
    latent_channels=3, spatial_ratio=8, patch=4, width=16, heads=2, encoder_layers=2, decoder_layers=2, time_every=2,
    window=3,
)  # fmt: skip
CONFIGS = {
    "4 patches a cell": TINY,
    "groups of 2, a patch a cell": dataclasses.replace(TINY, temporal_ratio=2, patch=8, encoder_layers=3),
    "window 1": dataclasses.replace(TINY, window=1),
}


def tokenizer(config: ViTConfig = TINY, seed: int = 0) -> CausalViT:
    torch.manual_seed(seed)
    model = CausalViT(config)
    with torch.no_grad():
        for token in (model.hidden_token, model.latent_token, model.patch_token):
            token.vector.mul_(50)
    return model.eval()


MODELS = {name: tokenizer(config, 3) for name, config in CONFIGS.items()}


def video(frames: int, batch: int = 1, size: tuple[int, int] = (16, 24), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, *size, generator=generator) * 2 - 1


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalViT:
    return MODELS[request.param]


@torch.no_grad()
def test_shapes_are_those_of_the_protocol(model: CausalViT) -> None:
    assert isinstance(model, VideoTokenizer)
    ratio = model.temporal_ratio
    for groups, size in ((0, (8, 8)), (1, (16, 24)), (9, (32, 8))):
        clip = video(1 + ratio * groups, batch=2, size=size)
        latents = model.encode(clip)
        assert latents.shape == (2, 3, 1 + groups, size[0] // 8, size[1] // 8)
        assert latents.abs().max() <= 1  # tanh; statistics are 0 and 1 here
        again = model.decode(latents)
        assert again.shape == clip.shape
        assert again.abs().max() <= 1


@torch.no_grad()
def test_no_frame_depends_on_a_later_one_and_the_present_is_seen(model: CausalViT) -> None:
    ratio = model.temporal_ratio
    clip = video(1 + 4 * ratio)
    latents, frames = model.encode(clip), model.decode(model.encode(clip))
    for groups in range(4):
        cut = 1 + groups * ratio
        changed = clip.clone()
        changed[:, :, cut:] = video(clip.shape[2] - cut, seed=9)
        other = model.encode(changed)
        torch.testing.assert_close(other[:, :, : groups + 1], latents[:, :, : groups + 1], rtol=0, atol=1e-6)
        assert not torch.allclose(other[:, :, groups + 1], latents[:, :, groups + 1], atol=1e-2)
        late = latents.clone()
        late[:, :, groups + 1 :] += 1
        decoded = model.decode(late)
        torch.testing.assert_close(decoded[:, :, :cut], frames[:, :, :cut], rtol=0, atol=1e-6)
        assert not torch.allclose(decoded[:, :, cut], frames[:, :, cut], atol=1e-3)


@torch.no_grad()
def test_the_past_is_seen_as_far_as_the_window() -> None:
    model = MODELS["4 patches a cell"]  # one layer along time in each direction
    clip = video(8)
    latents = model.encode(clip)
    frames = model.decode(latents)
    changed, late = clip.clone(), latents.clone()
    changed[:, :, 2] = video(1, seed=5)[:, :, 0]
    late[:, :, 2] += 1
    for one, other in ((model.encode(changed), latents), (model.decode(late), frames)):
        moved = (one - other).abs().amax(dim=(0, 1, 3, 4))
        assert (moved[2:5] > 1e-3).all()  # the window is 3 frames
        assert (moved[5:] < 1e-6).all()


@settings(max_examples=25)
@given(name=st.sampled_from(list(CONFIGS)), pieces=st.lists(st.integers(0, 4), min_size=1, max_size=6))
@torch.no_grad()
def test_streamed_equals_whole(name: str, pieces: list[int]) -> None:
    model = MODELS[name]
    pieces = [pieces[0], *(max(1, groups) for groups in pieces[1:])]
    ratio = model.temporal_ratio
    clip = video(1 + ratio * sum(pieces), size=(8, 16))
    sizes = [1 + ratio * pieces[0], *(ratio * groups for groups in pieces[1:])]
    with torch.enable_grad():  # where gradients are recorded, the whole is computed at once
        latents = model.encode(clip).detach()
        frames = model.decode(latents).detach()
    streamed = torch.cat(list(model.stream_encode(clip.split(sizes, dim=2))), dim=2)
    torch.testing.assert_close(streamed, latents, rtol=0, atol=1e-5)
    decoded = torch.cat(list(model.stream_decode(latents.split([1 + pieces[0], *pieces[1:]], dim=2))), dim=2)
    torch.testing.assert_close(decoded, frames, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode(clip, chunk=1), latents, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_stream_needs_constant_memory() -> None:
    model, state, sizes = MODELS["4 patches a cell"], {}, []
    for seed in range(12):
        model.encode_step(video(1, seed=seed), state)
        sizes.append(sum(tensor.numel() for tensor in state.values()))
    assert sizes[0] < sizes[2] == sizes[3] == sizes[-1]


@torch.no_grad()
def test_tiles_give_what_the_whole_gives() -> None:
    model, tiling = MODELS["4 patches a cell"], Tiling(tile=(8, 16))
    clip = video(5)
    latents = model.encode(clip)
    torch.testing.assert_close(model.encode(clip, tiling=tiling), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents, tiling=tiling), model.decode(latents), rtol=0, atol=1e-5)


# -- tokens and grids ------------------------------------------------------------------------------------------------


def test_patches_are_cut_in_rows_and_put_back(model: CausalViT) -> None:
    clip = video(1 + 2 * model.temporal_ratio, batch=2)
    features = model._to_features(clip, None)
    patches = model._split(features)
    assert torch.equal(model._join(patches, 2, 3), features)
    assert torch.equal(model._from_features(features, None), clip)
    side, ratio = model.config.patch, model.temporal_ratio
    for frame, (row, column) in ((0, (0, 0)), (1, (1, 2)), (2, (16 // side - 1, 0))):
        first = max(1 + (frame - 1) * ratio, 0)
        cut = clip[1, :, first : first + ratio if frame else 1]
        cut = cut[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
        found = patches[1, frame, row * (24 // side) + column].unflatten(0, (3, ratio, side, side))
        assert torch.equal(found if frame else found[:, -1:], cut)


def test_latent_tokens_lie_at_the_centres_of_their_cells(model: CausalViT) -> None:
    turn, count = model._turn(2, 3, torch.device("cpu"))
    side = model.config.spatial_ratio // model.config.patch
    assert turn.shape == (count + 6, 4)
    assert count == 6 * side**2
    for cell in range(6):
        inside = [(cell // 3 * side + y) * 3 * side + cell % 3 * side + x for y in range(side) for x in range(side)]
        torch.testing.assert_close(turn[count + cell], turn[inside].mean(dim=0))
    assert len({tuple(row.tolist()) for row in turn[count:]}) == 6


@given(shift=st.integers(0, 40), seed=st.integers(0, 99))
def test_only_differences_of_positions_matter(shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    place = torch.arange(5)
    here = rotate(q, angles(place, 4)) @ rotate(k, angles(place, 4)).T
    there = rotate(q, angles(place + shift, 4)) @ rotate(k, angles(place + shift, 4)).T
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    assert torch.equal(rotate(q, angles(torch.zeros(5), 4)), q)
    turned = rotate(q, angles(place, 4))
    pairs = torch.view_as_complex(torch.stack(q.chunk(2, dim=-1), dim=-1)) * torch.exp(1j * angles(place, 4).double())
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], dim=-1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_who_sees_whom() -> None:
    model, clip = tokenizer(), video(3)
    seen: dict[str, torch.Tensor] = {}
    model.encoder.register_forward_hook(lambda module, args, out: seen.__setitem__("encoder", out))
    model.decoder.register_forward_hook(lambda module, args, out: seen.__setitem__("decoder", out))
    patches = 24
    model.decode_raw(model.encode_raw(clip))
    before = dict(seen)
    # The encoder's patches do not see its latent tokens, the decoder's latent tokens do not see its patches ...
    model.latent_token.vector.add_(1)
    latents = model.encode_raw(clip)
    assert torch.equal(seen["encoder"][:, :, :patches], before["encoder"][:, :, :patches])
    assert not torch.allclose(seen["encoder"][:, :, patches:], before["encoder"][:, :, patches:], atol=1e-2)
    model.decode_raw(latents)
    before = dict(seen)
    model.patch_token.vector.add_(1)
    model.decode_raw(latents)
    assert torch.equal(seen["decoder"][:, :, patches:], before["decoder"][:, :, patches:])
    # ... and the other way round they do: a cell's pixels reach every latent, a latent every pixel.
    changed = clip.clone()
    changed[..., :4, :4] *= -1
    assert (model.encode_raw(changed) - latents).abs().amax(dim=(0, 1, 2)).min() > 1e-4
    moved = latents.clone()
    moved[..., 0, 0] += 0.5
    assert (model.decode_raw(moved) - model.decode_raw(latents)).abs().amax(dim=(0, 1, 2)).min() > 1e-5


# -- masked training -------------------------------------------------------------------------------------------------


def test_hidden_patches_come_from_the_generator_alone() -> None:
    model, clip = tokenizer(), video(4, batch=2)

    def encoded(seed: int, config: ViTConfig = TINY) -> torch.Tensor:
        torch.manual_seed(seed + 7)  # what is drawn elsewhere does not matter
        model.config = config
        return model.encode_for_training(clip, torch.Generator().manual_seed(seed))

    plain = model.encode_raw(clip)
    assert torch.equal(encoded(1), encoded(1))
    assert not torch.allclose(encoded(1), encoded(2), atol=1e-3)
    assert not torch.allclose(encoded(1), plain, atol=1e-3)
    torch.testing.assert_close(encoded(1, dataclasses.replace(TINY, hidden=0.0)), plain, rtol=0, atol=1e-6)


def test_the_hidden_share_of_a_frame_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shares = tokenizer(), []

    def encode(features: torch.Tensor, state: Any, hidden: torch.Tensor) -> torch.Tensor:
        shares.extend(hidden.float().mean(dim=2).flatten().tolist())
        return features

    monkeypatch.setattr(model, "_encode", encode)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        model.encode_for_training(torch.zeros(4, 3, 50, 64, 64), generator)
    found = np.sort(shares)  # 800 frames of 256 patches
    expected = np.linspace(0, 0.9, len(found))
    assert np.abs(found - expected).max() < 0.06  # Kolmogorov-Smirnov: 5 % at 0.043


def test_every_weight_is_trained_even_where_nothing_is_hidden() -> None:
    model = tokenizer(dataclasses.replace(TINY, hidden=0.0))
    made = model.decode_raw(model.encode_for_training(video(4), torch.Generator()))
    made.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.abs().max() > 0) == ("hidden_token" not in name), name


def test_masked_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    model = CausalViT(ViTConfig(latent_channels=8, width=64, encoder_layers=2, decoder_layers=2, time_every=2))
    clips = torch.cat([media.to_tensor(tiny_models.moving_square(4, seed)) for seed in range(4)])
    model.initialise(clips)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(240):
        loss = (model.decode_raw(model.encode_for_training(clips, generator)) - clips).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    with torch.no_grad():
        error = (model.decode_raw(model.encode_raw(clips)) - clips).square().mean()
    # Better than any picture that is the same for all frames: the latents tell them apart.
    assert error < 0.8 * (clips - clips.mean(dim=(0, 2), keepdim=True)).square().mean()


def test_training_begins_at_the_mean_patch() -> None:
    model, clip = tokenizer(), video(4, batch=2) + 0.7
    before = (model.decode_raw(model.encode_raw(clip)) - clip).square().mean()
    model.initialise(clip)
    error = (model.decode_raw(model.encode_raw(clip)) - clip).square().mean()
    assert error < before
    assert error.item() == pytest.approx(clip.var().item(), rel=0.1)


# -- files, refusals -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_tokenizer_comes_back(model: CausalViT, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "saved", "# card\n", dtype=torch.float32)
    assert checkpoint.read_config(tmp_path / "saved" / "config.toml").kind == "vit"
    again = load_tokenizer(tmp_path / "saved")
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    clip = video(1 + model.temporal_ratio)
    assert torch.equal(again.encode(clip), model.encode(clip))
    assert tokenizer(model.config, 4).fingerprint != model.fingerprint
    checkpoint.save(model, tmp_path / "half", "# card\n")
    torch.testing.assert_close(load_tokenizer(tmp_path / "half").encode(clip), model.encode(clip), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_channels": 0},
        {"width": 20},
        {"spatial_ratio": 12},
        {"spatial_ratio": 0},
        {"window": 0},
        {"time_every": 1},
        {"hidden": 1.0},
        {"hidden": -0.1},
        {"decoder_layers": 0},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(WorldloomError):
        ViTConfig(**options)
