"""Runs what a plan names, in processes of one thread each; what is done already stays."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from pipeline import runs
from pipeline.comparison.plan import Plan
from pipeline.config import YARDSTICK, Config
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.processes import as_done, context, end_with_parent, threads_of_each
from pipeline.registry import Spec
from pipeline.reporting.report import YARDSTICKS
from pipeline.stage import read_metrics
from pipeline.tracking.lending import borrow, lending
from pipeline.tuning.features import compute_part

LOG, ERROR = "log.txt", "error.txt"
Say = Callable[[str], None]
_for_life = contextlib.ExitStack()  # what lasts as long as the process: what nobody holds ends at once


@dataclass(frozen=True)
class Job:
    """Stages of one run; ``base`` is the run whose data and model it starts from, if any.

    It waits for the job ``after``. With ``again`` the stages are run though they were. One that ``encodes``
    first computes the features that others share: no method's seconds have them.
    """

    label: str
    config: Config
    layout: Layout
    stages: tuple[str, ...]
    base: Layout | None = None
    after: Job | None = None
    again: bool = False
    encodes: bool = False


def run_all(plan: Plan, workers: int, parent: str | None, say: Say) -> None:
    """Runs the plan: starts, then studies, then runs. A study or a run that is refused leaves its reason.

    Raises:
        UserError: a start could not be made, or a process ended early.
    """
    with _pool(workers, plan.root / "features") as pool:
        if plan.tune:
            _run(pool, studies(plan), parent, say, "tune")
        _run(pool, planned(plan), parent, say, "compare")
        _run(pool, _missing_yardsticks(plan), parent, say, "yardsticks")


def studies(plan: Plan) -> list[Job]:
    """What is run before: the seeds' starts, and each optimizer's study."""
    starts = _starts(plan)
    base, after = plan.base(plan.tuning_seed), starts[plan.tuning_seed]
    return [
        *starts.values(),
        *(
            Job(f"tuning {each}", plan.study_config(each), plan.study(each), ("tune",), base, after)
            for each in plan.optimizers
        ),
    ]


def planned(plan: Plan) -> list[Job]:
    """The runs of what was not refused when it was tuned, and the seeds' starts unless `studies` made them.

    The first run of a seed has its yardsticks, and leaves the features of its texts to the others. AdamW's
    begin before those: they take longest, and move what features would be computed from.
    """
    tuned = [each for each in plan.optimizers if not plan.tune or plan.study(each).tuned.is_file()]
    if not tuned:
        return []
    starts = {} if plan.tune else _starts(plan)
    first = {seed: _run_of(plan, tuned[0], seed, starts.get(seed), yardsticks=True) for seed in plan.seeds}
    slow = [each for each in tuned[1:] if Spec.parse(each).backend == YARDSTICK]
    others = [each for each in tuned[1:] if each not in slow]
    return [
        *starts.values(),
        *first.values(),
        *(_run_of(plan, each, seed, starts.get(seed)) for each in slow for seed in plan.seeds),
        *(_run_of(plan, each, seed, first[seed]) for seed in plan.seeds for each in others),
    ]


def failure(plan: Plan, optimizer: str, seed: int) -> str:
    """Why the run came to nothing, or the study before it; empty where it came to something."""
    for layout in (plan.study(optimizer), plan.run(optimizer, seed)):
        path = layout.root / ERROR
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return "" if plan.run(optimizer, seed).metrics.is_file() else "it has not run"


def _starts(plan: Plan) -> dict[int, Job]:
    """By seed."""
    needed = [*plan.seeds, *([plan.tuning_seed] if plan.tune else [])]
    return {
        seed: Job(f"start of seed {seed}", plan.base_config(seed), plan.base(seed), ("prepare", "pretrain"))
        for seed in needed
    }


def _run_of(plan: Plan, optimizer: str, seed: int, after: Job | None, *, yardsticks: bool = False) -> Job:
    config, layout = plan.run_config(optimizer, seed, yardsticks=yardsticks), plan.run(optimizer, seed)
    stages = ("finetune", "evaluate")
    label = f"{optimizer}, seed {seed}"
    return Job(label, config, layout, stages, plan.base(seed), after, encodes=yardsticks)


def _missing_yardsticks(plan: Plan) -> list[Job]:
    """Of the seeds whose first run was refused: another one's evaluation is made again, with them."""
    jobs = []
    for seed in plan.seeds:
        made = [each for each in plan.optimizers if not failure(plan, each, seed)]
        if not made or any(has_yardsticks(plan.run(each, seed)) for each in made):
            continue
        config, layout = plan.run_config(made[0], seed, yardsticks=True), plan.run(made[0], seed)
        jobs.append(Job(f"yardsticks of seed {seed}", config, layout, ("evaluate",), again=True))
    return jobs


def has_yardsticks(layout: Layout) -> bool:
    """Whether the run's evaluation measured them too."""
    return any(f"{each}/" in key for key in read_metrics(layout.metrics) for each in YARDSTICKS)


def _run(pool: ProcessPoolExecutor, jobs: Sequence[Job], parent: str | None, say: Say, what: str) -> None:
    """Runs the jobs; says how each ended.

    Raises:
        UserError: a start that the others need could not be made.
    """
    from tqdm import tqdm

    if not jobs:
        return
    with tqdm(total=len(jobs), desc=what, unit="run", disable=None, file=sys.stderr) as bar:
        for job, error in as_done(pool, partial(_do, parent), jobs, attrgetter("after")):
            bar.update()
            if bar.disable:
                say(f"  {job.label}: {error or 'done'}")
            if error and "prepare" in job.stages:
                raise UserError(f"{job.label}: {error}")


@contextlib.contextmanager
def _pool(workers: int, features: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, which share ``features``: more threads would give other bits."""
    with lending() as scribe, threads_of_each(1):
        pool = ProcessPoolExecutor(workers, context(), initializer=_begin, initargs=(features, scribe))
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError("a process of the comparison ended early; the same command goes on") from None
        except KeyboardInterrupt:  # they would finish what they have, and what they have taken
            for process in list(pool._processes.values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(features: Path, scribe: str) -> None:
    import torch

    from pipeline.engine.shared import sharing

    end_with_parent()
    borrow(scribe)
    torch.set_num_threads(1)
    _for_life.enter_context(sharing(features))


def _do(parent: str | None, job: Job) -> str:
    """Runs the job, or what is left of it; the reason where it is refused."""
    from pipeline.engine.shared import save

    layout = job.layout
    if job.base:
        runs.branch(job.base, layout.root)
    left = job.stages if job.again else _left(job)
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
            if job.encodes and "finetune" in left:
                compute_part(job.config, layout, itertools.count(), 0)
            runs.execute(job.config, layout, left, resume=layout.params.is_file(), parent=parent)
        except UserError as error:
            if not job.again:  # else the run itself is whole
                layout.root.mkdir(parents=True, exist_ok=True)
                (layout.root / ERROR).write_text(str(error), encoding="utf-8")
            return str(error)
        save()
    return ""


def _left(job: Job) -> tuple[str, ...]:
    """The job's stages from the first that has not written all it writes."""
    first = runs.first_unfinished(job.layout, job.config)
    return job.stages[job.stages.index(first) :] if first in job.stages else ()
