from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_tokenizers.efficientnet import EfficientNetLite0
from worldloom_tokenizers.perceptual import PerceptualLoss


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss()


def _video(frames: int = 2, size: int = 64) -> Tensor:
    """A disc, a grating and a gradient that move: ``(1, 3, T, H, W)`` in [-1, 1], with edges, texture and colour."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    made = []
    for frame in range(frames):
        disc = torch.sigmoid(((x - 0.1 * frame) ** 2 + y**2 - 0.2) * -60)
        grating = torch.sin(25 * (x + 0.5 * y) + frame)
        made.append(torch.stack([disc * 2 - 1, grating * (1 - disc), x * (1 - disc)]))
    return torch.stack(made, dim=1)[None]


def _blurred(video: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-8, 9.0)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    frames = F.pad(video[0].transpose(0, 1), (8, 8, 8, 8), mode="replicate")  # (T, 3, H+16, W+16)
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        frames = F.conv2d(frames, kernel.view(shape).repeat(3, 1, 1, 1), groups=3)
    return frames.transpose(0, 1)[None]


def test_it_is_a_distance(loss: PerceptualLoss) -> None:
    a = _video()
    b = a.flip(4)
    assert loss(a, a) == 0
    assert loss(a, b) > 0.05
    assert torch.allclose(loss(a, b), loss(b, a))
    assert 0 < loss(a, -a) < 4


def test_it_grows_with_noise_and_blur(loss: PerceptualLoss) -> None:
    a, noise = _video(), torch.randn(1, 3, 2, 64, 64)
    for distances in (
        [float(loss(a, a + sigma * noise)) for sigma in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)],
        [0.0, *(float(loss(a, _blurred(a, sigma))) for sigma in (0.4, 0.8, 1.5, 2.5, 4.0))],
    ):
        assert all(right > left for left, right in itertools.pairwise(distances))


def test_it_is_the_formula(loss: PerceptualLoss) -> None:
    """Vector by vector: |a/|a| - b/|b||^2 = 2 - 2 cos(a, b), in float64."""
    a, b = _video(), _video().flip(3)
    for layers in ((0, 1, 2, 3, 4), (2,), (1, 4)):
        expected = []
        for number in layers:
            left, right = (loss.network.features(v[0].transpose(0, 1))[number].double() for v in (a, b))
            cosine = (left * right).sum(1) / (left.square().sum(1) * right.square().sum(1)).sqrt()
            expected.append(float((2 - 2 * cosine).mean()))
        found = float(PerceptualLoss(layers, loss.network)(a, b))
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_videos_of_a_batch_count_alike(loss: PerceptualLoss) -> None:
    a, b = _video(), _video().flip(4)
    both = loss(torch.cat([a, a]), torch.cat([b, a]))
    assert torch.allclose(both, loss(a, b) / 2, rtol=1e-4)


def test_descent_along_its_gradient_brings_a_video_closer(loss: PerceptualLoss) -> None:
    target = _video()
    start = _blurred(target, 2.0)
    video = start.clone().requires_grad_()
    before = loss(video, target)
    (gradient,) = torch.autograd.grad(before, video)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.9
    optimizer = torch.optim.Adam([video], lr=0.003)
    for _ in range(15):
        optimizer.zero_grad()
        loss(video, target).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(video, target) < 0.8 * before
    (at_zero,) = torch.autograd.grad(loss(video, video.detach()), video)
    assert torch.isfinite(at_zero).all()


def test_it_is_neither_trained_nor_saved(loss: PerceptualLoss) -> None:
    model = nn.ModuleDict({"net": nn.Conv2d(3, 3, 1), "loss": loss})
    assert sorted(model.state_dict()) == ["net.bias", "net.weight"]
    assert len(list(model.parameters())) == 2
    model.load_state_dict(nn.ModuleDict({"net": nn.Conv2d(3, 3, 1)}).state_dict())
    moved = PerceptualLoss(network=EfficientNetLite0()).to(torch.float64)
    assert {buffer.dtype for buffer in moved.buffers()} == {torch.float64}


def test_mistakes() -> None:
    network = EfficientNetLite0()
    for layers in ((), (5,), (-1,)):
        with pytest.raises(WorldloomError, match="layers are some of 0 to 4"):
            PerceptualLoss(layers, network)
    loss = PerceptualLoss(network=network)
    video = torch.zeros(1, 3, 1, 32, 32)
    for other in (video[0], video[:, :1], video[..., :31], torch.zeros(1, 3, 2, 32, 32)):
        with pytest.raises(WorldloomError, match="two videos of one shape"):
            loss(video, other)
    with pytest.raises(WorldloomError, match="at least 32"):
        loss(video[..., :31], video[..., :31])
