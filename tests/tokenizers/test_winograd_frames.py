"""3x3 convolutions of frames by kept kernels against torch's: any size in float64, float32 within the stated error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from worldloom_tokenizers import winograd_frames


def direct(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3), h=st.integers(1, 19), w=st.integers(1, 19), c=st.integers(1, 5), o=st.integers(1, 5),
    bias=st.booleans(),
)  # fmt: skip
@torch.no_grad()
def test_equal_to_a_direct_convolution(n: int, h: int, w: int, c: int, o: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, h, w, c), (o, c, 3, 3), (o,))
    )
    added = offset if bias else None
    made = winograd_frames.conv3x3(x, winograd_frames.transform(weight), added)
    torch.testing.assert_close(made, direct(x, weight, added), rtol=0, atol=1e-12)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("n", "h", "w", "c", "o"), [(1, 16, 16, 64, 96), (3, 13, 7, 96, 64), (1, 2, 1, 17, 5)])
@torch.no_grad()
def test_float32_rounds_as_stated_in_both_orders_of_kernels(
    n: int, h: int, w: int, c: int, o: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n, h, w, c), (o, c, 1, 3, 3), (o,)))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    kernels = winograd_frames.transform(weight)
    made = winograd_frames.conv3x3(x, kernels, bias)
    assert kernels.packed == (onednn and torch.backends.mkldnn.is_available())
    exact = direct(x.double(), weight[:, :, 0].double(), bias.double())
    error = (made - exact).abs().max() / exact.abs().max()
    assert 0 < error < 3e-6
