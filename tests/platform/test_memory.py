"""Peak memory: known amounts are found, whatever was allocated and freed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloom import memory
from worldloom.memory import peak_memory

MB = 1 << 20
Touch = Callable[[int], None]

with peak_memory() as _trial:
    pass
measured = pytest.mark.skipif(_trial.bytes is None, reason="nothing measures memory here")


def touch_numpy(amount: int) -> None:
    """Allocate, touch and free."""
    np.ones(amount, np.uint8)


def touch_torch(amount: int) -> None:
    """The same in pieces that malloc takes from its heap, not from fresh mappings."""
    kept = [torch.ones(MB // 2, dtype=torch.uint8) for _ in range(amount // (MB // 2))]
    del kept


@measured
@pytest.mark.parametrize("touch", [touch_numpy, touch_torch])
@pytest.mark.parametrize("amount", [96 * MB, 192 * MB])
def test_a_known_amount_is_found(touch: Touch, amount: int) -> None:
    with peak_memory() as peak:
        touch(amount)
    assert peak.bytes == pytest.approx(amount, rel=0.1)


@measured
@pytest.mark.parametrize("touch", [touch_numpy, touch_torch])
def test_what_was_freed_before_is_not_reused_unseen(touch: Touch) -> None:
    touch(256 * MB)
    with peak_memory() as peak:
        touch(96 * MB)
    assert peak.bytes == pytest.approx(96 * MB, rel=0.1)


@measured
def test_only_what_comes_on_top_counts_and_only_the_most_at_once() -> None:
    held = np.ones(128 * MB, np.uint8)
    with peak_memory() as peak:
        for _ in range(3):
            touch_numpy(80 * MB)
    assert peak.bytes == pytest.approx(80 * MB, rel=0.1)
    with peak_memory() as nothing:
        pass
    assert nothing.bytes is not None
    assert nothing.bytes < 8 * MB
    assert held[-1] == 1


@measured
def test_a_block_that_raises_lets_the_error_through() -> None:
    with pytest.raises(KeyError), peak_memory() as peak:
        raise KeyError("no")
    assert peak.bytes is None


def test_there_is_no_figure_where_nothing_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with peak_memory("meta") as peak:
        torch.ones(1000, device="meta")
    assert peak.bytes is None
    refused = tmp_path / "refused"
    refused.mkdir()  # writing to it fails, as it does where /proc is read-only
    for path in (tmp_path / "absent", refused):
        monkeypatch.setattr(memory, "_CLEAR", path)
        with peak_memory("cpu") as peak:
            touch_numpy(64 * MB)
        assert peak.bytes is None


@measured
def test_a_reset_that_is_ignored_gives_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    touch_numpy(256 * MB)
    ignored = tmp_path / "ignored"
    ignored.touch()
    monkeypatch.setattr(memory, "_CLEAR", ignored)
    with peak_memory("cpu") as peak:
        touch_numpy(64 * MB)
    assert peak.bytes is None


@pytest.mark.gpu
def test_on_cuda_it_is_what_tensors_hold() -> None:
    held = torch.ones(64 * MB, dtype=torch.uint8, device="cuda")
    with peak_memory("cuda") as peak:
        for _ in range(2):
            torch.ones(96 * MB, dtype=torch.uint8, device="cuda")
    assert peak.bytes == pytest.approx(96 * MB, rel=0.1)
    assert held.sum() == 64 * MB
