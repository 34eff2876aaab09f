"""Finite scalar quantisation: equal to vector-quantize-pytorch's, index by index; codes and indices are inverse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ

from worldloom.errors import WorldloomError
from worldloom_tokenizers import fsq

LEVELS = [[8, 8, 8, 5, 5, 5], [8, 5, 5, 5], [6, 7], [7, 7, 7, 7, 7]]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_codes_and_indices_are_those_of_vector_quantize_pytorch(levels: list[int], scale: float) -> None:
    z = scale * torch.randn(3, len(levels), 4, 5, 6)
    codes, indices = FSQ(levels)(z)
    assert torch.equal(fsq.quantize(z, levels), codes)
    assert torch.equal(fsq.codes_to_indices(codes, levels), indices.long())
    assert len(indices.unique()) > 1


@pytest.mark.parametrize("levels", LEVELS[:3])
def test_every_code_has_one_index(levels: list[int]) -> None:
    indices = torch.arange(math.prod(levels))
    codes = fsq.indices_to_codes(indices, levels)
    assert codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_indices(codes, levels), indices)
    theirs = FSQ(levels).indices_to_codes(indices[None])[0]
    torch.testing.assert_close(codes, theirs.reshape(codes.shape), rtol=0, atol=1e-7)


@settings(max_examples=30)
@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_quantising_again_changes_no_index(levels: list[int], seed: int) -> None:
    z = torch.randn(64, len(levels), generator=torch.Generator().manual_seed(seed)) * 2
    codes = fsq.quantize(z, levels)
    indices = fsq.codes_to_indices(codes, levels)
    assert torch.equal(fsq.indices_to_codes(indices, levels), codes.float())


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    z = torch.randn(10, 4, requires_grad=True)
    fsq.quantize(z, [8, 5, 5, 5]).sum().backward()
    assert z.grad is not None
    count = torch.tensor([8.0, 5, 5, 5])
    half = (count - 1) * 1.001 / 2
    offset = torch.tensor([0.5, 0, 0, 0])
    slope = half * (1 - torch.tanh(z.detach() + torch.atanh(offset / half)) ** 2) / (count // 2)
    torch.testing.assert_close(z.grad, slope)


@pytest.mark.parametrize("levels", [(), (2, 8), (2**16, 2**16)])
def test_levels_that_make_no_codes_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(WorldloomError, match="FSQ needs"):
        fsq.check_levels(levels)


@pytest.mark.parametrize("index", [-1, 1000])
def test_an_index_outside_the_codebook_is_refused(index: int) -> None:
    with pytest.raises(WorldloomError, match="0 to 999"):
        fsq.indices_to_codes(torch.tensor([3, index]), [8, 5, 5, 5])
