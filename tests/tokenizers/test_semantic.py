from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.protocols import Embeds, SemanticTokenizer
from worldloom_tokenizers.efficientnet import EfficientNetLite0
from worldloom_tokenizers.semantic import DinoV2, EfficientNetTokenizer, VJepa2, load_semantic

transformers = pytest.importorskip("transformers")

_MEAN, _STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def _saved(model: Any, folder: Path, processor: str | None = None) -> tuple[Any, Path]:
    model.save_pretrained(folder)
    if processor:
        (folder / processor).write_text(json.dumps({"image_mean": _MEAN, "image_std": _STD}))
    return model.eval(), folder


def _dino(folder: Path, registers: int = 0, processor: str | None = None) -> tuple[Any, Path]:
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"patch_size": 14, "image_size": 56}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return _saved(transformers.Dinov2WithRegistersModel(config), folder, processor)
    return _saved(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)), folder, processor)


def _vjepa(folder: Path, processor: str | None = None) -> tuple[Any, Path]:
    config = transformers.VJEPA2Config(
        hidden_size=36,
        num_attention_heads=3,
        num_hidden_layers=2,
        patch_size=16,
        crop_size=64,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    return _saved(transformers.VJEPA2Model(config), folder, processor)


def _video(frames: int, height: int, width: int, b: int = 2) -> Tensor:
    return torch.rand(b, 3, frames, height, width) * 2 - 1


def _pixels(video: Tensor, mean: Any, std: Any) -> Tensor:
    """As the model's own processor normalises pixels: (value in [0, 1] - mean) / std."""
    shape = (1, 3, 1, 1, 1)
    return (video * 0.5 + 0.5 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_what_transformers_gives(tmp_path: Path, registers: int) -> None:
    reference, folder = _dino(tmp_path / "dino", registers, "preprocessor_config.json")
    tokenizer = load_semantic(folder)
    assert isinstance(tokenizer, DinoV2)
    assert (tokenizer.temporal_ratio, tokenizer.spatial_ratio, tokenizer.channels) == (1, 14, 24)
    video = _video(3, 42, 70)
    features = tokenizer.encode(video)
    assert features.shape == (2, 24, 3, 3, 5)
    with torch.no_grad():
        for frame in range(3):
            tokens = reference(_pixels(video, _MEAN, _STD)[:, :, frame]).last_hidden_state[:, 1 + registers :]
            for row in range(3):
                for column in range(5):
                    expected = tokens[:, row * 5 + column]
                    assert torch.allclose(features[:, :, frame, row, column], expected, atol=1e-5)


def test_vjepa2_gives_what_transformers_gives(tmp_path: Path) -> None:
    reference, folder = _vjepa(tmp_path / "vjepa", "video_preprocessor_config.json")
    tokenizer = load_semantic(folder)
    assert isinstance(tokenizer, VJepa2)
    assert (tokenizer.temporal_ratio, tokenizer.spatial_ratio, tokenizer.channels) == (2, 16, 36)
    assert tokenizer.chunk == 4
    video = _video(6, 64, 64)
    features = tokenizer.encode(video)
    assert features.shape == (2, 36, 3, 4, 4)
    pixels = _pixels(video, _MEAN, _STD).transpose(1, 2)
    with torch.no_grad():
        clips = [reference.get_vision_features(pixels[:, start:end]) for start, end in ((0, 4), (4, 6))]
    tokens = torch.cat(clips, dim=1)  # (b, t*h*w, d)
    for step in range(3):
        for row in range(4):
            for column in range(4):
                expected = tokens[:, step * 16 + row * 4 + column]
                assert torch.allclose(features[:, :, step, row, column], expected, atol=1e-5)


def test_vjepa2_at_another_size(tmp_path: Path) -> None:
    """The positions of a token are those of a grid of the chosen size, as in a model configured for it."""
    reference, folder = _vjepa(tmp_path / "vjepa")
    config = reference.config.to_dict() | {"crop_size": 96}
    other = transformers.VJEPA2Model(transformers.VJEPA2Config(**config)).eval()
    other.load_state_dict(reference.state_dict())
    video = _video(4, 96, 96, b=1)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = other.get_vision_features(_pixels(video, *imagenet).transpose(1, 2))
    found = VJepa2.load(folder, size=96).encode(video)
    assert torch.allclose(found.flatten(2).transpose(1, 2), expected, atol=1e-5)


def test_efficientnet_offline() -> None:
    tokenizer = load_semantic("efficientnet-lite0")
    assert isinstance(tokenizer, EfficientNetTokenizer)
    video = _video(3, 64, 96)
    features = tokenizer.encode(video)
    assert features.shape == (2, 1280, 3, 2, 3)
    network = EfficientNetLite0.load()
    embedded = torch.stack([network.embed(video[:, :, frame]) for frame in range(3)])
    assert torch.allclose(tokenizer.embed(video), embedded.mean(0), atol=1e-5)


@pytest.fixture(params=["dinov2", "vjepa2", "efficientnet-lite0"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "dinov2":
        return load_semantic(_dino(tmp_path / "model")[1])
    if request.param == "vjepa2":
        return load_semantic(_vjepa(tmp_path / "model")[1])
    return load_semantic(request.param)


def test_the_protocol(tokenizer: Any) -> None:
    assert all(isinstance(tokenizer, protocol) for protocol in (SemanticTokenizer, Embeds))
    edge, ratio = tokenizer.spatial_ratio, tokenizer.temporal_ratio
    size = getattr(tokenizer, "size", 2 * edge)
    video = _video(2 * ratio, size, size)
    features = tokenizer.encode(video)
    assert features.shape == (2, tokenizer.channels, 2, size // edge, size // edge)
    assert torch.allclose(tokenizer.embed(video), features.flatten(2).mean(2), atol=1e-5)
    assert torch.allclose(tokenizer.encode(video[1:]), features[1:], atol=1e-5)

    # Frozen, whatever the model that holds it does; gradients reach the video alone.
    nn.ModuleList([tokenizer]).train()
    assert not any(module.training for module in tokenizer.modules())
    video.requires_grad_()
    tokenizer.embed(video).square().sum().backward()
    assert video.grad is not None
    assert video.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_mistakes_in_a_video(tokenizer: Any) -> None:
    edge, ratio = tokenizer.spatial_ratio, tokenizer.temporal_ratio
    size = getattr(tokenizer, "size", 2 * edge)

    def refused(video: Tensor, match: str) -> None:
        for method in (tokenizer.encode, tokenizer.embed):
            with pytest.raises(WorldloomError, match=match):
                method(video)

    refused(_video(ratio, size + 1, size), f"multiples of {edge}")
    refused(_video(ratio, size, 0), f"multiples of {edge}")
    refused(_video(0, size, size), f"number of frames must be a multiple of {ratio}")
    refused(_video(ratio, size, size)[0], r"a video tensor is \(b, 3, T, H, W\)")
    refused(_video(ratio, size, size)[:, :2], r"a video tensor is \(b, 3, T, H, W\)")
    refused(_video(ratio, size, size) / 0, "not finite")
    if ratio > 1:
        refused(_video(ratio + 1, size, size), f"number of frames must be a multiple of {ratio}")
    if hasattr(tokenizer, "size"):
        refused(_video(ratio, size + edge, size + edge), r"frames of 64 x 64[^$]*size=")


def test_chunks_of_frames_change_nothing_and_clips_are_independent(tmp_path: Path) -> None:
    _, folder = _dino(tmp_path / "dino")
    video = _video(5, 28, 28)
    whole = DinoV2.load(folder, chunk=5).encode(video)
    for chunk in (1, 2, 16):
        assert torch.allclose(DinoV2.load(folder, chunk=chunk).encode(video), whole, atol=1e-5)

    _, folder = _vjepa(tmp_path / "vjepa")
    clips = VJepa2.load(folder, chunk=2)
    video = _video(4, 64, 64)
    apart = torch.cat([clips.encode(video[:, :, :2]), clips.encode(video[:, :, 2:])], dim=2)
    assert torch.allclose(clips.encode(video), apart, atol=1e-5)
    assert not torch.allclose(VJepa2.load(folder, chunk=4).encode(video), apart, atol=1e-3)
    for chunk in (0, 3, -2):
        with pytest.raises(WorldloomError, match="chunk must be a multiple of 2 frames"):
            VJepa2.load(folder, chunk=chunk)


def test_the_fingerprint_tells_what_would_change_the_features(tmp_path: Path) -> None:
    _, folder = _dino(tmp_path / "dino")
    first = DinoV2.load(folder).fingerprint
    assert first == DinoV2.load(folder, chunk=3).fingerprint == load_semantic(folder).fingerprint
    assert len(first) == 64
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": _MEAN, "image_std": _STD}))
    other = DinoV2.load(folder).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert len({first, other, DinoV2.load(folder).fingerprint}) == 3
    _, folder = _vjepa(tmp_path / "vjepa")
    clips = [VJepa2.load(folder, chunk=4), VJepa2.load(folder, chunk=2), VJepa2.load(folder, size=32)]
    assert len({tokenizer.fingerprint for tokenizer in clips}) == 3


def test_mistakes_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no semantic tokenizer of that name"):
        load_semantic("loom-cv-nano")
    with pytest.raises(WorldloomError, match="cannot be loaded"):
        load_semantic(tmp_path)
    with pytest.raises(WorldloomError, match="cannot be loaded"):
        load_semantic("nobody/no-such-model")
    _, vjepa = _vjepa(tmp_path / "vjepa")
    with pytest.raises(WorldloomError, match=r"another kind of model[^$]*vjepa2[^$]*dinov2"):
        DinoV2.load(vjepa)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        WorldloomError, match=r"another kind of model[^$]*bert[^$]*dinov2, dinov2_with_registers, vjepa2"
    ):
        load_semantic(tmp_path / "bert")

    _, folder = _dino(tmp_path / "dino")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.norm1" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorldloomError, match=r"lacks weights[^$]*layer\.1\.norm1"):
        load_semantic(folder)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(WorldloomError, match="cannot be loaded"):
        load_semantic(folder)


def test_a_pickled_encoder_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from worldloom.cli import main

    reference, folder = _dino(tmp_path / "dino")
    expected = load_semantic(folder).fingerprint
    (folder / "model.safetensors").unlink()
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read") as caught:
        load_semantic(folder)
    done = CliRunner().invoke(main, shlex.split(caught.value.do)[1:])
    assert done.exit_code == 0, done.output
    assert load_semantic(folder).fingerprint == expected
