"""Processes that work beside this one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def context() -> SpawnContext:
    """How they are started: afresh, since torch's threads and CUDA do not survive a fork."""
    return multiprocessing.get_context("spawn")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads_of_each(count: int) -> Iterator[None]:
    """Processes started inside it have ``count`` threads: torch reads it when it is imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class Turns:
    """Numbers from 0 on, each given once, to whichever of some processes asks first."""

    def __init__(self) -> None:
        self._next = context().Value("q", 0)

    def __iter__(self) -> Iterator[int]:
        while True:
            with self._next.get_lock():
                turn = self._next.value
                self._next.value += 1
            yield turn


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed even; what it was at goes on later."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def as_done(
    pool: Executor, work: Callable[[Job], Result], jobs: Sequence[Job], after: Callable[[Job], Job | None]
) -> Iterator[tuple[Job, Result]]:
    """Has ``pool`` do ``work`` on the jobs, each once the one that it comes ``after`` is done; as they end.

    Of those that may begin the earlier begin earlier.

    Raises:
        Exception: what ``work`` raised.
    """
    left, running = list(jobs), dict[Future[Result], Job]()
    while left or running:
        waiting = [*left, *running.values()]
        for job in [each for each in left if after(each) not in waiting]:
            left.remove(job)
            running[pool.submit(work, job)] = job
        assert running, "jobs that wait for each other"
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
