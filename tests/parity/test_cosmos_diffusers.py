"""Cosmos-Tokenizer against diffusers' AutoencoderKLCosmos: same random weights, float64, both directions of loading.

diffusers has the continuous video tokenizers. The discrete ones have the same networks with one resolution more in the
4x decoder, and a quantiser that tests/tokenizers/test_fsq.py compares.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import scatter

from worldloom_tokenizers.cosmos import checkpoint
from worldloom_tokenizers.cosmos.config import CosmosConfig, ci, cv, di, dv
from worldloom_tokenizers.cosmos.model import CosmosTokenizer
from worldloom_tokenizers.layouts import from_released, recognise, to_released

diffusers = pytest.importorskip("diffusers", reason="diffusers needs Python 3.11")


def small(config: CosmosConfig) -> CosmosConfig:
    if config.image:
        return replace(config, width=8, groups=4, z_channels=12)
    return replace(config, width=8, z_channels=6, latent_channels=6)


CONFIGS = {f"{t}x{s}x{s}": small(cv(t, s)) for t, s in ((4, 8), (8, 8), (8, 16))}
ALL = {
    **{f"{make.__name__} {t}x{s}x{s}": small(make(t, s)) for make in (cv, dv) for t, s in ((4, 8), (8, 8), (8, 16))},
    **{f"{make.__name__} {s}x{s}": small(make(s)) for make in (ci, di) for s in (8, 16)},
}


def peer(config: CosmosConfig, exact: bool) -> torch.nn.Module:
    """diffusers keeps the wavelet's 1/sqrt(2) in float32; ``exact`` gives it in float64."""
    decoder = config.decoder_multipliers
    model = diffusers.AutoencoderKLCosmos(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=tuple(config.width * m for m in (1, *config.multipliers)),
        decode_block_out_channels=tuple(config.width * m for m in (*decoder, decoder[-1])),
        spatial_compression_ratio=config.spatial_ratio,
        temporal_compression_ratio=config.temporal_ratio,
    )
    scatter(model, 0)
    model = model.double().eval()
    if exact:
        for module in model.modules():
            if hasattr(module, "wavelets"):
                module.wavelets = torch.full((2,), 0.5, dtype=torch.float64).sqrt()
    return model


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> CosmosConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_latents_and_frames_are_those_of_diffusers(config: CosmosConfig, groups: int) -> None:
    theirs, ours = peer(config, exact=True), CosmosTokenizer(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(2, 3, 1 + config.temporal_ratio * groups, 32, 48, dtype=torch.float64) * 2 - 1
    for context in (torch.no_grad(), torch.enable_grad()):  # two ways to compute the same
        with context:
            latents = theirs.encode(video).latent_dist.mode()
            assert latents.std() > 0.05
            torch.testing.assert_close(ours.encode(video), latents, rtol=0, atol=1e-12)
            expected = theirs.decode(latents).sample
            assert expected.std() > 0.05
            torch.testing.assert_close(ours.decode_raw(latents), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("groups", [0, 1])
def test_kernels_that_are_kept_between_calls_give_the_same(groups: int) -> None:
    """Wide enough that 3x3 kernels are transformed and kept, and that one frame goes through kernels joined in time."""
    config = CosmosConfig(width=64, multipliers=(1, 1, 1), decoder_multipliers=(1, 1, 1))
    theirs, ours = peer(config, exact=True), CosmosTokenizer(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(1, 3, 1 + config.temporal_ratio * groups, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(video).latent_dist.mode()
        expected = theirs.decode(latents).sample
        for _ in range(2):
            torch.testing.assert_close(ours.encode(video), latents, rtol=0, atol=1e-11)
            torch.testing.assert_close(ours.decode_raw(latents), expected, rtol=0, atol=1e-10)
    conv = ours.encoder.stages[0].blocks[0].conv1
    assert (conv.joined if groups == 0 else conv.space.frames)._held is not None


def test_with_their_rounded_wavelet_the_difference_is_that_rounding(config: CosmosConfig) -> None:
    theirs, ours = peer(config, exact=False), CosmosTokenizer(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(1, 3, 1 + config.temporal_ratio, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(video).latent_dist.mode()
        torch.testing.assert_close(ours.encode(video), latents, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.decode_raw(latents), theirs.decode(latents).sample, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_diffusers(config: CosmosConfig) -> None:
    theirs, ours = peer(config, exact=True), CosmosTokenizer(config).double().eval()
    from_released(ours, checkpoint.names(config), theirs.state_dict(), "diffusers")
    video = torch.rand(1, 3, 1 + config.temporal_ratio, 32, 32, dtype=torch.float64) * 2 - 1
    theirs.encode(video).latent_dist.mode().square().sum().backward()
    ours.encode_raw(video).square().sum().backward()
    expected = dict(theirs.named_parameters())["encoder.conv_in.conv_s.weight"].grad
    assert expected is not None
    torch.testing.assert_close(ours.encoder.conv_in.space.weight.grad, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_a_state_dict_that_goes_out_and_comes_back_is_bit_equal(name: str) -> None:
    config = ALL[name]
    names = checkpoint.names(config)
    first, second = checkpoint.build(config), checkpoint.build(config)
    scatter(first, 1)
    layouts = checkpoint.LAYOUTS if name.startswith("cv") else ("native",)
    for layout in layouts:
        out = to_released(first, names, layout)
        assert recognise(out, dict.fromkeys(layouts, names)) == layout
        from_released(second, names, out, layout)
        for key, tensor in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], tensor), key


def test_the_diffusers_layout_has_diffusers_keys_and_shapes(config: CosmosConfig) -> None:
    expected = {key: tensor.shape for key, tensor in peer(config, exact=True).state_dict().items()}
    ours = to_released(CosmosTokenizer(config), checkpoint.names(config), "diffusers")
    assert {key: tensor.shape for key, tensor in ours.items()} == expected


def test_diffusers_loads_what_we_write(config: CosmosConfig) -> None:
    ours, theirs = CosmosTokenizer(config).double().eval(), peer(config, exact=True)
    scatter(ours, 2)
    theirs.load_state_dict(to_released(ours, checkpoint.names(config), "diffusers"), strict=True)
    video = torch.rand(1, 3, 1 + config.temporal_ratio, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(video).latent_dist.mode(), ours.encode(video), rtol=0, atol=1e-12)


def test_unused_weights_of_the_native_networks_are_known_exactly() -> None:
    """Twelve tensors in CV8x8x8: the ways that neither halve nor double."""
    found = checkpoint.unused(cv(8, 8))
    assert len(found) == 12
    assert found["encoder.down.1.downsample.conv2.conv3d.weight"] == (512, 512, 3, 1, 1)
    assert found["decoder.up.2.upsample.conv2.conv3d.weight"] == (512, 512, 1, 3, 3)
    assert {key.split(".conv")[0] for key in found} == {"encoder.down.1.downsample", "decoder.up.2.upsample"}
    assert len(checkpoint.unused(cv(8, 16))) == 4
    assert not checkpoint.unused(ci(8))


def test_the_native_layout_has_the_published_names() -> None:
    keys = {
        "cv": ("encoder.conv_in.0.conv3d.weight", "encoder.down.0.block.0.nin_shortcut.conv3d.weight",
               "encoder.down.0.downsample.conv2.conv3d.bias", "encoder.mid.attn_1.1.proj_out.conv3d.weight",
               "decoder.up.1.upsample.conv1.conv3d.weight", "decoder.up.0.block.2.conv2.1.conv3d.bias",
               "decoder.norm_out.norm.weight", "post_quant_conv.conv3d.weight"),
        "ci": ("encoder.conv_in.weight", "encoder.down.0.downsample.conv.weight", "encoder.mid.attn_1.q.weight",
               "decoder.up.2.upsample.conv.bias", "decoder.up.1.block.0.norm1.weight", "quant_conv.bias"),
    }  # fmt: skip
    for name, config in (("cv", cv(8, 8)), ("ci", ci(8))):
        with torch.device("meta"):
            released = to_released(checkpoint.build(config), checkpoint.names(config), "native")
        assert not set(keys[name]) - released.keys()


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("cv")])
def test_discrete_and_image_tokenizers_keep_the_contract(name: str) -> None:
    config = ALL[name]
    model = checkpoint.build(config).eval()
    scatter(model, 3)
    video = torch.rand(1, 3, 1 + 2 * config.temporal_ratio, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(video)
        assert latents.shape == (1, config.latent_channels, 3, 32 // config.spatial_ratio, 32 // config.spatial_ratio)
        assert model.decode(latents).shape == video.shape
        for chunk in (1, 2):
            torch.testing.assert_close(model.encode(video, chunk=chunk), latents, rtol=0, atol=1e-5)
        if config.levels:
            indices = model.to_indices(latents)
            assert 0 <= indices.min() <= indices.max() < 64_000
            torch.testing.assert_close(model.from_indices(indices), latents, rtol=0, atol=1e-6)
