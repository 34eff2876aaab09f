"""What every tokenizer owes: chunks, streams, prefixes, padding and tiles give what the whole gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import tiny_models
import torch

from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom_tokenizers import layers
from worldloom_tokenizers.checkpoint import build
from worldloom_tokenizers.codec import State, Tiling, VideoCodec
from worldloom_tokenizers.cosmos import model as cosmos
from worldloom_tokenizers.cosmos import past
from worldloom_tokenizers.cosmos.config import cv, dv
from worldloom_tokenizers.wan.config import WanVAEConfig

WAN21 = WanVAEConfig(encoder_width=8, decoder_width=8, latent_channels=4, mean=(0.1,) * 4, std=(2.0,) * 4)
CONFIGS = {
    "loom continuous": tiny_models.VAE,
    "loom discrete": replace(tiny_models.VAE, levels=(8, 5)),
    "wan 2.1": WAN21,
    "wan 2.2": replace(WAN21, decoder_width=16, patch=2, residual=True),
    "cosmos cv": replace(cv(4, 8), width=8, z_channels=6, latent_channels=6),
    "cosmos cv 8x8x8": replace(cv(8, 8), width=8, z_channels=6, latent_channels=6),
    "cosmos dv 8x16x16": replace(dv(8, 16), width=8, z_channels=6),
}
LOCAL = ("loom continuous", "loom discrete", "wan 2.1", "wan 2.2")
"""Tokenizers whose tiled results are those of the whole; Cosmos normalises over whole frames."""


def model_of(name: str) -> VideoCodec:
    torch.manual_seed(0)
    model = build(CONFIGS[name])
    tiny_models.scatter(model, 0)
    return model.eval()


MODELS = {name: model_of(name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> VideoCodec:
    return MODELS[request.param]


def video(model: VideoCodec, groups: int, size: tuple[int, int] = (32, 48), batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, 1 + model.temporal_ratio * groups, *size, generator=generator) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_give_what_the_whole_gives(model: VideoCodec, chunk: int) -> None:
    assert isinstance(model, VideoTokenizer)
    clip = video(model, 4, size=(32, 32))
    whole = model.encode(clip, chunk=5)
    assert whole.std() > 0.1
    torch.testing.assert_close(model.encode(clip, chunk=chunk), whole, rtol=0, atol=1e-5)
    frames = model.decode(whole, chunk=5)
    assert frames.std() > 0.05
    torch.testing.assert_close(model.decode(whole, chunk=chunk), frames, rtol=0, atol=1e-5)


@torch.no_grad()
def test_streams_give_what_the_whole_gives(model: VideoCodec) -> None:
    clip, r = video(model, 4), model.temporal_ratio
    whole = model.encode(clip)
    parts = list(model.stream_encode(clip.split([1 + r, r, 2 * r], dim=2)))
    assert [part.shape[2] for part in parts] == [2, 1, 2]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-5)
    given: list[int] = []

    def slowly() -> Iterator[torch.Tensor]:
        for part in whole.split([3, 2], dim=2):
            given.append(part.shape[2])
            yield part

    decoded = model.stream_decode(slowly())
    first = next(decoded)
    assert given == [3]  # frames come before the rest is there
    torch.testing.assert_close(torch.cat([first, *decoded], dim=2), model.decode(whole), rtol=0, atol=1e-5)


def test_a_stream_may_change_between_inference_mode_and_others(model: VideoCodec) -> None:
    clip, r = video(model, 4, size=(32, 32)), model.temporal_ratio
    state: State = {}
    made = []
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad, torch.inference_mode)
    for mode, part in zip(modes, clip.split([1, r, r, r, r], dim=2), strict=True):
        with mode():
            made.append(model.encode_step(part, state).detach())
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(made, dim=2), model.encode(clip), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_the_beginning_of_the_whole_and_looks_at_nothing_else(model: VideoCodec) -> None:
    clip, frames = video(model, 4), 1 + 2 * model.temporal_ratio
    whole = model.encode(clip)
    torch.testing.assert_close(model.encode_prefix(clip, frames), whole[:, :, :3], rtol=0, atol=1e-5)
    clip[:, :, frames:] = float("nan")
    torch.testing.assert_close(model.encode_prefix(clip, frames), whole[:, :, :3], rtol=0, atol=1e-5)
    with pytest.raises(WorldloomError, match="part of the video"):
        model.encode_prefix(clip, clip.shape[2] + model.temporal_ratio)
    with pytest.raises(WorldloomError, match="number of frames"):
        model.encode_prefix(clip, frames + 1)


@torch.no_grad()
def test_other_lengths_are_refused_or_padded_and_cut_again(model: VideoCodec) -> None:
    clip = video(model, 2)
    short = clip[:, :, : clip.shape[2] - 2]  # 4k+2 or so: two frames are missing from a group
    with pytest.raises(WorldloomError, match="pad=True"):
        model.encode(short)
    latents = model.encode(short, pad=True)
    filled = torch.cat([short, short[:, :, -1:], short[:, :, -1:]], dim=2)
    torch.testing.assert_close(latents, model.encode(filled), rtol=0, atol=1e-6)
    frames = model.decode(latents, frames=short.shape[2])
    assert frames.shape == short.shape
    assert torch.equal(frames, model.decode(latents)[:, :, : short.shape[2]])
    assert torch.equal(model.encode(clip, pad=True), model.encode(clip))
    for wrong in (0, clip.shape[2] + 1):
        with pytest.raises(WorldloomError, match="frames"):
            model.decode(latents, frames=wrong)


@torch.no_grad()
@pytest.mark.parametrize("name", LOCAL)
def test_tiles_give_what_the_whole_gives(name: str) -> None:
    """Tiles of several sizes, at the edges too, and in a stream that goes on."""
    model = MODELS[name]
    edge = model.spatial_ratio
    for size, tile in (((3, 19), (2, 5)), ((20, 2), (4, 8))):  # the last tile is a narrow one
        clip = video(model, 1, size=(size[0] * edge, size[1] * edge))
        whole = model.encode(clip)
        frames = model.decode(whole)
        tiling = Tiling((tile[0] * edge, tile[1] * edge))
        torch.testing.assert_close(model.encode(clip, tiling=tiling, chunk=1), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(whole, tiling=tiling, chunk=1), frames, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["loom continuous", "loom discrete"])
def test_the_stated_reach_is_the_true_one(name: str) -> None:
    """One latent vector moved: the frames change as far as the reach says, and no farther."""
    model = MODELS[name].double()
    edge = model.spatial_ratio
    latents = torch.zeros(1, 4, 1, 4, 40, dtype=torch.float64)
    moved = latents.clone()
    moved[..., 20] = 1
    changed = (model.decode(latents) - model.decode(moved)).abs().amax(dim=(0, 1, 2, 3)) > 0
    model.float()
    places = torch.nonzero(changed).flatten() // edge
    assert (20 - int(places.min()), int(places.max()) - 20) == (model.decode_reach, model.decode_reach)


@torch.no_grad()
def test_a_narrow_halo_is_approximate_and_better_than_none() -> None:
    model = MODELS["wan 2.1"]
    latents = model.encode(video(model, 1, size=(32, 96)))
    whole = model.decode(latents)
    errors = [
        float((model.decode(latents, tiling=Tiling((32, 48), halo)) - whole).abs().mean()) for halo in (0, 8, None)
    ]
    assert errors[0] > errors[1] > 1e-6 > errors[2]


@torch.no_grad()
def test_cosmos_tiles_differ_by_their_norms_within_the_stated_bound() -> None:
    """Its norms take the mean and spread of a tile for those of the frame: a tenth of the spread at most."""
    model = MODELS["cosmos cv 8x8x8"]
    clip = video(model, 1, size=(32, 320))
    whole = model.encode(clip)
    tiled = model.encode(clip, tiling=Tiling((32, 64)))
    error = (tiled - whole).abs().mean() / whole.std()
    assert 1e-6 < error < 0.1
    frames, again = model.decode(whole), model.decode(whole, tiling=Tiling((32, 64)))
    assert 1e-6 < (frames - again).abs().mean() / frames.std() < 0.1


def test_tiles_that_do_not_fit_are_refused() -> None:
    model = MODELS["wan 2.1"]
    for tiling in (Tiling((12, 16)), Tiling((0, 16)), Tiling((16, 16), halo=4), Tiling((16, 16), halo=-8)):
        with pytest.raises(WorldloomError, match="multiples of 8"):
            model.encode(video(model, 0), tiling=tiling)


def test_a_chunk_of_nothing_is_refused() -> None:
    model = MODELS["wan 2.1"]
    with pytest.raises(WorldloomError, match="chunk"):
        model.encode(video(model, 0), chunk=0)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda clip: clip[:, :, :, :-4], "multiples of"),
        (lambda clip: clip[:, :2], "video tensor"),
        (lambda clip: clip.clone().index_fill_(2, torch.tensor([1]), float("nan")), "not finite"),
        (lambda clip: clip[:, :, :0], "number of frames"),
    ],
)
def test_bad_videos_are_told(model: VideoCodec, spoil: Callable[[torch.Tensor], torch.Tensor], what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        model.encode(spoil(video(model, 1)))


@torch.no_grad()
def test_slices_of_a_stage_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run over a few frames at a time where frames are large."""
    for name in ("wan 2.1", "wan 2.2"):
        model = MODELS[name]
        clip = video(model, 4)
        whole = model.encode(clip, chunk=5)
        frames = model.decode(whole, chunk=5)
        raw, untouched = model.encode_raw(clip), model.decode_raw(whole)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_SLICE", 1)
            torch.testing.assert_close(model.encode_raw(clip), raw, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.decode_raw(whole), untouched, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.encode(clip, chunk=5), whole, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.decode(whole, chunk=5), frames, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("block", "places"), [(1, 1), (300, 700), (1 << 24, 1 << 20)])
def test_cosmos_remembers_each_latent_frame_once(monkeypatch: pytest.MonkeyPatch, block: int, places: int) -> None:
    """Attention over the whole past: however it is stored and cut, a stream gives what the whole gives."""
    model = MODELS["cosmos cv 8x8x8"]
    assert isinstance(model, cosmos.CosmosTokenizer)
    attention = model.encoder.middle.time
    clip, r = video(model, 6, size=(16, 24), batch=2), model.temporal_ratio
    whole = model.encode(clip, chunk=7)
    monkeypatch.setattr(past, "_BLOCK", block)
    monkeypatch.setattr(cosmos, "_PLACES", places)
    state: State = {}
    parts = [model.encode_step(part, state) for part in clip.split([1, 2 * r, r, 3 * r], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-5)
    held = {key[1:]: kept for key, kept in state.items() if isinstance(key, tuple) and key[0] is attention}
    frame = 2 * (2 * 3) * 32  # batch, places, channels
    high = [kept for key, kept in held.items() if key[1:] == ("high",)]
    assert all(kept[:, 0].numel() == frame for kept in high)
    assert sum(kept.shape[1] for kept in high[:-1]) < 7 <= sum(kept.shape[1] for kept in high)
    sizes = {kept.shape[:2]: 0 for kept in high}
    for key, kept in held.items():
        if len(key) == 2 and kept.ndim:
            sizes[kept.shape[:2]] += kept.nbytes
    assert all(size <= len(high) * frames * (3 * frame + 4 * batch) for (batch, frames), size in sizes.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.0, 1e-20, 3.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_attention_remembers_is_as_exact_as_float32(seed: int, scale: float, dtype: torch.dtype) -> None:
    frames = scale * torch.randn(2, 5, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    frames[:, 1] *= 1e-6  # each frame by its own scale
    frames = frames.to(dtype)
    state: State = {}
    remembered = past.Past(state, "layer")
    for part in frames.split([2, 3], dim=1):
        remembered.append(part)
    assert remembered.frames == 5
    read = torch.cat(remembered.read(slice(2, 5)), dim=1)
    assert read.dtype == dtype
    error = (read.double() - frames[:, :, 2:5].double()).abs().amax(dim=(2, 3))
    bound = 2.0**-23 if dtype == torch.float32 else 0.0
    assert (error <= bound * frames.double().abs().amax(dim=(2, 3))).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["loom discrete", "cosmos dv 8x16x16"])
def test_codes_number_the_latents(name: str) -> None:
    model = MODELS[name]
    if name == "loom discrete":  # statistics must not disturb the codes
        model = model_of(name)
        model.set_statistics(torch.full((4,), 0.3), torch.full((4,), 0.5))
    latents = model.encode(video(model, 3))
    indices = model.to_indices(latents)
    assert indices.shape == (1, model.codebooks, *latents.shape[2:])
    assert 0 <= indices.min() <= indices.max() < model.codebook_size
    assert len(indices.unique()) > 2
    torch.testing.assert_close(model.from_indices(indices), latents, rtol=0, atol=1e-6)
    with pytest.raises(WorldloomError, match="indices are"):
        model.from_indices(indices[:, :0])


def test_a_continuous_tokenizer_has_no_codes() -> None:
    model = MODELS["wan 2.1"]
    assert model.codebook_size == model.codebooks == 0
    with pytest.raises(WorldloomError, match="continuous"):
        model.to_indices(torch.zeros(1, 4, 1, 2, 2))


def test_the_fingerprint_tells_configurations_apart_that_share_weights() -> None:
    first = build(WAN21)
    second = build(replace(WAN21, temporal=(True, True, False)))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == first.fingerprint
