"""Preview decoders: causal, streamed equals whole, of one tokenizer, and much faster than its decoder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom import config as configs
from worldloom import registry
from worldloom.errors import WorldloomError
from worldloom.weights import write_weights
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.config import PreviewConfig
from worldloom_tokenizers.preview import PreviewCheckpoint, PreviewDecoder, Teacher, load_preview

CONFIGS = {
    "4x8x8": PreviewConfig(latent_channels=4, widths=(8, 8), blocks=(1, 1)),
    "1x4x4, no time": PreviewConfig(latent_channels=3, temporal_ratio=1, spatial_ratio=4, widths=(8, 8), blocks=(0, 0)),
    "2x6x6, kernel 4": PreviewConfig(
        temporal_ratio=2, spatial_ratio=6, widths=(8, 8), blocks=(1, 2), temporal_kernel=4
    ),
}
TEACHER = Teacher("some-tokenizer", "f" * 64)


def decoder(config: PreviewConfig = CONFIGS["4x8x8"], seed: int = 0) -> PreviewDecoder:
    torch.manual_seed(seed)
    model = PreviewDecoder(config, TEACHER)
    tiny_models.stir(model, seed)
    return model.eval()


MODELS = {name: decoder(config) for name, config in CONFIGS.items()}


def latents(model: PreviewDecoder, t: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(2, model.config.latent_channels, t, 2, 3, generator=generator)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreviewDecoder:
    return MODELS[request.param]


@torch.no_grad()
def test_shapes_are_those_of_the_tokenizer(model: PreviewDecoder) -> None:
    ratio, edge = model.config.temporal_ratio, model.config.spatial_ratio
    for t in (1, 2, 11):
        video = model.decode(20 * latents(model, t))
        assert video.shape == (2, 3, 1 + ratio * (t - 1), 2 * edge, 3 * edge)
        assert video.abs().max() == 1
    tokenizer = tiny_models.tokenizer()
    clip = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    assert MODELS["4x8x8"].decode(tokenizer.encode(clip)).shape == clip.shape


@torch.no_grad()
def test_no_frame_depends_on_a_later_latent_and_later_ones_see_it(model: PreviewDecoder) -> None:
    z = latents(model, 4)
    frames = model.decode(z)
    for t in range(1, 4):
        changed = z.clone()
        changed[:, :, t] += 1
        other, first = model.decode(changed), 1 + model.config.temporal_ratio * (t - 1)
        assert torch.equal(other[:, :, :first], frames[:, :, :first])
        assert not torch.allclose(other[:, :, first], frames[:, :, first], atol=1e-3)
    if model.config.blocks != (0, 0):
        earlier = z.clone()
        earlier[:, :, 1] += 1
        assert not torch.allclose(model.decode(earlier)[:, :, -1], frames[:, :, -1], atol=1e-4)


@settings(max_examples=25)
@given(name=st.sampled_from(list(CONFIGS)), pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@torch.no_grad()
def test_streamed_equals_whole(name: str, pieces: list[int]) -> None:
    model = MODELS[name]
    z = latents(model, sum(pieces))
    state: dict = {}
    streamed = torch.cat([model.decode_step(part, state) for part in z.split(pieces, dim=2)], dim=2)
    torch.testing.assert_close(streamed, model.decode(z), rtol=0, atol=1e-5)
    torch.testing.assert_close(streamed, model(z).clamp(-1, 1), rtol=0, atol=1e-5)


def test_latents_of_another_shape_are_refused() -> None:
    for shape in ((1, 5, 2, 2, 2), (1, 4, 0, 2, 2), (4, 2, 2, 2)):
        with pytest.raises(WorldloomError, match="latents are"):
            MODELS["4x8x8"].decode_step(torch.zeros(shape), {})


def test_latents_of_another_tokenizer_are_refused() -> None:
    MODELS["4x8x8"].check("f" * 64)
    with pytest.raises(WorldloomError, match="another tokenizer") as caught:
        MODELS["4x8x8"].check("e" * 64)
    assert "some-tokenizer" in str(caught.value)


@torch.no_grad()
def test_the_first_map_is_the_least_squares_one(model: PreviewDecoder) -> None:
    """Frames that are a linear function of the latents are found exactly."""
    truth = decoder(model.config, seed=3)
    torch.nn.init.zeros_(truth.leave.weight)
    torch.nn.init.zeros_(truth.leave.bias)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, model.config.latent_channels, 3, 4, 4, generator=generator)
    z[:, 1] = 0.5  # a channel that says nothing
    student = PreviewDecoder(model.config, TEACHER)
    assert not torch.allclose(student(z), truth(z), atol=0.1)
    # The group of the first frame is that frame repeated: its targets are consistent if the frames of a group are.
    ratio = model.config.temporal_ratio
    for parameter in truth.linear.parameters():
        groups = parameter.unflatten(0, (3, ratio, -1))
        parameter.copy_(groups[:, -1:].expand_as(groups).flatten(0, 2))
    student.initialise(z, truth(z))
    torch.testing.assert_close(student(z), truth(z), rtol=0, atol=1e-4)


def test_it_is_several_times_faster_than_the_decoder_of_its_tokenizer() -> None:
    tokenizer = load_tokenizer("loom-cv-nano")
    model = decoder(PreviewConfig())
    z = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert _seconds(lambda: tokenizer.decode(z)) > 3 * _seconds(lambda: model.decode(z))


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of several runs: what else the machine does only ever adds to one."""
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = MODELS["4x8x8"]
    write_weights(model.state_dict(), tmp_path)
    configs.save(PreviewCheckpoint(tokenizer=model.tokenizer, model=model.config), tmp_path / "config.toml")
    return tmp_path


def test_a_saved_decoder_comes_back(saved: Path) -> None:
    model, again = MODELS["4x8x8"], load_preview(saved)
    assert again.tokenizer == TEACHER
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    assert not again.training
    z = latents(model, 3)
    with torch.no_grad():
        assert torch.equal(again.decode(z), model.decode(z))
        again.enter.weight[0, 0, 0, 0] += 1e-3
    assert again.fingerprint != model.fingerprint


def test_what_is_no_preview_decoder_is_refused(saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer_folder(tmp_path / "tokenizer")
    with pytest.raises(WorldloomError, match="no preview decoder here"):
        load_preview(tokenizer)
    with pytest.raises(WorldloomError, match="causal-vae"):
        load_tokenizer(saved)
    with pytest.raises(WorldloomError, match="no checkpoint here"):
        load_preview("no/such/folder")
    with pytest.raises(WorldloomError, match="loom-cv-nano"):
        load_preview("loom-cv-nan")


@pytest.mark.parametrize("name", registry.names("tokenizers"))
def test_a_name_gives_the_decoder_that_ships_for_it(name: str) -> None:
    meta = registry.entry("tokenizers", name).meta
    if "preview" not in meta:
        with pytest.raises(WorldloomError, match="finetune preview-decoder"):
            load_preview(name)
        return
    model = load_preview(name)
    model.check(load_tokenizer(name).fingerprint)
    assert meta["preview_sha256"]


def test_a_catalog_line_names_its_preview(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = registry.entry("tokenizers", "loom-cv-nano")
    changed = dataclasses.replace(line, meta={**line.meta, "preview": str(saved), "preview_sha256": ""})
    monkeypatch.setattr(registry, "entry", lambda group, name: changed)
    assert load_preview("loom-cv-nano").fingerprint == MODELS["4x8x8"].fingerprint
    wrong = dataclasses.replace(changed, meta={**changed.meta, "preview_sha256": "0" * 64})
    monkeypatch.setattr(registry, "entry", lambda group, name: wrong)
    with pytest.raises(WorldloomError, match="not those the catalog names"):
        load_preview("loom-cv-nano")


@pytest.mark.parametrize(
    "options", [{"spatial_ratio": 7}, {"widths": (8, 0)}, {"temporal_kernel": 1}, {"latent_channels": 0}]
)
def test_a_configuration_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(WorldloomError):
        PreviewConfig(**options)
