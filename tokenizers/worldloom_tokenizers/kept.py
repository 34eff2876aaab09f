"""What follows from parameters alone, made once and kept between calls while the parameters stay as they are.

Only for inference: nothing is kept in training mode or while gradients are recorded, and recording them once drops what
was kept, so that a step of training, however it writes its result, is never followed by a stale value. Without
gradients, writing to a parameter in place, loading, moving or replacing it is seen by its version, its place in memory
and its type. What nobody can see is a write through ``parameter.data`` between two calls without gradients: call
`forget` after one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Kept(Generic[T]):
    """One value made of parameters; an attribute of the module that owns them.

    It belongs to the process: copying or pickling the module leaves it behind, and no state dict holds it.

    Args:
        make: parameters -> value; called without gradients where the value is kept.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self.make, self.allowed = make, True
        self._held: tuple[list[Tensor], list[tuple[Any, ...]], T] | None = None

    def keeps(self, training: bool, *parameters: Tensor) -> bool:
        """Whether a value would be kept now: in inference, and of parameters that count their versions.

        Modules ask at every call, also where they then have no use for the value, so that training drops it.
        """
        if training or torch.is_grad_enabled():
            self.forget()
            return False
        return self.allowed and not any(parameter.is_inference() for parameter in parameters)

    def value(self, training: bool, *parameters: Tensor) -> T:
        """The value, made now if the parameters are not those that it was made of, as they were then."""
        if not self.keeps(training, *parameters):
            return self.make(*parameters)
        now = [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        held = self._held
        if held is None or held[1] != now:
            del held
            self.forget()  # its memory is free before the next is made
            with torch.inference_mode(False), torch.no_grad():
                # the tensors are held too: as long as they are, their places in memory name no others
                self._held = held = ([p.detach() for p in parameters], now, self.make(*parameters))
        return held[2]

    def forget(self) -> None:
        """Drop the value."""
        self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        return self._empty()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.make,), {"allowed": self.allowed}

    def _empty(self) -> Kept[T]:
        other = type(self)(self.make)
        other.allowed = self.allowed
        return other


def keep(module: nn.Module, allowed: bool) -> None:
    """Say for all of a network whether values are kept; where not, those kept are dropped."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Kept):
                value.allowed = allowed
                if not allowed:
                    value.forget()
