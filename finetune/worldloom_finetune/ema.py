"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Float32 averages ``a <- d a + (1 - d) w`` of named parameters.

    Args:
        parameters: what is averaged, by name; the averages start equal to them.
        decay: d. With the warm-up ``min(decay, (1 + n) / (10 + n))`` at update n (from 0), so that a short run is not
            dominated by its first weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self.averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def decay_at(self, update: int) -> float:
        """The decay used by the update with this number, from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    def follow(self) -> None:
        """Move the averages to where the parameters have gone."""
        for name, p in self._parameters.items():
            self.averages[name] = self.averages[name].to(p.device)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        weight = 1.0 - self.decay_at(self.updates)
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, weight)
        self.updates += 1

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Take over saved averages."""
        for name, value in self.averages.items():
            value.copy_(averages[name])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the averages; afterwards their own values again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(self.averages[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(kept[name])
