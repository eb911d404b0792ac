"""A problem with a known optimum that takes the whole path of a real one: model, space, engine, trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import space as spaces
from pipeline.engine.evaluator import Engine
from pipeline.optimizer import (
    BudgetSpent,
    Candidate,
    Evaluator,
    Move,
    Optimizer,
    Problem,
    Stalled,
    StepReport,
)
from pipeline.registry import Spec, create
from pipeline.tasks.base import Batch, TaskModel
from pipeline.trainer import Result, Training, train

OPTIMUM, CONDITION = 0.5, 4.0  # each weight of the optimum is ± this; curvatures go from 1 to that
BATCH = Batch(
    {"input_ids": torch.zeros(1, 1, dtype=torch.long)}, torch.zeros(1, dtype=torch.long), None, (0,)
)


class Weights(TaskModel):
    """A model whose logits are its ``dimension`` weights, which start at zero."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        # on no device: its own initial values would be drawn from the global generator
        self.weights = nn.Linear(1, dimension, bias=False, device="meta").to_empty(device="cpu")
        nn.init.zeros_(self.weights.weight)

    def features(self, batch: Batch) -> Tensor:
        return torch.ones(len(batch.targets), 1, device=self.weights.weight.device)

    def outputs(self, features: Tensor) -> Tensor:
        logits: Tensor = self.weights(features)
        return logits


def quadratic(logits: Tensor, targets: Tensor) -> Tensor:
    """½ Σ kᵢ (wᵢ − oᵢ)² over logits ``[…, 1, dimension]``, an `Objective`."""
    dimension = logits.shape[-1]
    optimum = torch.full((dimension,), OPTIMUM, device=logits.device)
    optimum[1::2] *= -1
    curvature = torch.logspace(0, math.log10(CONDITION), dimension, device=logits.device)
    return 0.5 * (curvature * (logits - optimum).square()).sum(-1).squeeze(-1)


class Watched:
    """An `Evaluator` that looks at what passes: it counts, and may answer with losses that are not finite.

    ``before`` is how many forward passes came before, ``passes`` how many since, by what was asked;
    ``altered`` tells of candidates or losses that the optimizer wrote into after it gave or got them.
    """

    def __init__(self, inner: Evaluator, before: int, broken: Sequence[float] = ()) -> None:
        self._inner = inner
        self._before = before
        self._broken = broken
        self.passes = 0
        self._seen: list[tuple[Any, Any]] = []

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        found = self._inner.losses(candidates)
        found = [self._answer(self._before + self.passes + i, loss) for i, loss in enumerate(found)]
        self.passes += len(candidates)
        for candidate in candidates:
            coordinates = getattr(candidate, "coordinates", None)
            if coordinates is not None:
                self._seen.append((coordinates, coordinates.clone()))
        self._seen.append((found, list(found)))
        return found

    def _answer(self, number: int, loss: float) -> float:
        """What the optimizer is told of its evaluation of that number."""
        third, rest = divmod(number, 3)
        return self._broken[third % len(self._broken)] if self._broken and rest == 1 else loss

    @property
    def altered(self) -> bool:
        return any(
            not torch.equal(now, then) if isinstance(now, Tensor) else repr(now) != repr(then)
            for now, then in self._seen
        )

    def move(self, move: Move) -> None:
        self._inner.move(move)

    def place(self, coordinates: Tensor) -> None:
        self._inner.place(coordinates)

    def gradient(self) -> tuple[float, list[Tensor]]:
        loss, gradients = self._inner.gradient()
        answer = self._answer((self._before + self.passes) // 3, loss)
        self.passes += 3
        return answer, gradients if answer == loss else [g * math.nan for g in gradients]

    def tensors(self) -> list[Tensor]:
        return self._inner.tensors()


class Run:
    """An optimizer at work on the quadratic, step by step.

    ``broken`` are losses that every third candidate is answered with in turn.
    """

    def __init__(
        self, spec: str, dimension: int, budget: int, seed: int = 0, broken: Sequence[float] = ()
    ) -> None:
        self.model = Weights(dimension)
        self.space = spaces.build(spaces.parse("full"), self.model, seed)
        self.space.place(torch.zeros(dimension))  # coordinates displace from here, whatever is restored
        self.engine = Engine(self.model, self.space, budget, seed, quadratic)
        self.problem = Problem(dimension, "full", budget, seed, self.space.device)
        self.optimizer: Optimizer = create(Spec.parse(spec), self.problem)
        self.passes = 0
        self.altered = False
        self._broken = broken
        self._steps = 0

    def step(self) -> StepReport:
        evaluator = Watched(self.engine.bind(BATCH, self._steps), self.passes, self._broken)
        try:
            return self.optimizer.step(evaluator)
        finally:
            self._steps += 1
            self.passes += evaluator.passes
            self.altered = self.altered or evaluator.altered

    def steps(self, count: int) -> list[StepReport]:
        """So many steps, or fewer when the budget is spent or the method has nothing more to find."""
        reports = []
        for _ in range(count):
            try:
                reports.append(self.step())
            except (BudgetSpent, Stalled):
                break
        return reports

    @property
    def weights(self) -> Tensor:
        weights: Tensor = self.model.weights.weight
        return weights.detach().flatten()

    @property
    def loss(self) -> float:
        return float(quadratic(self.weights[None], BATCH.targets))


def trained(
    spec: str, dimension: int, budget: int, trajectory: Path | None = None, *, resume: bool = False
) -> tuple[Run, Result]:
    """A whole run by the trainer, with a trajectory if asked for; a method may end it before its budget."""
    run = Run(spec, dimension, budget)
    run.engine.close()  # the trainer makes its own
    training = Training(
        Spec.parse(spec), spaces.parse("full"), budget, max(1, budget // 4), 0, objective=quadratic
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training ends after")
        result = train(
            training,
            run.model,
            run.space,
            lambda step: BATCH,
            lambda: {"loss": run.loss},
            trajectory=trajectory,
            resume=resume,
        )
    return run, result
