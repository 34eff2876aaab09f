"""The one error a user sees: what happened, what was given, what to do."""

from __future__ import annotations


class WorldloomError(Exception):
    """A mistake the user can mend.

    Args:
        what: what went wrong, one sentence.
        got: the offending value, if there is one.
        do: what to do about it, an instruction.
    """

    def __init__(self, what: str, *, got: object = None, do: str = "") -> None:
        self.what, self.got, self.do = what, got, do
        text = what if got is None else f"{what}\n  got: {got}"
        super().__init__(f"{text}\n  do:  {do}" if do else text)


class MissingPackage(WorldloomError):
    """An optional package is not installed: no single input is to blame, so nothing goes on without it."""


def missing_extra(package: str, extra: str) -> MissingPackage:
    """The error for an optional package that is not installed."""
    return MissingPackage(f"{package} is not installed", do=f"pip install 'worldloom[{extra}]'")
