"""Our Wan autoencoders against diffusers' AutoencoderKLWan: same random weights, float64, both directions of
loading."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import scatter

from worldloom_tokenizers.layouts import from_released, recognise, to_released
from worldloom_tokenizers.wan import checkpoint
from worldloom_tokenizers.wan.config import WanVAEConfig, wan21, wan22
from worldloom_tokenizers.wan.model import WanVAE

diffusers = pytest.importorskip("diffusers", reason="diffusers needs Python 3.11")

CONFIGS = {
    "2.1": WanVAEConfig(encoder_width=8, decoder_width=8, latent_channels=4, mean=(0,) * 4, std=(1,) * 4),
    "2.2": WanVAEConfig(
        encoder_width=8, decoder_width=16, latent_channels=4, mean=(0,) * 4, std=(1,) * 4, patch=2, residual=True
    ),
}


def peer(config: WanVAEConfig) -> torch.nn.Module:
    options = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    model = diffusers.AutoencoderKLWan(
        base_dim=config.encoder_width, decoder_base_dim=config.decoder_width, z_dim=config.latent_channels,
        is_residual=config.residual, latents_mean=list(config.mean), latents_std=list(config.std),
        **(options if config.patch == 2 else {}),
    )  # fmt: skip
    scatter(model, 0)
    return model.double().eval()


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers enlarges in float32 whatever the model's precision; here it keeps it."""
    from diffusers.models.autoencoders import autoencoder_kl_wan

    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", torch.nn.Upsample.forward)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> WanVAEConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_latents_and_frames_are_those_of_diffusers(config: WanVAEConfig, frames: int) -> None:
    theirs, ours = peer(config), WanVAE(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(2, 3, frames, 32, 48, dtype=torch.float64) * 2 - 1
    for context in (torch.no_grad(), torch.enable_grad()):  # two ways to compute the same
        with context:
            latents = theirs.encode(video).latent_dist.mode()
            assert latents.std() > 0.05
            torch.testing.assert_close(ours.encode(video), latents, rtol=0, atol=1e-13)
            expected = theirs.decode(latents).sample
            assert expected.std() > 0.05
            torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_diffusers(config: WanVAEConfig) -> None:
    theirs, ours = peer(config), WanVAE(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(1, 3, 5, 16 * config.patch, 16 * config.patch, dtype=torch.float64) * 2 - 1
    theirs.encode(video).latent_dist.mode().square().sum().backward()
    ours.encode_raw(video).square().sum().backward()
    expected = dict(theirs.named_parameters())["encoder.conv_in.weight"].grad
    assert expected is not None
    torch.testing.assert_close(ours.encoder.conv_in.weight.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_a_state_dict_that_goes_out_and_comes_back_is_bit_equal(config: WanVAEConfig, layout) -> None:
    names = checkpoint.names(config)
    first, second = WanVAE(config), WanVAE(config)
    scatter(first, 1)
    out = to_released(first, names, layout)
    assert len(out) == len(first.state_dict()) - 2  # the statistics are configuration
    assert recognise(out, dict.fromkeys(checkpoint.LAYOUTS, names)) == layout
    from_released(second, names, out, layout)
    for key, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor), key


def test_the_diffusers_layout_has_diffusers_keys_and_shapes(config: WanVAEConfig) -> None:
    expected = {key: tensor.shape for key, tensor in peer(config).state_dict().items()}
    ours = to_released(WanVAE(config), checkpoint.names(config), "diffusers")
    assert {key: tensor.shape for key, tensor in ours.items()} == expected


def test_diffusers_loads_what_we_write(config: WanVAEConfig) -> None:
    ours, theirs = WanVAE(config).double().eval(), peer(config)
    scatter(ours, 2)
    theirs.load_state_dict(to_released(ours, checkpoint.names(config), "diffusers"), strict=True)
    video = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(video).latent_dist.mode(), ours.encode(video), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("preset", "tensors", "parameters"), [(wan21, 194, 126_892_531), (wan22, 196, 704_688_668)])
def test_the_published_sizes_come_out(preset, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = WanVAE(preset())
    assert len(model.state_dict()) - 2 == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.temporal_ratio, model.spatial_ratio) == (4, 8 if preset is wan21 else 16)


def test_the_native_layout_has_the_published_names() -> None:
    """Names as Wan's own code has them, at each kind of place."""
    for config, keys in (
        (wan21(), ("conv1.weight", "encoder.downsamples.2.resample.1.weight", "encoder.downsamples.5.time_conv.bias",
                   "encoder.middle.1.to_qkv.weight", "decoder.upsamples.3.time_conv.weight", "decoder.head.0.gamma",
                   "decoder.upsamples.4.shortcut.weight", "decoder.upsamples.14.residual.6.bias")),
        (wan22(), ("encoder.downsamples.1.downsamples.2.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.bias",
                   "decoder.upsamples.3.upsamples.0.shortcut.weight", "encoder.head.2.weight", "conv2.bias")),
    ):  # fmt: skip
        with torch.device("meta"):
            released = to_released(WanVAE(config), checkpoint.names(config), "native")
        assert not set(keys) - released.keys()


def test_statistics_are_those_of_diffusers_for_the_published_model() -> None:
    parameters = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert tuple(defaults["latents_mean"]) == wan21().mean
    assert tuple(defaults["latents_std"]) == wan21().std
