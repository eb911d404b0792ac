"""What a study costs beside its trials, and what a second process gains.

``python -m benchmarks.orchestration [--trials 30]`` runs ``pipeline tune`` on the default task, without
pretraining, whole commands in new folders, one thread a process: with one process and with two, and once more
with one here, where the seconds are taken that it waits for Optuna and for MLflow.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, note

_COMMAND = ("tune", "-S", "pretrain.enabled=false", "--seed", "1")


class Clock:
    """Seconds spent inside the functions it watches; one that another calls counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it is entered, time counts."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - started

    def watch(self, owner: Any, *names: str) -> None:
        """Counts the time in those functions of ``owner`` from now on."""
        for name in names:
            setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.running():
                return function(*arguments, **options)

        return watched


def shares(trials: int) -> tuple[float, float]:
    """Of the wall-clock of a study in this process: what it waited for Optuna, and for MLflow."""
    from pipeline.cli import main
    from pipeline.tracking.process import ScribeProcess
    from pipeline.tuning import run
    from pipeline.tuning.study import Study

    optuna, mlflow = Clock(), Clock()
    with optuna.running():
        importlib.import_module("optuna")
    optuna.watch(Study, "__init__", "guess_first", "tell", "fail", "_left_behind", "_next", "close")
    optuna.watch(run, "write_report")
    mlflow.watch(ScribeProcess, "__init__", "send", "end", "close")
    sys.argv = ["pipeline", *_arguments(trials, 1)]
    started = time.perf_counter()
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    whole = time.perf_counter() - started
    return optuna.seconds / whole, mlflow.seconds / whole


def seconds(trials: int, workers: int) -> float:
    """Of the whole command, in processes of its own."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipeline", *_arguments(trials, workers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - started


def _arguments(trials: int, workers: int) -> list[str]:
    name = f"workers-{workers}-{time.monotonic_ns()}"
    return [*_COMMAND, "--trials", str(trials), "--workers", str(workers), "--name", name]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print one array of rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PIPELINE_HOME"] = temporary
        shutil.copy(Path(__file__).parent.parent / "params.yaml", temporary)
        trials = arguments.trials
        one, two = (seconds(trials, workers) for workers in (1, 2))
        note(f"{trials} trials: {one:.1f} s in one process, {two:.1f} s in two")
        torch.set_num_threads(1)
        optuna, mlflow = shares(trials)
    rows = [
        Row.of("trials_per_minute_two_over_one", "", [one / two]),
        Row.of("optuna_share", "", [optuna]),
        Row.of("mlflow_share", "", [mlflow]),
    ]
    for row in rows:
        if not arguments.json:
            print(f"{row.name:33} {row.value:8.4f}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
