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


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), ((1, 2, 2), (0, 1, 1))])
@torch.no_grad()
def test_a_convolution_over_small_frames_is_torchs(
    stride: int | tuple[int, int, int], padding: int | tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, 9, 7, generator=generator)
    kernel, bias = torch.randn(4, 5, 3, 3, 3, generator=generator), torch.randn(4, generator=generator)
    for kept in (torch.contiguous_format, torch.channels_last_3d):
        frames, weight = x.contiguous(memory_format=kept), kernel.contiguous(memory_format=kept)
        for added in (bias, None):
            exact = None if added is None else added.double()
            expected = torch.nn.functional.conv3d(x.double(), kernel.double(), exact, stride, padding)
            torch.testing.assert_close(
                conv3d(frames, weight, added, stride, padding).double(), expected, rtol=1e-5, atol=1e-4
            )
