"""Published weights become tokenizer folders and go back; what does not fit is refused with what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.checkpoint import build, save
from worldloom_tokenizers.cosmos.config import CosmosConfig, ci, cv, dv
from worldloom_tokenizers.released import VARIANTS, export_released, import_released, load_released, variant_config
from worldloom_tokenizers.wan.config import WanVAEConfig, wan21

WAN = WanVAEConfig(encoder_width=8, decoder_width=8, latent_channels=4, mean=(0.1,) * 4, std=(2.0,) * 4)
CONFIGS = {
    "wan": WAN,
    "cosmos cv": replace(cv(8, 8), width=8, z_channels=6, latent_channels=6),
    "cosmos dv": replace(dv(4, 8), width=8, z_channels=6),
    "cosmos ci": replace(ci(16), width=8, groups=4, z_channels=6, latent_channels=6),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> CosmosConfig | WanVAEConfig:
    return CONFIGS[request.param]


def random_model(config: CosmosConfig | WanVAEConfig, seed: int = 0) -> torch.nn.Module:
    model = build(config)
    tiny_models.scatter(model, seed)
    return model.eval()


def test_every_variant_has_a_configuration_of_its_own_ratio() -> None:
    for variant in VARIANTS:
        found = variant_config(variant)
        if variant.startswith("cosmos"):
            ratio = variant.removeprefix("cosmos-")[2:].split("x")
            assert [found.temporal_ratio, found.spatial_ratio] == [
                int(ratio[0]) if len(ratio) == 3 else 1,
                int(ratio[-1]),
            ]
            assert bool(found.levels) == ("d" in variant.removeprefix("cosmos-")[:1])
    assert variant_config("wan2.1") == wan21()
    with pytest.raises(WorldloomError, match="no published tokenizer"):
        variant_config("cosmos-cv2x2x2")


@torch.no_grad()
def test_weights_go_out_in_each_layout_and_come_back(config: CosmosConfig | WanVAEConfig, tmp_path: Path) -> None:
    model = random_model(config)
    clip = torch.rand(1, 3, 1 + model.temporal_ratio, 32, 32) * 2 - 1
    layouts = ("native", "diffusers") if config in (CONFIGS["wan"], CONFIGS["cosmos cv"]) else ("native",)
    for layout in layouts:
        file = export_released(model, tmp_path / f"{layout}.safetensors", layout)
        again = load_released(file, config)
        assert again.fingerprint == model.fingerprint
        assert torch.equal(again.encode(clip), model.encode(clip))
    if layouts == ("native",):
        with pytest.raises(WorldloomError, match="no diffusers layout"):
            export_released(model, tmp_path / "no.safetensors", "diffusers")
        assert not (tmp_path / "no.safetensors").exists()


@torch.no_grad()
def test_a_folder_is_made_once_and_used_by_name_of_its_path(
    config: CosmosConfig | WanVAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldloom_tokenizers import released

    model = random_model(config)
    (tmp_path / "published").mkdir()
    export_released(model, tmp_path / "published" / "diffusion_pytorch_model.safetensors", "native")
    monkeypatch.setattr(released, "variant_config", lambda variant: config)
    import_released(tmp_path / "published", "tiny", tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.fingerprint == model.fingerprint
    assert type(again) is type(model)
    assert "licence" in (tmp_path / "ours" / "README.md").read_text()
    with pytest.raises(WorldloomError, match="already exists"):
        import_released(tmp_path / "published", "tiny", tmp_path / "ours")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return export_released(random_model(WAN), tmp_path / "wan.safetensors", "native")


def test_weights_of_another_variant_are_refused(published: Path) -> None:
    for other in (replace(WAN, encoder_width=16), replace(WAN, blocks=1), replace(WAN, temporal=(True, True, True))):
        with pytest.raises(WorldloomError, match="another variant") as caught:
            load_released(published, other)
        assert "name the variant" in str(caught.value)
    with pytest.raises(WorldloomError, match="none of the layouts"):
        load_released(published, CONFIGS["cosmos cv"])


def test_missing_and_unknown_keys_are_named(published: Path) -> None:
    weights = load_file(published)
    weights["decoder.head.2.wait"] = weights.pop("decoder.head.2.weight")
    save_file(weights, published)
    with pytest.raises(WorldloomError) as caught:
        load_released(published, WAN)
    assert "missing ['decoder.head.2.weight']" in str(caught.value)
    assert "unmatched ['decoder.head.2.wait']" in str(caught.value)


def test_weights_that_are_not_finite_are_refused(published: Path) -> None:
    weights = load_file(published)
    weights["conv2.bias"][1] = float("nan")
    save_file(weights, published)
    with pytest.raises(WorldloomError, match="not finite"):
        load_released(published, WAN)


def test_a_truncated_file_is_refused(published: Path) -> None:
    data = published.read_bytes()
    for length in (0, 7, 200, len(data) - 1):
        published.write_bytes(data[:length])
        with pytest.raises(WorldloomError, match="cannot be read"):
            load_released(published, WAN)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save({}, file)
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read") as caught:
        load_released(file, "wan2.1")
    assert f"worldloom models convert {file} --out {tmp_path / 'Wan2.1_VAE.safetensors'}" in str(caught.value)


def test_a_tokenizer_of_ours_has_no_published_layout(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="not of a published family"):
        export_released(tiny_models.tokenizer(), tmp_path / "x.safetensors", "native")


def test_the_commands(tmp_path: Path, published: Path) -> None:
    save(random_model(WAN, 3), tmp_path / "ours", "# card\n", dtype=torch.float32)
    run = CliRunner().invoke
    out = tmp_path / "out.safetensors"
    done = run(main, ["tokenize", "export", str(tmp_path / "ours"), "--layout", "diffusers", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert load_released(out, WAN).fingerprint == load_tokenizer(tmp_path / "ours").fingerprint
    refused = run(main, ["tokenize", "import", str(published), "--variant", "wan2.1", "--out", str(tmp_path / "no")])
    assert refused.exit_code != 0
    assert not (tmp_path / "no").exists()
    unknown = run(main, ["tokenize", "import", str(published), "--variant", "wan", "--out", str(tmp_path / "no")])
    assert "wan2.2" in unknown.output
