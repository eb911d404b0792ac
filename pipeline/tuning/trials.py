"""Runs the trials of a study: each a fine-tuning run from one start, scored on the validation split."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import runs
from pipeline.config import Config, TuneConfig
from pipeline.engine.shared import sharing
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.stage import read_metrics
from pipeline.tuning.search import assignments, searched, values_of
from pipeline.tuning.study import Study, Taken

LOG = "log.txt"
OnEnd = Callable[[], None]


def open_study(config: Config, base: Layout, folder: Path) -> Study:
    """The study of ``config`` in ``folder``, made where there is none yet.

    Raises:
        UserError: a search or a storage that does not fit.
    """
    options = config.tune
    return Study(
        folder,
        searched(config),
        name=f"{base.root.name}-{folder.name}",
        direction="minimize" if options.by == "loss" else "maximize",
        seed=config.seed,
        storage=options.storage,
        workers=options.workers,
    )


def work(config: Config, base: Layout, folder: Path, parent: str | None, on_end: OnEnd) -> None:
    """Runs trials until all of ``config.tune.trials`` are taken; ``on_end`` is called after each."""
    study = open_study(config, base, folder)
    with sharing():
        while _one_more(study, config, base, parent):
            on_end()


def _one_more(study: Study, config: Config, base: Layout, parent: str | None) -> bool:
    """Runs a trial to its end; whether there was one.

    Raises:
        UserError: the task does not measure what trials are ranked by.
    """
    with study.take(config.tune.trials) as taken:
        if taken is None:
            return False
        try:
            metrics = _run(config, study, base, taken, parent)
        except UserError as error:
            study.fail(taken, str(error))
        else:
            study.tell(taken, _value(metrics, config.tune.by))
    return True


def work_in_processes(config: Config, base: Layout, folder: Path, parent: str | None, on_wait: OnEnd) -> None:
    """As `work`, by as many processes as the configuration says, which share the processor's cores.

    Raises:
        UserError: one of them ended early; what it was at is taken up by the next call.
    """
    count = min(config.tune.workers, config.tune.trials)
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    arguments = [str(base.root.resolve()), str(folder.resolve()), *([parent] if parent else [])]
    configuration.write(config, folder / "params.yaml")
    processes, logs = [], []
    for number in range(count):
        logs.append((folder / f"worker-{number}.log").open("w", encoding="utf-8"))
        command = [sys.executable, "-P", "-m", "pipeline.tuning.trials", *arguments]
        processes.append(
            subprocess.Popen(command, stdout=logs[-1], stderr=subprocess.STDOUT, env=environment)
        )
    try:
        while any(process.poll() is None for process in processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(process for process in processes if process.poll() is None).wait(timeout=1)
            on_wait()
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for log in logs:
            log.close()
    for number, process in enumerate(processes):
        if process.returncode:
            lines = (folder / f"worker-{number}.log").read_text(encoding="utf-8").splitlines()
            last = lines[-1] if lines else f"status {process.returncode}"
            raise UserError(f"a worker of the study ended early: {last}; the same command goes on")


def _run(config: Config, study: Study, base: Layout, taken: Taken, parent: str | None) -> dict[str, Any]:
    """The figures of the trial's run, which is made where it is not there yet."""
    values = assignments(values_of(taken.suggested, study.parameters), config)
    plain = replace(configuration.updated(config, values, source="tune"), tune=TuneConfig())
    layout = runs.branch(base, taken.folder)
    done = layout.finetuned / "metrics.json"
    if not done.is_file():
        with (
            (taken.folder / LOG).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            runs.execute(plain, layout, ("finetune",), resume=runs.goes_on(layout, plain), parent=parent)
    _leave_out_weights(layout)
    return read_metrics(done)


def _value(metrics: dict[str, Any], by: str) -> float:
    figures = {key.removeprefix("validation/"): metrics[key] for key in metrics if "validation/" in key}
    if by not in figures:
        raise UserError(f"tune.by is '{by}'; the task measures {', '.join(figures)}")
    return float(figures[by])


def _leave_out_weights(layout: Layout) -> None:
    """A trial is its trajectory: the weights would be as many models as there are trials."""
    for path in layout.finetuned.rglob("*"):
        if path.suffix == ".safetensors" or path.name.startswith("tokenizer"):
            path.unlink()


if __name__ == "__main__":
    from pipeline.errors import guarded

    root, place, *above = sys.argv[1:]
    guarded(
        lambda: work(
            configuration.read(Path(place) / "params.yaml"),
            Layout(Path(root)),
            Path(place),
            above[0] if above else None,
            lambda: None,
        )
    )
