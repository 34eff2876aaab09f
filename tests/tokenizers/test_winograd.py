"""Winograd convolutions against torch's: every size, tap and past; float64 closely, float32 within the stated error."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from worldloom_tokenizers import layers, winograd


def direct(frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, t: int) -> torch.Tensor:
    x = frames.permute(0, 4, 1, 2, 3)
    missing = weight.shape[2] - 1 - (x.shape[2] - t)
    x = F.pad(x, (0, 0, 0, 0, max(missing, 0), 0))
    return F.conv3d(x, weight, bias, padding=(0, 1, 1))[:, :, -t:].permute(0, 2, 3, 4, 1)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 13), w=st.integers(1, 13), t=st.integers(1, 3), past=st.integers(0, 2), taps=st.sampled_from([1,
    3]), c=st.integers(1, 5), o=st.integers(1, 5), bias=st.booleans(), strip=st.sampled_from([1, 1 << 20]),
)  # fmt: skip
def test_equal_to_a_direct_convolution(
    h: int, w: int, t: int, past: int, taps: int, c: int, o: int, bias: bool, strip: int
) -> None:
    past = min(past, taps - 1)
    generator = torch.Generator().manual_seed(0)
    frames, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, t + past, h, w, c), (o, c, taps, 3, 3), (o,))
    )
    added = offset if bias else None
    held, winograd._STRIP = winograd._STRIP, strip
    try:
        made = winograd.conv3x3(frames.split([past, t], dim=1), weight, added, t)
    finally:
        winograd._STRIP = held
    torch.testing.assert_close(made, direct(frames, weight, added, t), rtol=0, atol=1e-11)


def test_float32_rounds_as_stated() -> None:
    torch.manual_seed(0)
    frames, weight, bias = torch.randn(1, 4, 16, 16, 64), torch.randn(64, 64, 3, 3, 3) / 40, torch.randn(64)
    made = winograd.conv3x3([frames], weight, bias, 2)
    exact = direct(frames.double(), weight.double(), bias.double(), 2)
    error = (made - exact).abs().max() / exact.abs().max()
    assert 0 < error < 2e-5


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), c=st.integers(1, 4), o=st.integers(1, 4), bias=st.booleans())
def test_enlarging_folds_into_the_convolution(h: int, w: int, c: int, o: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, h, w, c), (o, c, 3, 3), (o,))
    )
    added = offset if bias else None
    large = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = direct(large, weight[:, :, None], added, 3)
    torch.testing.assert_close(
        layers.enlarge3x3(x, layers.enlarging_kernels(weight), added), expected, rtol=0, atol=1e-12
    )


def test_which_way_is_taken_does_not_show() -> None:
    """Large enough for Winograd without gradients, direct with them."""
    torch.manual_seed(0)
    conv = layers.CausalConv(64, 64)
    x = torch.randn(1, 4, 32, 32, 64)
    with torch.no_grad():
        assert winograd.worthwhile(4 * 8 * 8, 64, 3)
        fast = conv(x, None)
    torch.testing.assert_close(fast, conv(x, None), rtol=0, atol=1e-4)
