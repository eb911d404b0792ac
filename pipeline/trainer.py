"""The one loop: a batch, a step, a record; now and then a measurement; until the budget is spent."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.objective import AnyObjective, cross_entropy
from pipeline.optimizer import BudgetSpent, Problem, Stalled, StepReport
from pipeline.registry import Spec, create, settle
from pipeline.space import Space
from pipeline.tasks.base import BatchSource, TaskModel
from pipeline.trajectory import Header, Recorder, Trajectory, machine, redo, threads

Measure = Callable[[], dict[str, float]]
"""Held-out figures at the current weights; ``loss`` is among them."""

OnMeasure = Callable[[int, dict[str, float]], None]
"""Told the forward passes made so far, and what was measured or reported."""


@dataclass(frozen=True)
class Training:
    """How to train: everything but the model and the data.

    ``defaults`` are options offered to the optimizer; ``provenance`` is the whole configuration, which the
    trajectory keeps so that the start can be rebuilt; ``code`` is the digest of each file of the user's own
    that it names.
    """

    optimizer: Spec
    space: Spec
    forward_passes: int
    evaluate_every: int
    run_seed: int
    patience: int = 0
    objective: AnyObjective = cross_entropy
    defaults: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What training came to. ``curve`` holds (forward passes, figures) pairs, the start included."""

    forward_passes: int
    seconds: float
    steps: int
    curve: list[tuple[int, dict[str, float]]]

    kept: dict[str, float] = field(default_factory=dict)
    """What was measured of the weights that training left."""


def train(
    training: Training,
    model: TaskModel,
    space: Space,
    batches: BatchSource,
    measure: Measure,
    *,
    trajectory: Path | None = None,
    resume: bool = False,
    on_step: OnMeasure | None = None,
    on_measure: OnMeasure | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Trains ``model`` in place; ``say`` is told what the optimizer chose by itself, in a line.

    With ``patience`` the weights of the best measurement are kept, and training stops after that many
    without a better one; without it, those of the last step are. With ``resume`` a run whose ``trajectory``
    was cut off goes on from it, and ends with the weights of an unbroken one, bit for bit.

    Raises:
        UserError: a budget below one step, a held-out loss that is not finite at the start, an optimizer that
            refuses the space, or a trajectory to go on from that is of another run or used gradients.
    """
    before = None
    if resume and trajectory and Trajectory.begun(trajectory):
        before = Trajectory.read(trajectory)
        if not before.steps:  # nothing is lost, and a file of one's own may have been mended
            before = None
    training = _settled(training, space, before, say)
    header = _header(training, space)
    if before:
        _warn_elsewhere(before.header.machine, header.machine)
    with threads(before.header.machine.get("threads") if before else None):
        loop = _Loop(training, model, space, measure, on_measure)
        recorder = None
        try:
            if before:
                loop.go_on_from(before, header, batches)
            if trajectory:
                recorder = Recorder(trajectory, header, go_on=before is not None)
            loop.run(batches, recorder, on_step)
            kept = loop.best.restore(loop.result.steps)
            loop.result.kept = loop.best.figures or loop.result.curve[-1][1]
            if recorder:
                recorder.end(kept, space.digest())
        finally:
            loop.engine.close()
            if recorder:
                recorder.close()
    return loop.result


def _settled(
    training: Training, space: Space, before: Trajectory | None, say: Callable[[str], None]
) -> Training:
    """``training`` with the variant that its optimizer chooses: what it was, where a run goes on.

    The choice may hang on free memory, which is another when a run goes on, or is replayed.
    """
    chosen, why = settle(training.optimizer, _problem(training, space), training.defaults)
    if before and chosen != training.optimizer:
        chosen = replace(training.optimizer, name=Spec.parse(before.header.optimizer).name)
    elif why:
        say(f"{training.optimizer} takes {chosen.name}: {why}")
    return replace(training, optimizer=chosen)


def _problem(training: Training, space: Space) -> Problem:
    return Problem(space.size, space.kind, training.forward_passes, training.run_seed, space.device)


def _warn_elsewhere(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Says what may change the last bits of a run that goes on; its number of threads is taken over."""
    changed = [
        f"{key} was {then[key]}, is {now.get(key)}"
        for key in then
        if key != "threads" and then[key] != now.get(key)
    ]
    if changed:
        text = f"the run goes on elsewhere ({'; '.join(changed)}): its last bits may differ"
        warnings.warn(text, stacklevel=3)


class _Loop:
    """The state of a run: what `train` would lose if it were killed, and the trajectory gives back."""

    def __init__(
        self,
        training: Training,
        model: TaskModel,
        space: Space,
        measure: Measure,
        on_measure: OnMeasure | None,
    ) -> None:
        self.training = training
        self.optimizer = create(training.optimizer, _problem(training, space), training.defaults)
        self.engine = Engine(model, space, training.forward_passes, training.run_seed, training.objective)
        self.best = _Best(space, training.patience)
        self.result = Result(0, 0.0, 0, [])
        self._measure = measure
        self._on_measure = on_measure
        self._started = time.perf_counter()
        self._due = 0
        self._going = True

    def go_on_from(self, before: Trajectory, header: Header, batches: BatchSource) -> None:
        """Brings everything to where ``before`` was cut off.

        Raises:
            UserError: it is of another run, or its optimizer used gradients.
        """
        then = before.header.code
        for path, digest in header.code.items():
            if then.get(path, digest) != digest:  # older runs did not note every file
                raise UserError(
                    f"{path} was changed since the run began: put it back as it was, or begin another run"
                )
        if replace(before.header, code=header.code) != header:
            raise UserError("the run to go on with was made with other parameters, data or weights")
        seconds = 0.0
        for measured, alike in itertools.groupby(before.lines, lambda line: "measured" in line):
            lines = list(alike)
            if measured:
                for line in lines:
                    self._note(line["forward_passes"], line["measured"])
                seconds = lines[-1]["seconds"]
                continue
            redo(lines, self.engine.space, self.optimizer)
            self.result.steps += len(lines)
            self.engine.forward_passes = self.result.forward_passes = lines[-1]["forward_passes"]
            for line in lines:
                self.engine.found = line.get("found", self.engine.found)
        self.engine.recall(batches(step) for step in range(self.result.steps))
        self._started -= seconds

    def run(self, batches: BatchSource, recorder: Recorder | None, on_step: OnMeasure | None) -> None:
        """Steps, and measures when due, until the budget is spent or patience is."""
        while self._going:
            if self.engine.forward_passes >= self._due:
                self._measured(recorder)
                continue
            known = self.engine.found
            evaluator = self.engine.bind(batches(self.result.steps), self.result.steps)
            ended: BudgetSpent | Stalled | None = None
            try:
                report = self.optimizer.step(evaluator)
            except (BudgetSpent, Stalled) as why:
                ended, told = why, [loss for losses in evaluator.record.losses for loss in losses]
                if isinstance(why, Stalled):
                    made = self.result.forward_passes
                    warnings.warn(f"training ends after {made:,} forward passes: {why}", stacklevel=3)
                if evaluator.record.only_moved and not evaluator.record.moves:
                    break
                report = StepReport(told[-1] if told else math.nan)  # what moved before is a step too
            self.result.steps += 1
            self.result.forward_passes = made = self.engine.forward_passes
            if recorder:
                found = None if self.engine.found == known else self.engine.found
                # of one that wrote weights in another way it is not recorded, and may be as large as they are
                state = self.optimizer.state_dict() if evaluator.record.only_moved else {}
                recorder.step(made, report, evaluator.record, state, found)
            if on_step:
                on_step(made, {"train_loss": report.loss, **report.metrics})
            if ended:
                break
        if not self.result.steps:
            raise UserError(
                f"{self.training.forward_passes} forward passes are fewer than one step of "
                f"'{self.training.optimizer}' takes; raise forward_passes"
            )
        if self.result.curve[-1][0] < self.result.forward_passes:
            self._measured(recorder)
        self.result.seconds = time.perf_counter() - self._started

    def _measured(self, recorder: Recorder | None) -> None:
        made = self.result.forward_passes
        figures = self._measure()
        if not self.result.steps and not math.isfinite(figures["loss"]):
            raise UserError(
                f"the held-out loss is {figures['loss']} before the first step: the model overflows; "
                "try dtype=float32"
            )
        if recorder:
            recorder.measurement(made, figures, time.perf_counter() - self._started)
        self._note(made, figures)

    def _note(self, made: int, figures: dict[str, float]) -> None:
        """A measurement, made now or before: it says when the next is due, and whether to go on."""
        self.result.curve.append((made, figures))
        self._due = made + max(1, self.training.evaluate_every)
        if self._on_measure:
            self._on_measure(made, figures)
        self._going = self.best.go_on(figures, self.result.steps)


class _Best:
    """Keeps the best weights measured, where there is patience to compare; otherwise nothing."""

    def __init__(self, space: Space, patience: int) -> None:
        self._space = space
        self._patience = patience
        self._loss = float("inf")
        self._step = 0
        self._worse = 0
        self._weights: list[Tensor] = []
        self.figures: dict[str, float] = {}

    def go_on(self, figures: dict[str, float], step: int) -> bool:
        if not self._patience:
            return True
        loss = figures["loss"]
        if loss < self._loss:
            self._loss, self._step, self._worse = loss, step, 0
            self.figures = figures
            self._weights = self._space.snapshot()
        else:
            self._worse += 1
        return self._worse < self._patience

    def restore(self, last_step: int) -> int:
        """Puts the best weights back, if any were kept; the step they are of."""
        if not self._weights:
            return last_step
        self._space.restore(self._weights)
        return self._step


def _header(training: Training, space: Space) -> Header:
    return Header(
        optimizer=str(training.optimizer),
        defaults=training.defaults,
        space=str(training.space),
        size=space.size,
        run_seed=training.run_seed,
        forward_passes=training.forward_passes,
        start=space.digest(),
        config=training.provenance,
        code=training.code,
        machine=machine(space.device),
    )
