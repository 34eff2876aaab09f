"""What convolutions keep between calls: the same results as without, never a stale one, nothing of it in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from worldloom_tokenizers.cosmos import checkpoint
from worldloom_tokenizers.cosmos.config import CosmosConfig
from worldloom_tokenizers.cosmos.model import Conv, CosmosTokenizer
from worldloom_tokenizers.kept import Kept, keep

WIDE = CosmosConfig(
    width=64, multipliers=(1, 1, 1), decoder_multipliers=(1, 1, 1), blocks=1, z_channels=6, latent_channels=6
)
"""Wide enough for what is kept to be worthwhile at 64x64."""


def network(config: CosmosConfig = WIDE) -> CosmosTokenizer:
    torch.manual_seed(0)
    model = checkpoint.build(config)
    assert isinstance(model, CosmosTokenizer)
    return model.eval()


def held(module: nn.Module) -> list[str]:
    """Names of the values that a network keeps now."""
    return [
        f"{name}.{attribute}"
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        if isinstance(value, Kept) and value._held is not None
    ]


def fresh(model: CosmosTokenizer, video: torch.Tensor) -> torch.Tensor:
    """What a network gives that keeps nothing."""
    keep(model, False)
    with torch.no_grad():
        made = model.decode_raw(model.encode_raw(video))
    keep(model, True)
    return made


@pytest.mark.parametrize("frames", [1, 9])
def test_latents_and_frames_are_those_of_a_network_that_keeps_nothing(frames: int) -> None:
    model = network().double()
    video = torch.rand(2, 3, frames, 64, 80, dtype=torch.float64) * 2 - 1
    plain = fresh(model, video)
    assert not held(model)
    for _ in range(2):
        with torch.no_grad():
            made = model.decode_raw(model.encode_raw(video))
        torch.testing.assert_close(made, plain, rtol=0, atol=1e-11)
    kept = held(model)
    assert any("joined" in name for name in kept) == (frames == 1)
    assert any("space.frames" in name for name in kept) == (frames == 9)
    assert any("resample.kernels" in name for name in kept)
    made = model.decode_raw(model.encode_raw(video))  # with gradients, torch's convolutions
    torch.testing.assert_close(made, plain, rtol=0, atol=1e-11)
    assert not held(model)


def _in_place(conv: Conv) -> None:
    with torch.no_grad():
        conv.space.weight.mul_(2)
        conv.time.bias.add_(1)


def _loaded(conv: Conv) -> None:
    conv.load_state_dict({key: 3 * value for key, value in conv.state_dict().items()})


def _assigned(conv: Conv) -> None:
    conv.load_state_dict({key: 3 * value for key, value in conv.state_dict().items()}, assign=True)


def _pointed_elsewhere(conv: Conv) -> None:
    for parameter in conv.parameters():
        parameter.data = parameter.data * 2


def _trained(conv: Conv) -> None:
    """A step that writes behind the back of versions, as some optimizers do."""
    conv.train()
    conv(torch.randn(1, 2, 16, 16, 64), None).sum().backward()
    for parameter in conv.parameters():
        parameter.data.sub_(0.1)
    conv.eval()


def _trained_in_eval_mode(conv: Conv) -> None:
    conv(torch.randn(1, 2, 16, 16, 64), None).sum().backward()
    for parameter in conv.parameters():
        parameter.data.sub_(0.1)


@pytest.mark.parametrize("change", [_in_place, _loaded, _assigned, _pointed_elsewhere, _trained, _trained_in_eval_mode])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_changed_kernel_is_seen(change: Callable[[Conv], None], frames: int, context: type) -> None:
    torch.manual_seed(0)
    conv, x = Conv(64, 64).eval(), torch.randn(1, frames, 16, 16, 64)
    with context():
        before = conv(x, None)
    assert held(conv)
    change(conv)
    with context():
        after = conv(x, None)
        keep(conv, False)
        plain = conv(x, None)
    torch.testing.assert_close(after, plain, rtol=0, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


@torch.no_grad()
def test_a_change_of_type_is_seen() -> None:
    conv, x = Conv(64, 64).eval(), torch.randn(1, 1, 16, 16, 64)
    conv(x, None)
    conv.double()
    assert conv(x.double(), None).dtype == torch.float64


@torch.no_grad()
def test_nothing_is_kept_in_training_mode_nor_of_parameters_that_count_no_versions() -> None:
    x = torch.randn(1, 1, 16, 16, 64)
    conv = Conv(64, 64)
    conv(x, None)
    assert not held(conv)
    with torch.inference_mode():
        conv = Conv(64, 64).eval()
        before = conv(x, None)
        conv.space.weight.mul_(2)
        assert not torch.allclose(conv(x, None), before)
    assert not held(conv)


@torch.no_grad()
def test_autocast_takes_torchs_convolutions() -> None:
    conv, x = Conv(64, 64).eval(), torch.randn(1, 1, 16, 16, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = conv(x, None)
    torch.testing.assert_close(made.float(), conv(x, None), rtol=0, atol=0.05)


@torch.no_grad()
def test_copies_pickles_and_state_dicts_leave_it_behind() -> None:
    conv, x = Conv(64, 64).eval(), torch.randn(1, 1, 16, 16, 64)
    keys = list(conv.state_dict())
    made = conv(x, None)
    assert held(conv)
    assert list(conv.state_dict()) == keys
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert not held(other)
        other.space.weight.mul_(2)
        torch.testing.assert_close(other(x, None) - conv.time.bias, 2 * (made - conv.time.bias), rtol=0, atol=2)
    assert torch.equal(conv(x, None), made)


@torch.no_grad()
def test_a_switched_off_network_keeps_nothing_and_passes_that_on_to_copies() -> None:
    conv, x = Conv(64, 64).eval(), torch.randn(1, 1, 16, 16, 64)
    conv(x, None)
    keep(conv, False)
    assert not held(conv)
    for each in (conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        each(x, None)
        assert not held(each)
