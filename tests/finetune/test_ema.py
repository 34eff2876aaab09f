"""The averaged weights against a loop that says what an average is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from worldloom_finetune.ema import Ema


def test_the_average_equals_a_naive_loop() -> None:
    layer = nn.Linear(3, 2).double()
    ema = Ema(dict(layer.named_parameters()), decay=0.9)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for update in range(40):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        for name, p in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, value in expected.items():
        assert torch.allclose(ema.averages[name].double(), value, atol=1e-6)
        assert ema.averages[name].dtype == torch.float32


def test_an_average_of_a_constant_is_that_constant() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    ema = Ema({"w": layer.weight}, decay=0.99)
    for _ in range(5):
        ema.update()
    assert torch.allclose(ema.averages["w"], before, atol=1e-7)


def test_applied_swaps_the_averages_in_and_the_weights_back_bit_for_bit() -> None:
    layer = nn.Linear(3, 2)
    ema = Ema({"w": layer.weight}, decay=0.5)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update()
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, ema.averages["w"])
        assert not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)


def test_the_weights_come_back_after_an_error_too() -> None:
    layer = nn.Linear(3, 2)
    ema = Ema({"w": layer.weight}, decay=0.5)
    with torch.no_grad():
        layer.weight.add_(1.0)
    own = layer.weight.detach().clone()

    def fail() -> None:
        with ema.applied():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(layer.weight, own)


def test_a_saved_average_goes_on_as_if_never_saved() -> None:
    layer = nn.Linear(3, 2)
    one, other = Ema({"w": layer.weight}, 0.9), Ema({"w": layer.weight}, 0.9)
    with torch.no_grad():
        layer.weight.add_(1.0)
    for _ in range(3):
        one.update()
    other.load({"w": one.averages["w"].clone()}, one.updates)
    one.update()
    other.update()
    assert torch.equal(one.averages["w"], other.averages["w"])
