"""The two protocols an optimizer may fill in, and what passes between it and the engine.

Training without gradients is one loop: ask for candidate points, score them on a batch with forward passes,
tell the scores, move. An `Optimizer` owns its step and drives an `Evaluator` bound to that step's batch.
A population method fills in the smaller `AskTell` instead; `AskTellOptimizer` adapts it, once, here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """Directions that are, on every matrix, U Vᵀ / √rank; other tensors take them as they are.

    U's elements are those of the direction's seed. V's are those of ``right_seed``, which many directions may
    share; without one each direction has a V of its own.
    """

    rank: int
    right_seed: int | None = None


@dataclass(frozen=True)
class Seeded:
    """The current point plus ``scale`` times the direction of ``seed``: θ + scale · z(seed).

    ``distribution`` names the law of z: ``rademacher``, ``gaussian`` or ``sphere`` (see `pipeline.noise`);
    with ``low_rank`` (not ``sphere``) it is that of the factors' elements.
    """

    seed: int
    scale: float
    distribution: str = "rademacher"
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Move:
    """θ ← (1 − decay) θ + Σ coefficientᵢ · z(seedᵢ); the decay spares biases and norms."""

    seeds: Sequence[int]
    coefficients: Sequence[float]
    distribution: str
    decay: float = 0.0
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Explicit:
    """The start point displaced by ``coordinates``, the space's own: float32 or float64 ``[size]``."""

    coordinates: Tensor


class Drawn(Explicit):
    """An `Explicit` whose coordinates ``draw`` makes when they are read: all of a large space's do not fit.

    Each reading draws them again, so whoever scores it reads once.
    """

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        object.__setattr__(self, "draw", draw)

    @property
    def coordinates(self) -> Tensor:
        drawn: Tensor = object.__getattribute__(self, "draw")()
        return drawn


Candidate = Seeded | Explicit


@dataclass(frozen=True)
class Problem:
    """What an optimizer is told about what it searches; it never sees the model.

    ``size`` is the number of coordinates d; ``space`` its kind (``full``, ``biases``, ``norms``, ``head``,
    ``lora``, ``projection``, ``prompt``); ``forward_passes`` the whole budget; ``run_seed`` the experiment's
    seed; ``device`` is where coordinates live and where the optimizer should keep large tensors.
    """

    size: int
    space: str
    forward_passes: int
    run_seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself: ``loss`` on its batch, and scalars worth plotting."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


class BudgetSpent(Exception):
    """The next candidates would cost more forward passes than are left. Nothing was scored."""


class Stalled(Exception):
    """Nothing the optimizer tries changes the loss any more: the run ends with what it has, and says so."""


class Evaluator(Protocol):
    """Scores and moves points on one batch. Bound to a step; every forward pass is counted by its maker."""

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """The objective at each candidate, minimised, as Python floats; one forward pass each.

        Raises:
            BudgetSpent: there are not so many left. A step lets it pass, or ends with what it has.
        """
        ...

    def move(self, move: Move) -> None:
        """Makes the move."""
        ...

    def place(self, coordinates: Tensor) -> None:
        """θ ← start + coordinates (float32 ``[size]``)."""
        ...

    def gradient(self) -> tuple[float, list[Tensor]]:
        """The loss and its gradient per searched tensor, by backpropagation: counts three forward passes.

        For the yardstick only: a run that calls it cannot be replayed from scalars.
        """
        ...

    def tensors(self) -> list[Tensor]:
        """The searched tensors themselves, for a method that writes gradients steps into them."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A method that owns its step. ``state_dict`` is complete: a resumed run equals an unbroken one."""

    def step(self, evaluator: Evaluator) -> StepReport: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class AskTell(Protocol):
    """A population method over displacements from the start point, which is the zero vector.

    ``ask`` returns one or more candidates; ``tell`` gets them back with finite or ``+inf`` losses, which are
    differences from the start point's on the same batch: the start point itself has 0. ``ask`` may raise
    `Stalled`. ``recommend`` is the point the method would stop at, ``[size]``. A run that goes on, and a
    replay, tell a new instance the recorded losses again; ``state_dict`` is for whoever keeps the object.
    """

    def ask(self) -> list[Explicit]: ...

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None: ...

    def recommend(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AskTellOptimizer:
    """Turns an `AskTell` into an `Optimizer`.

    Losses of different batches cannot be compared: a method that remembers its best point would cling to the
    one that met the easiest batch. So each step scores the start point on its batch too, and tells the
    differences (common random numbers); methods that ask for few candidates hold one batch for
    ``MIN_EVALUATIONS`` of them, so that this costs at most one forward pass in seventeen. A loss that is not
    finite is told as ``+inf``, the worst rank. Where the start point's own is not, losses are told as they
    are; after ``BROKEN_STEPS`` such steps in a row the run stops.
    """

    MIN_EVALUATIONS = 16
    BROKEN_STEPS = 10

    def __init__(self, method: AskTell, problem: Problem) -> None:
        self.method = method
        self._origin = Explicit(torch.zeros(problem.size, device=problem.device))
        self._broken = 0

    def step(self, evaluator: Evaluator) -> StepReport:
        """Asks and tells until there are ``MIN_EVALUATIONS``, and moves to where the method would stop.

        Raises:
            UserError: the loss at the start point was not finite in many steps in a row.
            Stalled: the method has nothing more to try.
        """
        candidates = self._ask()
        origin, *losses = evaluator.losses([self._origin, *candidates])
        self._broken = 0 if math.isfinite(origin) else self._broken + 1
        if self._broken == self.BROKEN_STEPS:
            raise UserError(
                f"the loss at the start point was {origin} or the like in {self._broken} steps in a row: the "
                "model overflows, or the objective is broken; try dtype=float32"
            )
        origin = origin if math.isfinite(origin) else 0.0
        told = self._tell(candidates, losses, origin)
        while len(told) < self.MIN_EVALUATIONS:
            try:
                candidates = self._ask()
                losses = evaluator.losses(candidates)
            except (BudgetSpent, Stalled):  # the next step says so, if there is one
                break
            told += self._tell(candidates, losses, origin)
        evaluator.place(self.method.recommend())
        return StepReport(loss=origin + min(told), metrics={"improvement": -min(told)})

    def _ask(self) -> list[Explicit]:
        candidates = self.method.ask()
        if not isinstance(candidates, list) or not candidates:
            asked = "an empty list" if candidates == [] else f"a {type(candidates).__name__}"
            raise UserError(
                f"ask() of {type(self.method).__name__} gave {asked}; it must give a list of Explicit"
            )
        return candidates

    def _tell(self, candidates: list[Explicit], losses: Sequence[float], origin: float) -> list[float]:
        differences = [loss - origin for loss in losses]
        differences = [loss if math.isfinite(loss) else math.inf for loss in differences]
        self.method.tell(candidates, differences)
        return differences

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)
