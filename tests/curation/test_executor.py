from __future__ import annotations

import os
import time
from collections.abc import Iterator

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


def die_at_two(number: int) -> int:
    if number == 2:
        os._exit(9)
    return 10 * number


class Counted(list[tuple[int]]):
    """Jobs that count how many were taken."""

    taken = 0

    def __iter__(self) -> Iterator[tuple[int]]:
        for job in super().__iter__():
            self.taken += 1
            yield job


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


def test_a_job_that_kills_its_process_costs_that_job_only() -> None:
    finished: list[int] = []
    results = run_all(die_at_two, [(i,) for i in range(6)], 2, lambda count, _: finished.append(count), lambda i: -i)
    assert results == [0, 10, -2, 30, 40, 50]
    assert finished == [1, 2, 3, 4, 5, 6]


def test_jobs_are_handed_out_as_they_are_done() -> None:
    jobs = Counted((i,) for i in range(12))
    ahead: list[int] = []
    run_all(fail_never, jobs, 2, lambda count, _: ahead.append(jobs.taken - count))
    assert max(ahead) <= 4  # two for each worker
    assert jobs.taken == 12


def fail_never(number: int) -> int:
    return number
