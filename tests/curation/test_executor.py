from __future__ import annotations

import os
import time

import pytest

from worldloom import WorldloomError
from worldloom_curation.executor import run_all


def work(number: int) -> tuple[int, int]:
    time.sleep(0.2 if number == 0 else 0.0)
    return number, os.getpid()


def fail(number: int) -> int:
    if number == 1:
        raise ValueError("job 1")
    return number


def die(number: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    finished: list[tuple[int, int]] = []
    results = run_all(work, [(i,) for i in range(4)], workers, lambda count, number: finished.append((count, number)))
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert [count for count, _ in finished] == [1, 2, 3, 4]
    assert (os.getpid() in {process for _, process in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_raises_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="job 1"):
        run_all(fail, [(i,) for i in range(3)], workers)


def test_a_worker_that_dies_is_an_error_with_advice() -> None:
    with pytest.raises(WorldloomError, match="a worker process died"):
        run_all(die, [(0,), (1,)], 2)
