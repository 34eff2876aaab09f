"""Progress of a long run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Something that counts up to `total`; see `progress`."""

    def __init__(self, title: str, bar: Any = None, task: Any = None) -> None:
        self._title, self._bar, self._task, self._shown = title, bar, task, 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` is finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._shown > 2 or done >= total:
            self._shown = time.monotonic()
            print(f"{self._title} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A progress display for the length of the block."""
    if quiet or not sys.stderr.isatty():
        shown = Progress(title)
        if quiet:
            shown._shown = float("inf")
        yield shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "/", TimeRemainingColumn())
    with Rich(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        yield Progress(title, bar, bar.add_task(title, total=None, note=""))
