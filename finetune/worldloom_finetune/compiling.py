"""Compiled blocks: switched on for a run, and off where shapes change from call to call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks of a network, or all of one that has none, at the next call."""
    for block in getattr(network, "blocks", [network]):
        block.compile()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, or in a function that it decorates, compiled networks run as they are written."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
