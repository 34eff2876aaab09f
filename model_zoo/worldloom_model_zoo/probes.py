"""A small convolutional network that reads something off one or more frames: an action, or where an object is.

Probes are fitted to real frames and then look at generated ones, so they are the same for every model that is measured.
They are fitted in a minute or two on a CPU, and equal seeds give equal probes on the same machine.

Letters: n examples, k frames of an example, H W pixels, m outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.errors import WorldloomError

_SIDE = 64  # pixels of the longer side that a probe looks at
_GRID = 4
_SCALES = (2, 4)
_SHIFT = 2.0  # pixels of its scale that a motion has at most
_STILL = 1e-4  # squared contrast at which motion begins to be believed


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is fitted."""

    steps: int = 600
    """Gradient steps."""
    batch_size: int = 64
    """Examples of a step."""
    lr: float = 2e-3
    """Peak learning rate; it falls to zero along a cosine."""
    width: int = 24
    """Channels of the first layer; the last has four times as many."""
    seed: int = 0
    """Of the weights and of the order of the examples."""


class Probe(nn.Module):
    """Frames ``(n, k, 3, H, W)`` in [-1, 1] to ``(n, m)``: four strided convolutions, then two linear layers.

    Where there are several frames, the motion between them (`optical_flow`) joins half-way, so that it need not be
    learnt from a few thousand examples.
    """

    def __init__(self, frames: int, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.pairs = [(i - 1, i) for i in range(1, frames)] + ([(0, frames - 1)] if frames > 2 else [])
        motion = 3 * len(_SCALES) * len(self.pairs)
        self.look = nn.Sequential(*_strided(3 * frames, width), *_strided(width, 2 * width))
        self.join = nn.Sequential(*_strided(2 * width + motion, 3 * width), *_strided(3 * width, 4 * width))
        self.head = nn.Sequential(nn.Linear(4 * width * _GRID**2, 128), nn.SiLU(), nn.Linear(128, outputs))

    def forward(self, frames: Tensor) -> Tensor:
        n, k = frames.shape[:2]
        x = frames.flatten(0, 1)
        longer = max(x.shape[-2:])
        if longer > _SIDE:
            x = F.interpolate(x, size=[max(1, round(side * _SIDE / longer)) for side in x.shape[-2:]], mode="area")
        seen = self.look(x.unflatten(0, (n, k)).flatten(1, 2))
        grey = x.mean(1).unflatten(0, (n, k))  # (n, k, H, W)
        with torch.no_grad():
            size = seen.shape[-2:]
            moved = [F.adaptive_avg_pool2d(optical_flow(grey[:, i], grey[:, j]), size) for i, j in self.pairs]
        joined = self.join(torch.cat([seen, *moved], dim=1))
        return self.head(F.adaptive_avg_pool2d(joined, _GRID).flatten(1))


def _strided(inputs: int, outputs: int) -> list[nn.Module]:
    """A convolution that halves height and width."""
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]


def optical_flow(a: Tensor, b: Tensor) -> Tensor:
    """Motion from one grey image to another, ``(n, H, W)`` in [-1, 1] -> ``(n, 3 scales, ceil(H/2), ceil(W/2))``.

    Least squares of the brightness constancy ``Ix u + Iy v + It = 0`` in windows of 5x5 (Lucas and Kanade 1981), at
    half and a quarter of the size: u to the right and v down in pixels of the full size, at most `_SHIFT` pixels of
    the scale, and the share of a window's change that the fit leaves unexplained.
    """
    parts = []
    for scale in _SCALES:
        x, y = (F.avg_pool2d(image[:, None], scale, ceil_mode=True) for image in (a, b))
        mean = F.pad((x + y) / 2, (1, 1, 1, 1), mode="replicate")
        dx = (mean[..., 1:-1, 2:] - mean[..., 1:-1, :-2]) / 2
        dy = (mean[..., 2:, 1:-1] - mean[..., :-2, 1:-1]) / 2
        dt = y - x
        products = torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt, dt * dt], dim=1)
        xx, xy, yy, xt, yt, tt = _window(products).unbind(1)
        xx, yy = xx + _STILL, yy + _STILL
        det = xx * yy - xy * xy
        u = ((xy * yt - yy * xt) / det).clamp(-_SHIFT, _SHIFT)
        v = ((xy * xt - xx * yt) / det).clamp(-_SHIFT, _SHIFT)
        left = (tt + u * xt + v * yt).clamp_min(0) / (tt + _STILL)
        flow = torch.stack([scale * u, scale * v, left], dim=1)
        parts.append(flow if not parts else F.interpolate(flow, size=parts[0].shape[-2:], mode="nearest"))
    return torch.cat(parts, dim=1)


def _window(x: Tensor) -> Tensor:
    """Means over 5x5 cells, ``(n, c, h, w)``: along rows, then along columns."""
    return F.avg_pool2d(F.avg_pool2d(x, (1, 5), stride=1, padding=(0, 2)), (5, 1), stride=1, padding=(2, 0))


class Reader:
    """A fitted probe."""

    def __init__(self, probe: Probe, mean: Tensor, std: Tensor, classes: bool) -> None:
        self.probe, self.mean, self.std, self.classes = probe.eval(), mean, std, classes

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, index: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Read examples, frames ``index (n, k)`` of ``frames`` uint8 ``(N, H, W, 3)``.

        Returns:
            The class of each, int64 ``(n,)``, or the numbers read, float64 ``(n, m)``.
        """
        device = self.mean.device
        parts = [
            self.probe(_take(frames, rows, device)) for rows in np.array_split(index, -(-len(index) // batch_size))
        ]
        made = torch.cat(parts)
        if self.classes:
            return made.argmax(1).cpu().numpy()
        return (made * self.std + self.mean).double().cpu().numpy()


def fit_probe(
    frames: np.ndarray,
    index: np.ndarray,
    targets: np.ndarray,
    config: ProbeConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reader:
    """Fit a probe to examples, frames ``index (n, k)`` of ``frames`` uint8 ``(N, H, W, 3)``.

    Args:
        targets: integer ``(n,)`` for classes (cross-entropy), or floats ``(n, m)`` (squared error of each output in
            units of its standard deviation).

    Raises:
        WorldloomError: no examples, or as many targets as there are not.
    """
    config = config or ProbeConfig()
    if not len(index) or len(index) != len(targets):
        raise WorldloomError("a probe needs examples, each with its target", got=(len(index), len(targets)))
    classes = np.issubdtype(targets.dtype, np.integer)
    wanted = torch.from_numpy(targets if classes else targets.astype(np.float32)).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probe = Probe(index.shape[1], int(targets.max()) + 1 if classes else targets.shape[1], config.width).to(device)
    mean = torch.zeros(1, device=device) if classes else wanted.mean(0)
    std = torch.ones(1, device=device) if classes else wanted.std(0, unbiased=False).clamp_min(1e-6)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    random = np.random.default_rng(config.seed)
    order = np.zeros(0, int)
    for step in range(config.steps):
        while len(order) < config.batch_size:
            order = np.concatenate([order, random.permutation(len(index))])
        rows, order = order[: config.batch_size], order[config.batch_size :]
        made = probe(_take(frames, index[rows], device))
        goal = wanted[torch.from_numpy(rows).to(device)]
        loss = F.cross_entropy(made, goal) if classes else F.mse_loss(made, (goal - mean) / std)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, config.steps)
    return Reader(probe, mean, std, classes)


def _take(frames: np.ndarray, index: np.ndarray, device: str | torch.device) -> Tensor:
    """uint8 frames ``(N, H, W, 3)`` at ``(n, k)`` -> ``(n, k, 3, H, W)`` in [-1, 1]."""
    taken = torch.from_numpy(frames[index]).to(device)
    return taken.permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)
