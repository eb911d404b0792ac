"""Runs what a plan names, in processes of one thread each; what is done already stays."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pipeline import runs
from pipeline.comparison.plan import Plan
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.processes import context, end_with_parent, threads_of_each

LOG, ERROR = "log.txt", "error.txt"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Stages of one run; ``base`` is the run whose data and model it starts from, if any."""

    label: str
    config: Config
    layout: Layout
    stages: tuple[str, ...]
    base: Layout | None = None


def run_all(plan: Plan, workers: int, parent: str | None, say: Say) -> None:
    """Runs the plan: starts, then studies, then runs. A run that is refused leaves its reason.

    Raises:
        UserError: a start or a study could not be made, or a process ended early.
    """
    with _pool(workers) as pool:
        _run(pool, _starts(plan), parent, say, "start", stop=True)
        if plan.tune:
            _run(pool, _studies(plan), parent, say, "tune", stop=True)
        _run(pool, _runs(plan), parent, say, "compare", stop=False)


def failure(layout: Layout) -> str:
    """Why the run came to nothing; empty where it came to something."""
    path = layout.root / ERROR
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _starts(plan: Plan) -> list[Job]:
    needed = [*plan.seeds, *([plan.tuning_seed] if plan.tune else [])]
    return [
        Job(f"start of seed {seed}", plan.base_config(seed), plan.base(seed), ("prepare", "pretrain"))
        for seed in needed
    ]


def _studies(plan: Plan) -> list[Job]:
    base = plan.base(plan.tuning_seed)
    return [
        Job(f"tuning {each}", plan.study_config(each), plan.study(each), ("tune",), base)
        for each in plan.optimizers
    ]


def _runs(plan: Plan) -> list[Job]:
    """Seed by seed: runs of one seed share the features of its texts."""
    stages = ("tune", "finetune", "evaluate")
    return [
        Job(
            f"{each}, seed {seed}", plan.run_config(each, seed), plan.run(each, seed), stages, plan.base(seed)
        )
        for seed in plan.seeds
        for each in plan.optimizers
    ]


def _run(
    pool: ProcessPoolExecutor, jobs: Sequence[Job], parent: str | None, say: Say, what: str, *, stop: bool
) -> None:
    from tqdm import tqdm

    waiting = {pool.submit(_do, job, parent): job for job in jobs}
    with tqdm(total=len(jobs), desc=what, unit="run", disable=None, file=sys.stderr) as bar:
        for future in as_completed(waiting):
            job, error = waiting[future], future.result()
            bar.update()
            if bar.disable:
                say(f"  {job.label}: {error or 'done'}")
            if error and stop:
                raise UserError(f"{job.label}: {error}")


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each: more threads would give other bits."""
    with threads_of_each(1):
        pool = ProcessPoolExecutor(workers, context(), initializer=_begin)
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError("a process of the comparison ended early; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    import torch

    from pipeline.engine.shared import sharing

    end_with_parent()
    torch.set_num_threads(1)
    contextlib.ExitStack().enter_context(sharing())  # for as long as the process lives


def _do(job: Job, parent: str | None) -> str:
    """Runs the job, or what is left of it; the reason where it is refused."""
    layout = job.layout
    if job.base:
        runs.branch(job.base, layout.root)
    left = _left(job)
    if not left:
        return ""
    (layout.root / ERROR).unlink(missing_ok=True)
    layout.root.mkdir(parents=True, exist_ok=True)
    with (
        (layout.root / LOG).open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            runs.execute(job.config, layout, left, resume=runs.goes_on(layout, job.config), parent=parent)
        except UserError as error:
            layout.root.mkdir(parents=True, exist_ok=True)
            (layout.root / ERROR).write_text(str(error), encoding="utf-8")
            return str(error)
    return ""


def _left(job: Job) -> tuple[str, ...]:
    """The job's stages from the first that has not written all it writes."""
    first = runs.first_unfinished(job.layout, job.config)
    return job.stages[job.stages.index(first) :] if first in job.stages else ()
