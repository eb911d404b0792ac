"""Processes that work beside the one that started them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import pytest

from pipeline.processes import Turns, as_done, context, threads_of_each

PARENT = """
import time
from pipeline.processes import context, end_with_parent

def work():
    end_with_parent()
    print("at work", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context().Process(target=work).start()
    time.sleep(600)
"""


def test_a_process_ends_with_the_killed_one_that_started_it(tmp_path: Path) -> None:
    (script := tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "at work\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        left = psutil.wait_procs(family, timeout=20)[1]
        for each in left:
            each.send_signal(signal.SIGKILL)
    assert left == []


def test_what_is_said_of_threads_is_taken_back() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    with threads_of_each(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ.get("OMP_NUM_THREADS") == before


def _take(turns: Turns, together: Barrier, path: Path) -> None:
    together.wait(60)
    path.write_text("\n".join(str(turn) for turn in itertools.islice(turns, 20_000)))


def test_every_turn_is_given_once(tmp_path: Path) -> None:
    turns, together = Turns(), context().Barrier(2)
    files = [tmp_path / name for name in ("a", "b")]
    others = [context().Process(target=_take, args=(turns, together, file)) for file in files]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    given = [int(line) for file in files for line in file.read_text().split()]
    assert sorted(given) == list(range(40_000))
    assert next(iter(turns)) == 40_000


def test_jobs_wait_for_the_one_they_come_after() -> None:
    after = {"d": "start 1", "b": "a", "a": "start 0", "start 0": None, "start 1": None, "c": "a"}
    open_ = {name: threading.Event() for name in after}
    begun: list[str] = []

    def work(name: str) -> str:
        begun.append(name)
        assert open_[name].wait(10)
        return name.upper()

    with ThreadPoolExecutor(2) as pool:
        ended = as_done(pool, work, list(after), after.get)
        open_["start 0"].set()
        assert next(ended) == ("start 0", "START 0")
        open_["a"].set()
        assert next(ended) == ("a", "A")
        open_["b"].set()
        assert next(ended) == ("b", "B")
        assert begun[:4] == ["start 0", "start 1", "a", "b"]
        assert "d" not in begun  # what it comes after has not ended
        for each in open_.values():
            each.set()
        assert sorted(ended) == [("c", "C"), ("d", "D"), ("start 1", "START 1")]


def test_what_a_job_raises_comes_out() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        list(as_done(pool, lambda number: 1 // number, [1, 0], lambda _: None))
