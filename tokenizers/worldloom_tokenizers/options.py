"""Types of command-line options that several commands take."""

from __future__ import annotations

import re

import click


class Size(click.ParamType):
    """``64`` or ``64x96``: height, or height x width."""

    name = "H[xW]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | object:
        """Text to (height, width)."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
        if found is None:
            self.fail(f"{value!r} is not a size such as 64 or 64x96", param, ctx)
        return int(found[1]), int(found[2] or found[1])
