"""Simultaneous perturbation stochastic approximation, two-point (Spall 1992; MeZO, Malladi et al. 2023).

g = (L(θ + εz) − L(θ − εz)) / 2ε along each of n directions z, and θ ← θ − η (mean of g z + λθ). The learning
rate falls linearly to zero over the budget.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.errors import UserError
from pipeline.noise import DISTRIBUTIONS
from pipeline.optimizer import Evaluator, Problem, Seeded, StepReport

# (epsilon, learning_rate, directions) by space: found on the validation split, see docs/log.md
DEFAULTS = {
    "head": (1e-1, 2e-3, 16),
    "biases": (1e-2, 1e-3, 4),
    "lora": (1e-2, 1e-3, 4),
    "full": (1e-3, 1e-5, 1),
    "projection": (1e-1, 1e-1, 4),
}


class SPSA:
    """Two-point SPSA over seeded directions. Memory: nothing beyond the weights.

    Args:
        problem: the space and the budget.
        epsilon: finite-difference scale ε; 0 takes the space's default.
        learning_rate: η at the start; 0 takes the space's default.
        directions: n (the papers' q), two forward passes each; 0 takes the space's default.
        distribution: ``rademacher`` or ``gaussian``.
        weight_decay: λ, on matrices only.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        epsilon: float = 0.0,
        learning_rate: float = 0.0,
        directions: int = 0,
        distribution: str = "rademacher",
        weight_decay: float = 0.0,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise UserError(f"spsa: distribution is one of {', '.join(DISTRIBUTIONS)}, not '{distribution}'")
        if min(epsilon, learning_rate, directions, weight_decay) < 0:
            raise UserError("spsa: epsilon, learning_rate, directions and weight_decay must not be negative")
        default_epsilon, default_rate, default_directions = DEFAULTS[problem.space]
        self.epsilon = epsilon or default_epsilon
        self.learning_rate = learning_rate or default_rate
        self.directions = directions or default_directions
        self.distribution = distribution
        self.weight_decay = weight_decay
        self._run_seed = problem.run_seed
        self._steps = max(1, problem.forward_passes // (2 * self.directions))
        self._step = 0

    def step(self, evaluator: Evaluator) -> StepReport:
        """One update; 2n forward passes.

        Raises:
            UserError: a loss is not finite: the run has diverged.
        """
        first = (self._run_seed << 32) + self._step * self.directions
        seeds = range(first, first + self.directions)
        losses = evaluator.losses(
            [Seeded(seed, sign * self.epsilon, self.distribution) for seed in seeds for sign in (1.0, -1.0)]
        )
        if not all(math.isfinite(loss) for loss in losses):
            raise UserError(
                f"spsa: a loss of step {self._step} is not finite: the run has diverged; "
                f"lower learning_rate (now {self.learning_rate:g})"
            )
        projected_grads = [
            (plus - minus) / (2.0 * self.epsilon)
            for plus, minus in zip(losses[::2], losses[1::2], strict=True)
        ]
        rate = self.learning_rate * max(0.0, 1.0 - self._step / self._steps)
        evaluator.move(
            seeds,
            [-rate * g / self.directions for g in projected_grads],
            self.distribution,
            rate * self.weight_decay,
        )
        self._step += 1
        size = math.sqrt(sum(g * g for g in projected_grads) / self.directions)
        return StepReport(sum(losses) / len(losses), {"projected_grad": size, "learning_rate": rate})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
