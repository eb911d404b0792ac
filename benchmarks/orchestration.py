"""What a study costs beside its trials, and what a second process gains.

``python -m benchmarks.orchestration [--trials 30] [--rounds 5]`` runs ``pipeline tune`` on the default task,
without pretraining, in a new folder, one thread a process. First whole, in one process, where the seconds are
taken that it waits for Optuna and for MLflow. Then the same study grows, by two processes and by one in turn:
its texts are encoded, and what a machine gives from minute to minute falls on both.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, note
from pipeline.layout import project_root
from pipeline.processes import context, threads_of_each
from pipeline.tuning.study import JOURNAL

NAME = "measured"


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


@dataclass(frozen=True)
class Seconds:
    """Of a study: a trial, and what was waited for."""

    trial: float
    optuna: float
    mlflow: float


def study(have: int, want: int, workers: int) -> Seconds:
    """Runs one in this process, which begins with it, and in others as ``workers`` asks, to ``want`` trials.

    A trial's seconds are the time from when as many new ones had ended as there are processes, each of which
    has then read what it needs, to the last one's end, shared among the rest.
    """
    optuna, mlflow = Clock(), Clock()
    torch.set_num_threads(1)
    with optuna.running():
        importlib.import_module("optuna")
    from pipeline.cli import main
    from pipeline.tracking.process import ScribeProcess
    from pipeline.tuning import run
    from pipeline.tuning.study import Study

    optuna.watch(Study, "__init__", "guess_first", "tell", "fail", "_left_behind", "_next", "close")
    optuna.watch(run, "write_report")
    mlflow.watch(ScribeProcess, "__init__", "send", "end")
    arguments = ["--seed", "1", "--trials", str(want), "--workers", str(workers), "--name", NAME]
    sys.argv = ["pipeline", "tune", "-S", "pretrain.enabled=false", *arguments]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise
    return Seconds(_a_trial(have, workers), optuna.seconds, mlflow.seconds)


def _a_trial(have: int, workers: int) -> float:
    import optuna

    [journal] = (project_root() / "runs" / NAME).glob(f"tuning/*/{JOURNAL}")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    made = optuna.load_study(study_name=None, storage=storage).trials[have:]
    first, *rest = sorted(each.datetime_complete for each in made if each.datetime_complete)[workers - 1 :]
    return (rest[-1] - first).total_seconds() / len(rest)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=30, help="of the first, and of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="of two processes and one")
    parser.add_argument("--json", action="store_true", help="print one array of rows")
    arguments = parser.parse_args()
    have, ratios = 0, []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PIPELINE_HOME"] = temporary
        shutil.copy(Path(__file__).parent.parent / "params.yaml", temporary)

        def more(workers: int) -> tuple[Seconds, float]:
            nonlocal have
            started = time.perf_counter()
            with threads_of_each(1), ProcessPoolExecutor(1, context()) as fresh:
                made = fresh.submit(study, have, have + arguments.trials, workers).result()
            whole = time.perf_counter() - started
            have += arguments.trials
            note(f"{workers} at work: {whole:.1f} s, {made}")
            return made, whole

        alone, whole = more(1)
        for _ in range(arguments.rounds):
            two, one = more(2)[0], more(1)[0]
            ratios.append(one.trial / two.trial)
    rows = [
        Row.of("trials_per_minute_two_over_one", "", ratios),
        Row.of("optuna_share", "", [alone.optuna / whole]),
        Row.of("mlflow_share", "", [alone.mlflow / whole]),
    ]
    for row in rows:
        if not arguments.json:
            print(f"{row.name:33} {row.value:8.4f} {row.low:8.4f} {row.high:8.4f}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
