"""Running one function over many jobs: in this process, in several, or on Ray. Results come in the order of the jobs.

A job names files and spans; what it makes goes into the cache, and its result is a few numbers. So what waits between
two steps is small, however long the videos are: no executor holds or sends frames.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, Protocol, TypeVar

from worldloom.errors import WorldloomError

T = TypeVar("T")

Done = Callable[[int, int], None]
"""Called with (how many are finished, number of the job just finished)."""
Lost = Callable[[int], T]
"""The result of a job, by its number, whose process died of it."""


class Executor(Protocol):
    """Runs ``function(*job)`` for every job and returns the results in the order of the jobs.

    Args:
        function: a function of a module, since a worker imports it.
        done: told of every job that is finished.
        lost: what to return for a job that kills its process, e.g. in a decoder; None raises.

    Raises:
        WorldloomError: a worker died. What a job raises is raised here.
    """

    def __call__(
        self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], done: Done, lost: Lost[T] | None
    ) -> list[T]: ...


def executor(name: Literal["local", "ray"], workers: int) -> Executor:
    """The executor of that name.

    Raises:
        WorldloomError: Ray is not installed.
    """
    if name == "ray":
        from worldloom_curation.ray_executor import RayExecutor

        return RayExecutor(workers)

    def local(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], done: Done, lost: Lost[T] | None) -> list[T]:
        return run_all(function, jobs, workers, done, lost)

    return local


def run_all(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int = 1,
    done: Done = lambda *_: None,
    lost: Lost[T] | None = None,
) -> list[T]:
    """``function(*job)`` for every job on this machine; see `Executor`.

    Args:
        workers: 1 runs here. More start fresh processes (forkserver where there is one): forking a process in which
            PyAV has decoded makes the children hang. At most two jobs for each are handed out at a time.
    """
    if workers == 1 or len(jobs) < 2:
        results: list[T] = []
        for number, job in enumerate(jobs):
            results.append(function(*job))
            done(number + 1, number)
        return results
    found: dict[int, T] = {}
    for number, result in _in_processes(function, jobs, min(workers, len(jobs)), lost):
        found[number] = result
        done(len(found), number)
    return [found[number] for number in range(len(jobs))]


def _in_processes(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int, lost: Lost[T] | None
) -> Iterator[tuple[int, T]]:
    """Results as they come. After a death, the jobs that were under way run alone, to see which of them kills."""
    waiting = enumerate(jobs)
    while True:
        under_way: dict[int, tuple[Any, ...]] = {}
        try:
            with _pool(workers) as pool:
                yield from _feed(pool, function, waiting, under_way, 2 * workers)
            return
        except BrokenProcessPool as error:
            if lost is None:
                raise _died() from error
        for number, job in under_way.items():
            try:
                with _pool(1) as pool:
                    result = pool.submit(function, *job).result()
            except BrokenProcessPool:
                result = lost(number)
            yield number, result


def _feed(
    pool: ProcessPoolExecutor,
    function: Callable[..., T],
    waiting: Iterator[tuple[int, tuple[Any, ...]]],
    under_way: dict[int, tuple[Any, ...]],
    most: int,
) -> Iterator[tuple[int, T]]:
    """Keep at most `most` jobs in the pool; `under_way` holds those without a result."""
    futures: dict[Future[T], int] = {}
    try:
        while True:
            for number, job in itertools.islice(waiting, most - len(futures)):
                under_way[number] = job
                futures[pool.submit(function, *job)] = number
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                result = future.result()
                number = futures.pop(future)
                del under_way[number]
                yield number, result
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _pool(workers: int) -> ProcessPoolExecutor:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method), initializer=_die_with_parent)


def _died() -> WorldloomError:
    return WorldloomError(
        "a worker process died", do="run again with fewer workers: what is done is kept; out of memory is likely"
    )


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
