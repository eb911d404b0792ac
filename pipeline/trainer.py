"""The one loop: a batch, a step, a record; now and then a measurement; until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.engine.evaluator import BudgetSpent, Engine
from pipeline.errors import UserError
from pipeline.optimizer import Problem
from pipeline.registry import Spec, create
from pipeline.space import Space
from pipeline.tasks.base import BatchSource, TaskModel
from pipeline.trajectory import Header, Recorder

Measure = Callable[[], dict[str, float]]
"""Held-out figures at the current weights; ``loss`` is among them."""

OnMeasure = Callable[[int, dict[str, float]], None]
"""Told the forward passes made so far, and what was measured or reported."""


@dataclass(frozen=True)
class Training:
    """How to train: everything but the model and the data.

    ``defaults`` are options offered to the optimizer; ``provenance`` is the whole configuration, which the
    trajectory keeps so that the start can be rebuilt.
    """

    optimizer: Spec
    space: Spec
    forward_passes: int
    evaluate_every: int
    run_seed: int
    patience: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What training came to. ``curve`` holds (forward passes, figures) pairs, the start included."""

    forward_passes: int
    seconds: float
    steps: int
    curve: list[tuple[int, dict[str, float]]]


def train(
    training: Training,
    model: TaskModel,
    space: Space,
    batches: BatchSource,
    measure: Measure,
    *,
    trajectory: Path | None = None,
    on_step: OnMeasure | None = None,
    on_measure: OnMeasure | None = None,
) -> Result:
    """Trains ``model`` in place.

    With ``patience`` the weights of the best measurement are kept, and training stops after that many
    without a better one; without it, those of the last step are.

    Raises:
        UserError: a budget below one step, or an optimizer that refuses the space.
    """
    started = time.perf_counter()
    problem = Problem(space.size, space.kind, training.forward_passes, training.run_seed, space.device)
    optimizer = create(training.optimizer, problem, training.defaults)
    engine = Engine(model, space, training.forward_passes, training.run_seed)
    recorder = Recorder(trajectory, _header(training, space)) if trajectory else None
    best = _Best(space, training.patience)
    result = Result(0, 0.0, 0, [])

    def measured() -> bool:
        """Measures, notes, and says whether to go on."""
        figures = measure()
        result.curve.append((engine.forward_passes, figures))
        if on_measure:
            on_measure(engine.forward_passes, figures)
        return best.go_on(figures["loss"], result.steps)

    try:
        measured()
        due = training.evaluate_every
        while True:
            evaluator = engine.bind(batches(result.steps), result.steps)
            try:
                report = optimizer.step(evaluator)
            except BudgetSpent:
                break
            result.steps += 1
            result.forward_passes = engine.forward_passes
            if recorder:
                recorder.step(engine.forward_passes, report, evaluator.record.losses, evaluator.record.moves)
            if on_step:
                on_step(engine.forward_passes, {"train_loss": report.loss, **report.metrics})
            if engine.forward_passes >= due:
                due = engine.forward_passes + training.evaluate_every
                if not measured():
                    break
        if not result.steps:
            raise UserError(
                f"{training.forward_passes} forward passes are fewer than one step of "
                f"'{training.optimizer}' takes; raise forward_passes"
            )
        if result.curve[-1][0] < result.forward_passes:
            measured()
        kept = best.restore(result.steps)
        if recorder:
            recorder.end(kept, space.digest())
    finally:
        engine.close()
        if recorder:
            recorder.close()
    result.seconds = time.perf_counter() - started
    return result


class _Best:
    """Keeps the best weights measured, where there is patience to compare; otherwise nothing."""

    def __init__(self, space: Space, patience: int) -> None:
        self._space = space
        self._patience = patience
        self._loss = float("inf")
        self._step = 0
        self._worse = 0
        self._weights: list[Tensor] = []

    def go_on(self, loss: float, step: int) -> bool:
        if not self._patience:
            return True
        if loss < self._loss:
            self._loss, self._step, self._worse = loss, step, 0
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
    )
