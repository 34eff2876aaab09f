"""The autoencoder: causal, streamed equals whole, single frames, fingerprints, what it refuses, what it saves."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom_tokenizers import CausalVAE, CausalVAEConfig, load_tokenizer
from worldloom_tokenizers import checkpoint as tokenizer_checkpoint

PATCH_OF_TWO = dataclasses.replace(tiny_models.VAE, encoder_blocks=(1, 1, 1))
LONG_KERNEL = dataclasses.replace(tiny_models.VAE, temporal_kernel=4, temporal_ratio=2)
CONFIGS = {"patch 4": tiny_models.VAE, "patch 2": PATCH_OF_TWO, "kernel 4, ratio 2": LONG_KERNEL}
MODELS = {name: tiny_models.tokenizer(3, config) for name, config in CONFIGS.items()}


def video(frames: int, batch: int = 1, size: tuple[int, int] = (16, 24), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, *size, generator=generator) * 2 - 1


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalVAE:
    return MODELS[request.param]


@torch.no_grad()
def test_shapes_are_those_of_the_protocol(model: CausalVAE) -> None:
    assert isinstance(model, VideoTokenizer)
    ratio = model.temporal_ratio
    for groups in (0, 1, 3):
        clip = video(1 + ratio * groups, batch=2)
        latents = model.encode(clip)
        assert latents.shape == (2, model.latent_channels, 1 + groups, 2, 3)
        again = model.decode(latents)
        assert again.shape == clip.shape
        assert again.abs().max() <= 1


@torch.no_grad()
def test_no_frame_depends_on_a_later_one(model: CausalVAE) -> None:
    ratio = model.temporal_ratio
    clip = video(1 + 4 * ratio)
    latents, frames = model.encode(clip), model.decode(model.encode(clip))
    for groups in range(4):
        cut = 1 + groups * ratio
        changed = clip.clone()
        changed[:, :, cut:] = video(clip.shape[2] - cut, seed=9)
        other = model.encode(changed)
        assert torch.equal(other[:, :, : groups + 1], latents[:, :, : groups + 1])
        assert not torch.allclose(other[:, :, groups + 1], latents[:, :, groups + 1], atol=1e-2)
        late = latents.clone()
        late[:, :, groups + 1 :] += 1
        decoded = model.decode(late)
        assert torch.equal(decoded[:, :, :cut], frames[:, :, :cut])
        assert not torch.allclose(decoded[:, :, cut:], frames[:, :, cut:], atol=1e-2)


@torch.no_grad()
def test_later_frames_do_see_earlier_ones(model: CausalVAE) -> None:
    """The reverse of the above: without it a model that mixes no time at all would pass."""
    clip = video(1 + 2 * model.temporal_ratio)
    changed = clip.clone()
    changed[:, :, 0] = video(1, seed=5)[:, :, 0]
    assert not torch.allclose(model.encode(changed)[:, :, 2], model.encode(clip)[:, :, 2], atol=1e-3)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model: CausalVAE) -> None:
    clip = video(1 + model.temporal_ratio, batch=3)
    whole = model.encode(clip)
    for row in range(3):
        torch.testing.assert_close(model.encode(clip[row : row + 1])[0], whole[row], rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(name=st.sampled_from(list(CONFIGS)), pieces=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@torch.no_grad()
def test_streamed_equals_whole(name: str, pieces: list[int]) -> None:
    model = MODELS[name]
    # the first chunk has 1 + r k frames, the others r k, k at least 1
    pieces = [pieces[0], *(max(1, groups) for groups in pieces[1:])]
    ratio = model.temporal_ratio
    clip = video(1 + ratio * sum(pieces), size=(8, 16))
    sizes = [1 + ratio * pieces[0], *(ratio * groups for groups in pieces[1:])]
    latents = model.encode(clip)
    streamed = torch.cat(list(model.stream_encode(clip.split(sizes, dim=2))), dim=2)
    torch.testing.assert_close(streamed, latents, rtol=0, atol=1e-5)
    chunks = latents.split([1 + pieces[0], *pieces[1:]], dim=2)
    decoded = torch.cat(list(model.stream_decode(chunks)), dim=2)
    torch.testing.assert_close(decoded, model.decode(latents), rtol=0, atol=1e-5)


@torch.no_grad()
def test_two_streams_do_not_mix() -> None:
    """Their states are the callers': interleaved, each gives what it gives alone."""
    model = MODELS["patch 4"]
    first, second = (model.encode(video(9, seed=seed)) for seed in (1, 2))
    states: tuple[dict, dict] = ({}, {})
    parts: tuple[list, list] = ([], [])
    for frame in range(3):
        for latents, state, part in zip((first, second), states, parts, strict=True):
            part.append(model.decode_step(latents[:, :, frame : frame + 1], state))
    for latents, part in zip((first, second), parts, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=2), model.decode(latents), rtol=0, atol=1e-5)


@torch.no_grad()
def test_latents_are_normalised_by_the_statistics() -> None:
    model = tiny_models.tokenizer(4)
    raw = model.encode(video(9, batch=4))
    mean, std = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
    before = model.decode(raw)
    model.set_statistics(mean, std)
    latents = model.encode(video(9, batch=4))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(model.decode(latents), before, rtol=0, atol=1e-4)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((1, 3, 4, 16, 16), "1 \\+ 4k"),
        ((1, 3, 0, 16, 16), "1 \\+ 4k"),
        ((1, 3, 5, 12, 16), "multiples of 8"),
        ((1, 3, 5, 16, 0), "multiples of 8"),
        ((1, 4, 5, 16, 16), "\\(b, 3, T, H, W\\)"),
        ((3, 5, 16, 16), "\\(b, 3, T, H, W\\)"),
    ],
)
def test_a_video_of_another_shape_is_refused(shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        MODELS["patch 4"].encode(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_video_that_is_not_finite_is_refused(value: float) -> None:
    clip = video(5)
    clip[0, 1, 2, 3, 4] = value
    with pytest.raises(WorldloomError, match="not finite"):
        MODELS["patch 4"].encode(clip)


def test_latents_of_another_shape_are_refused() -> None:
    for shape in ((1, 5, 2, 2, 2), (1, 4, 0, 2, 2), (4, 2, 2, 2)):
        with pytest.raises(WorldloomError, match="latents are"):
            MODELS["patch 4"].decode(torch.zeros(shape))


def test_a_later_chunk_of_the_wrong_length_is_refused() -> None:
    clip = video(10)
    with pytest.raises(WorldloomError, match="must be 4k"):
        list(MODELS["patch 4"].stream_encode([clip[:, :, :5], clip[:, :, 5:]]))


@pytest.mark.parametrize(
    "options",
    [
        {"latent_channels": 0},
        {"widths": (8, 0, 8)},
        {"temporal_ratio": 0},
        {"temporal_kernel": 1},
        {"decoder_blocks": (0, 0, 0)},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(WorldloomError):
        CausalVAEConfig(**options)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_saved_tokenizer_comes_back(model: CausalVAE, tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer_checkpoint.save(model, tmp_path / "saved", "# card\n", dtype=dtype)
    again = load_tokenizer(tmp_path / "saved")
    assert again.config == model.config
    assert not again.training
    clip = video(1 + model.temporal_ratio)
    if dtype == torch.float32:
        assert again.fingerprint == model.fingerprint
        assert torch.equal(again.encode(clip), model.encode(clip))
    else:
        torch.testing.assert_close(again.encode(clip), model.encode(clip), rtol=0, atol=0.02)
    assert load_tokenizer(tmp_path / "saved").fingerprint == again.fingerprint
    assert (tmp_path / "saved" / "README.md").read_text() == "# card\n"


def test_the_fingerprint_changes_with_any_weight_and_the_configuration() -> None:
    model = tiny_models.tokenizer(6)
    seen = {model.fingerprint}
    names = [*dict(model.named_parameters()), "latent_mean", "latent_std"]
    for name in names:
        tensor = model.state_dict()[name]
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).reshape(-1)
        index = (len(seen) * 7) % flat.numel()
        position = torch.unravel_index(torch.tensor(index), tensor.shape)
        with torch.no_grad():
            before = tensor[position].clone()
            tensor[position] = torch.nextafter(before, torch.tensor(10.0))
            seen.add(model.fingerprint)
            tensor[position] = before
    assert len(seen) == len(names) + 1
    assert model.fingerprint in seen
    ratio = tiny_models.tokenizer(6, dataclasses.replace(tiny_models.VAE, temporal_ratio=4, temporal_kernel=3))
    assert ratio.fingerprint == model.fingerprint
    assert tiny_models.tokenizer(7).fingerprint not in seen


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny_models.tokenizer_folder(tmp_path / "saved")


def test_a_cut_off_file_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(WorldloomError, match="cannot be read"):
            load_tokenizer(saved)


def test_a_pickle_is_refused_by_name(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "model.pt")
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read") as caught:
        load_tokenizer(saved)
    assert "model.pt" in str(caught.value)


def test_weights_of_another_configuration_are_refused(saved: Path) -> None:
    settings_file = saved / "config.toml"
    text = settings_file.read_text()
    settings_file.write_text(text.replace("widths = [8, 8, 16]", "widths = [8, 8, 24]"))
    assert settings_file.read_text() != text
    with pytest.raises(WorldloomError, match="of another model") as caught:
        load_tokenizer(saved)
    assert "other shape" in str(caught.value)


def test_missing_and_unmatched_keys_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["enter.wait"] = weights.pop("enter.weight")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(WorldloomError) as caught:
        load_tokenizer(saved)
    assert "missing ['enter.weight']" in str(caught.value)
    assert "unmatched ['enter.wait']" in str(caught.value)


def test_a_wrong_digest_an_unknown_key_and_an_unknown_name_are_refused(saved: Path) -> None:
    with pytest.raises(WorldloomError, match="not those the catalog names"):
        tokenizer_checkpoint.load(saved, sha256="0" * 64)
    with open(saved / "config.toml", "a") as file:
        file.write("latent_chanels = 4\n")
    with pytest.raises(WorldloomError, match="latent_channels"):
        load_tokenizer(saved)
    with pytest.raises(WorldloomError, match="loom-cv-nano"):
        load_tokenizer("loom-cv-nanno")
    with pytest.raises(WorldloomError, match="no checkpoint here"):
        load_tokenizer("no/such/folder")


def test_saving_over_a_checkpoint_is_refused(saved: Path) -> None:
    with pytest.raises(WorldloomError, match="already exists"):
        tokenizer_checkpoint.save(tiny_models.tokenizer(), saved, "")
    shutil.rmtree(saved)
    tokenizer_checkpoint.save(tiny_models.tokenizer(), saved, "")
    load_tokenizer(saved)
