"""The same jobs on Ray Data: a laptop's cores, or a cluster that is found by ``RAY_ADDRESS``.

A row is one source: its file's path and the job, a few hundred bytes. Rows travel, videos do not: every worker opens
the file by its path and writes what it makes into the run's cache. On a cluster both the sources and the output folder
must therefore lie where all machines find them under the same path, and the machines need the same worldloom.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from worldloom.errors import WorldloomError, missing_extra
from worldloom_curation.executor import Done, Lost

T = TypeVar("T")

_BLOCKS = 4096
"""Most blocks, the unit that Ray schedules and tries again: one source each, up to this many."""


class RayExecutor:
    """An `Executor` on Ray Data.

    Args:
        workers: tasks at a time; Ray is started with that many CPUs unless ``RAY_ADDRESS`` names a cluster.

    Raises:
        WorldloomError: Ray is not installed.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise missing_extra("ray", "ray") from error
        self._ray: Any = ray

    def __call__(
        self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], done: Done, lost: Lost[T] | None
    ) -> list[T]:
        """See `Executor`. Ray runs a task again whose process died; if that keeps happening, `lost` is not asked."""
        if not jobs:
            return []
        self._start()
        rows = [
            {"number": number, "source": getattr(job[0], "path", ""), "job": pickle.dumps((function, job))}
            for number, job in enumerate(jobs)
        ]
        data = self._ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS))
        data = data.map(_run, num_cpus=1, compute=self._ray.data.TaskPoolStrategy(size=self._workers))
        found: dict[int, T] = {}
        try:
            for row in data.iter_rows():
                outcome = pickle.loads(row["outcome"])
                if isinstance(outcome, _Raised):
                    raise outcome.error
                found[row["number"]] = outcome
                done(len(found), row["number"])
        except self._ray.exceptions.RayError as error:
            raise WorldloomError(
                "a Ray task died", got=str(error).strip().splitlines()[0], do="run again: what is done is kept"
            ) from error
        return [found[number] for number in range(len(jobs))]

    def _start(self) -> None:
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        if self._ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        address = os.environ.get("RAY_ADDRESS")
        here = {} if address else {"num_cpus": self._workers, "include_dashboard": False}
        try:
            self._ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **here)
        except Exception as error:  # its own start-up raises a plain Exception
            raise WorldloomError(
                "Ray does not start" if not address else "the Ray cluster does not answer",
                got=f"{address}: {error}" if address else str(error),
                do="run again when this machine is less busy, or use --executor local" if not address else "",
            ) from error


class _Raised:
    """What a job raised: carried as a result, for Ray would wrap it in an error of its own, and try again."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _run(row: dict[str, Any]) -> dict[str, Any]:
    """One job, in a Ray worker. The bytes come from the run itself, not from a file."""
    function, job = pickle.loads(row["job"])
    try:
        outcome = function(*job)
    except Exception as error:
        outcome = _Raised(error)
    return {"number": row["number"], "outcome": pickle.dumps(outcome)}
