"""Runs the trials of a study: each a fine-tuning run from one start, scored on the validation split."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import runs
from pipeline.config import Config, TuneConfig
from pipeline.engine.shared import reread, save, sharing
from pipeline.errors import UserError, guarded
from pipeline.layout import Layout
from pipeline.measuring.predictions import MINIMISED
from pipeline.processes import Turns, context, cores, end_with_parent, threads_of_each
from pipeline.stage import read_metrics
from pipeline.tracking.lending import borrow, lending
from pipeline.trajectory import threads
from pipeline.tuning.features import compute_part
from pipeline.tuning.search import assignments, searched, values_of
from pipeline.tuning.study import Study, Taken

LOG, FEATURES = "log.txt", "features"
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
        name=_name(base, folder, options.storage),
        direction="minimize" if options.by in MINIMISED else "maximize",
        seed=config.seed,
        storage=options.storage,
        workers=options.workers,
    )


def _name(base: Layout, folder: Path, storage: str | None) -> str:
    """What the study is called; in a database, which outlives its folder, by a name of the folder's own."""
    name, path = f"{base.root.name}-{folder.name}", folder / "study.txt"
    if storage is None:
        return name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
    return path.read_text(encoding="utf-8")


def work(config: Config, base: Layout, folder: Path, parent: str | None, on_end: OnEnd) -> None:
    """Runs trials until all of ``config.tune.trials`` are taken; ``on_end`` is called after each."""
    with contextlib.closing(open_study(config, base, folder)) as study, sharing(folder / FEATURES):
        while _one_more(study, config, base, parent):
            on_end()


def _one_more(study: Study, config: Config, base: Layout, parent: str | None) -> bool:
    """Runs a trial to its end; whether there was one. Those that only miss their end are told it before.

    Raises:
        UserError: the task does not measure what trials are ranked by.
    """
    while True:
        with study.take(config.tune.trials) as taken:
            if taken is None:
                return False
            layout = runs.branch(base, taken.folder)
            made = layout.last_written("finetune").is_file()
            try:
                metrics = _run(config, study, layout, taken, parent)
            except UserError as error:
                study.fail(taken, str(error))
            else:
                study.tell(taken, _value(metrics, config.tune.by))
                save()
        if not made:
            return True


def work_in_processes(config: Config, base: Layout, folder: Path, parent: str | None, on_end: OnEnd) -> None:
    """As `work`, by as many processes as the configuration says, this one among them.

    They share the processor's cores, and what every trial reads, of which each first computes a part.

    Raises:
        UserError: one of them ended early; what it was at is taken up by the next call.
    """
    count = min(config.tune.workers, config.tune.trials)
    each = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // count))
    go, turns = context().Event(), Turns()
    ready = [context().Event() for _ in range(1, count)]
    with lending() as scribe:
        others = [
            context().Process(
                target=_beside,
                args=(number, config, base, folder, parent, scribe, turns, mine, go),
                daemon=True,
            )
            for number, mine in enumerate(ready, start=1)
        ]
        try:
            with threads_of_each(each):
                for process in others:
                    process.start()

            def meet() -> None:
                while not all(e.is_set() or not p.is_alive() for e, p in zip(ready, others, strict=True)):
                    time.sleep(0.05)
                go.set()

            with threads(each):
                _take_part(config, base, folder, parent, on_end, turns=turns, number=0, meet=meet)
            while alive := [process for process in others if process.is_alive()]:
                alive[0].join(timeout=1)
                on_end()
        finally:
            for process in others:
                process.kill()
    for number, process in enumerate(others, start=1):
        if process.exitcode:
            lines = _log_of(folder, number).read_text(encoding="utf-8").splitlines()
            last = lines[-1] if lines else f"status {process.exitcode}"
            raise UserError(f"a worker of the study ended early: {last}; the same command goes on")


def _beside(
    number: int,
    config: Config,
    base: Layout,
    folder: Path,
    parent: str | None,
    scribe: str,
    turns: Turns,
    ready: Event,
    go: Event,
) -> None:
    """What another process of `work_in_processes` does."""
    end_with_parent()
    borrow(scribe)
    log = os.open(_log_of(folder, number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def meet() -> None:
        ready.set()
        go.wait()

    guarded(
        lambda: _take_part(config, base, folder, parent, lambda: None, turns=turns, number=number, meet=meet)
    )


def _take_part(
    config: Config,
    base: Layout,
    folder: Path,
    parent: str | None,
    on_end: OnEnd,
    *,
    turns: Turns,
    number: int,
    meet: Callable[[], None],
) -> None:
    """Computes a part of what trials read, meets the others, then runs trials."""
    with contextlib.closing(open_study(config, base, folder)) as study, sharing(folder / FEATURES):
        compute_part(config, base, turns, number)
        meet()
        reread()
        while _one_more(study, config, base, parent):
            on_end()


def _log_of(folder: Path, number: int) -> Path:
    return folder / f"worker-{number}.log"


def _run(config: Config, study: Study, layout: Layout, taken: Taken, parent: str | None) -> dict[str, Any]:
    """The figures of the trial's run, which is made where it is not there yet."""
    values = assignments(values_of(taken.suggested, study.parameters), config)
    plain = replace(configuration.updated(config, values, source="tune"), tune=TuneConfig())
    done = layout.last_written("finetune")
    if not done.is_file():
        with (
            (taken.folder / LOG).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            runs.execute(plain, layout, ("finetune",), resume=layout.params.is_file(), parent=parent)
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
