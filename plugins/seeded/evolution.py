"""Evolution strategies with mirrored Gaussian samples and shaped losses: of full and of low rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pipeline.errors import UserError, unknown
from pipeline.optimizer import LowRank, Problem
from plugins.seeded.base import SeededOptimizer, Settings, check_low_rank


def ranks(losses: Sequence[float]) -> list[float]:
    """Each loss's rank, from −0.5 for the least to 0.5 (Salimans et al. 2017); equal ones share theirs."""
    order = sorted(losses)
    most = max(1, len(losses) - 1)
    middle = {
        loss: (order.index(loss) + len(order) - 1 - order[::-1].index(loss)) / 2 for loss in set(losses)
    }
    return [middle[loss] / most - 0.5 for loss in losses]


def z_scores(losses: Sequence[float]) -> list[float]:
    """Losses in standard deviations from their mean (Qiu et al. 2025, arXiv 2509.24372)."""
    mean, spread = statistics.fmean(losses), statistics.pstdev(losses)
    return [(loss - mean) / spread if spread else 0.0 for loss in losses]


SHAPINGS: dict[str, Callable[[Sequence[float]], list[float]]] = {"rank": ranks, "z_score": z_scores}


class Evolution(SeededOptimizer):
    """θ ← θ − (η/N) Σ s(lᵢ) εᵢ over N candidates θ ± σ ε, half of them mirrored; s shapes the losses.

    What is shaped has no unit, so η is a length: the size of a step does not follow the gradient's.

    Args:
        sigma: σ, the standard deviation of the search distribution; 0 takes the space's default.
        population_size: N, even; 0 takes the space's default.
        shaping: ``rank`` or ``z_score``.
    """

    # head: found on the validation split, see docs/log.md; the others are first guesses by the units of the
    # step; arXiv 2509.24372 has σ = 1e-3, N = 30, η = σ/2 for whole models
    DEFAULTS: ClassVar = {
        "head": Settings(1e-2, 5e-3, 4),
        "biases": Settings(1e-2, 2e-3, 8),
        "norms": Settings(1e-2, 2e-3, 8),
        "lora": Settings(1e-2, 2e-3, 8),
        "full": Settings(1e-3, 1e-4, 8),
        "projection": Settings(1e-1, 2e-2, 8),
        "prompt": Settings(3e-1, 1e-1, 8),
    }

    def __init__(
        self,
        problem: Problem,
        *,
        sigma: float = 0.0,
        population_size: int = 0,
        shaping: str = "rank",
        **options: Any,
    ) -> None:
        if population_size % 2 or population_size < 0:
            raise UserError(
                f"es: population_size is even, for each candidate has a mirror; not {population_size}"
            )
        if shaping not in SHAPINGS:
            raise unknown("shaping", shaping, SHAPINGS)
        super().__init__(problem, epsilon=sigma, directions=population_size // 2, **options)
        self._shaping = SHAPINGS[shaping]

    @property
    def passes_a_step(self) -> int:
        return 2 * self.directions

    def scales(self) -> list[float]:
        return [self.epsilon, -self.epsilon]

    def slopes(self, centre: float, losses: Sequence[Sequence[float]]) -> list[float]:
        shaped = self._shaping([loss for pair in losses for loss in pair])
        return [(plus - minus) / 2.0 for plus, minus in zip(shaped[::2], shaped[1::2], strict=True)]


class LowRankEvolution(Evolution):
    """The same with εᵢ = Aᵢ Bᵢᵀ/√r on matrices (EGGROLL, arXiv 2511.16652): many share a forward pass.

    Args:
        rank: r; 0 takes 1.
    """

    def __init__(self, problem: Problem, *, rank: int = 0, **options: Any) -> None:
        if rank < 0:
            raise UserError(f"es:LowRank: rank must not be negative, not {rank}")
        super().__init__(problem, **options)
        check_low_rank(problem, self.distribution)
        self._rank = rank or 1

    def low_rank(self) -> LowRank:
        return LowRank(self._rank)
