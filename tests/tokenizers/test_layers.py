"""Convolutions that torch gets wrong on a CPU."""

from __future__ import annotations

import pytest
import torch

from worldloom_tokenizers.layers import conv3d


def _leave_nan_in_freed_memory() -> None:
    for power in range(6, 19):
        torch.full((1 << power,), float("nan"))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_a_kernel_over_small_frames_is_right_in_bfloat16(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.bfloat16 if not autocast else torch.float32
    x = torch.randn(4, 16, 2, 4, 4, generator=generator).bfloat16()
    kernel, bias = torch.randn(2, 16, 3, 3, 3, generator=generator).bfloat16(), torch.zeros(2, dtype=given)
    exact = kernel.double().requires_grad_()
    conv3d(x.double(), exact, bias.double(), padding=1).sum().backward()
    assert exact.grad is not None
    for _ in range(20):
        weight = kernel.to(given, copy=True).requires_grad_()
        _leave_nan_in_freed_memory()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            made = conv3d(x.to(given), weight, bias, padding=1)
        assert made.dtype == torch.bfloat16
        _leave_nan_in_freed_memory()
        made.sum().backward()
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-2, atol=1e-2)
