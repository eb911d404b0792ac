"""What the variants share: options, seeds of their own for every step, the schedule, the divergence guard."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import Unsuitable, UserError, unknown
from pipeline.noise import DISTRIBUTIONS, LAWS
from pipeline.optimizer import Evaluator, LowRank, Move, Problem, Seeded, Stalled, StepReport

# the share of the learning rate that is left when a share of the budget is spent
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda spent: 1.0,
    "linear": lambda spent: 1.0 - spent,
    "cosine": lambda spent: 0.5 * (1.0 + math.cos(math.pi * spent)),
}
FLAT_STEPS = 10
LEAST_EPSILON = 1e-12  # no weight would feel less


@dataclass(frozen=True)
class Settings:
    """A space's perturbation scale ε, learning rate η and number of directions n."""

    epsilon: float
    learning_rate: float
    directions: int


def check_low_rank(problem: Problem, distribution: str) -> None:
    """Refuses what low-rank directions cannot be, before anything is computed.

    Raises:
        UserError: a space without matrices, or a law of whole directions.
    """
    if problem.space == "projection":
        raise UserError("the space 'projection' has no matrices for low-rank directions; choose full or lora")
    if distribution not in LAWS:
        raise UserError(f"low-rank directions are {' or '.join(LAWS)}, not {distribution}")


class SeededOptimizer(ABC):
    """θ ← θ − η(mean of cᵢ zᵢ + λθ): a variant scores points along n directions zᵢ and says their slopes cᵢ.

    Args:
        problem: the space and the budget.
        epsilon: finite-difference scale ε; 0 takes the space's default.
        learning_rate: η at the start; 0 takes the space's default.
        directions: n (the papers' q); 0 takes the space's default.
        distribution: ``rademacher``, ``gaussian`` or ``sphere``.
        schedule: how η falls over the budget: ``linear`` or ``cosine`` to zero, or ``constant``.
        weight_decay: λ, on matrices only.

    Raises:
        UserError: an option out of its range.
    """

    DEFAULTS: ClassVar[dict[str, Settings]]

    def __init__(
        self,
        problem: Problem,
        *,
        epsilon: float = 0.0,
        learning_rate: float = 0.0,
        directions: int = 0,
        distribution: str = "rademacher",
        schedule: str = "linear",
        weight_decay: float = 0.0,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise unknown("distribution", distribution, DISTRIBUTIONS)
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        if min(epsilon, learning_rate, directions, weight_decay) < 0:
            raise UserError("epsilon, sigma, learning_rate, directions and weight_decay must not be negative")
        if epsilon and epsilon < LEAST_EPSILON:
            raise UserError(f"epsilon and sigma must be at least {LEAST_EPSILON:g}, not {epsilon:g}")
        # of a plugin that knows fewer spaces
        default = self.DEFAULTS.get(problem.space)
        if default is None:
            raise Unsuitable(f"{type(self).__name__} has no defaults for the space '{problem.space}'")
        self.epsilon = epsilon or default.epsilon
        self.learning_rate = learning_rate or default.learning_rate
        self.directions = directions or default.directions
        self.distribution = distribution
        self.weight_decay = weight_decay
        self._schedule = SCHEDULES[schedule]
        self._run_seed = problem.run_seed
        if self.passes_a_step > problem.forward_passes:
            raise Unsuitable(
                f"{problem.forward_passes:,} forward passes are fewer than one step of {type(self).__name__} "
                f"takes ({self.passes_a_step:,}); raise forward_passes, or lower directions"
            )
        self._steps = problem.forward_passes // self.passes_a_step
        self._step = 0
        self._flat = 0
        self._reacted = False  # whether a loss ever depended on what was perturbed

    @property
    @abstractmethod
    def passes_a_step(self) -> int:
        """Forward passes of one step."""

    @abstractmethod
    def scales(self) -> list[float]:
        """The multiples of a direction at which each direction is scored, besides the point itself."""

    @abstractmethod
    def slopes(self, centre: float, losses: Sequence[Sequence[float]]) -> list[float]:
        """cᵢ of each direction from the loss at the point (NaN if not asked for) and along the directions."""

    def low_rank(self) -> LowRank | None:
        """What directions of this step have in common beside their law; None where they have full rank."""
        return None

    def direction(self, seeds: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
        """The direction to descend as a sum along seeds: these, unless a variant remembers others."""
        return seeds, weights

    centred: ClassVar[bool] = False
    """Whether the loss at the point itself is scored too."""

    def step(self, evaluator: Evaluator) -> StepReport:
        """One update.

        Raises:
            UserError: a loss is not finite, or none has ever reacted to what was perturbed.
            Stalled: they did, and no longer do.
        """
        first = (self._run_seed << 32) + self._step * self.directions
        seeds = range(first, first + self.directions)
        scales, law = self.scales(), (self.distribution, self.low_rank())
        candidates = [Seeded(seed, scale, *law) for seed in seeds for scale in scales]
        if self.centred:
            candidates = [Seeded(first, 0.0, *law), *candidates]
        losses = evaluator.losses(candidates)
        self._guard(losses)
        centre, along = (losses[0], losses[1:]) if self.centred else (math.nan, losses)
        grouped = [along[i : i + len(scales)] for i in range(0, len(along), len(scales))]
        slopes = self.slopes(centre, grouped)
        rate = self.learning_rate * self._schedule(min(1.0, self._step / self._steps))
        summed, weights = self.direction(list(seeds), [slope / self.directions for slope in slopes])
        moved = [-rate * weight for weight in weights]
        evaluator.move(Move(summed, moved, self.distribution, rate * self.weight_decay, law[1]))
        self._step += 1
        size = math.sqrt(sum(slope * slope for slope in slopes) / self.directions)
        loss = centre if self.centred else sum(losses) / len(losses)
        return StepReport(loss, {"projected_grad": size, "learning_rate": rate})

    def _guard(self, losses: Sequence[float]) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            if not self._step:
                raise UserError(
                    "a loss of step 0 is not finite, before anything diverged: is it the objective, or a "
                    "model that overflows? try dtype=float32"
                )
            raise UserError(
                f"a loss of step {self._step} is not finite: the run has diverged; "
                f"lower learning_rate (now {self.learning_rate:g})"
            )
        self._flat = self._flat + 1 if len(set(losses)) == 1 else 0
        self._reacted = self._reacted or not self._flat
        if self._flat >= FLAT_STEPS:
            stayed = (
                f"the loss stayed at exactly {losses[0]:g} for {FLAT_STEPS} steps, whatever was perturbed"
            )
            if self._reacted:
                raise Stalled(stayed)
            raise UserError(
                f"{stayed}: raise epsilon (now {self.epsilon:g}), or search weights that reach the loss"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "flat": self._flat, "reacted": self._reacted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._flat, self._reacted = state["step"], state["flat"], state["reacted"]
