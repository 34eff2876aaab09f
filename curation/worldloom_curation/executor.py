"""Running one function over many jobs: in this process, or in several. The results come in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from worldloom.errors import WorldloomError

T = TypeVar("T")


def run_all(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int = 1,
    done: Callable[[int, int], None] = lambda *_: None,
) -> list[T]:
    """``function(*job)`` for every job.

    Args:
        function: a function of a module, since a worker imports it.
        workers: 1 runs here. More start fresh processes (forkserver where there is one): forking a process in which
            PyAV has decoded makes the children hang.
        done: called with (how many are finished, number of the job just finished).

    Raises:
        WorldloomError: a worker died, e.g. for want of memory. What a job raises is raised here.
    """
    if workers == 1 or len(jobs) < 2:
        results: list[T] = []
        for number, job in enumerate(jobs):
            results.append(function(*job))
            done(number + 1, number)
        return results
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_die_with_parent) as pool:
        futures: dict[Future[T], int] = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                future.result()
                done(count, futures[future])
        except BrokenProcessPool as error:
            raise WorldloomError(
                "a worker process died",
                do="run again with fewer workers: what is done is kept; out of memory is likely",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
