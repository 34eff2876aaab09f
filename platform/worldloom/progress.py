"""Progress of a long command on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_EVERY = 2.0  # seconds between lines where there is no terminal


class Report(Protocol):
    """Called as the work goes on."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """Yields ``report(done, total, note)``, to be called as the work goes on; the note ends the line."""
    if quiet:
        yield lambda done, total, note="": None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
        )
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None, note="")

            def update(done: int, total: int, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)

            yield update
    else:
        yield _lines(title)


def _lines(title: str) -> Report:
    shown = time.monotonic()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal shown
        if done >= total or time.monotonic() - shown > _EVERY:
            shown = time.monotonic()
            print(f"{title} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return report
