"""Two-point SPSA along low-rank directions whose right factor stays for a while (LOZO, Chen et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

from pipeline.errors import UserError
from pipeline.noise import derive
from pipeline.optimizer import LowRank, Problem
from plugins.seeded.base import Settings, check_low_rank
from plugins.seeded.two_point import TwoPoint

_RIGHT = 8  # the path to the seeds of V
_FORGOTTEN = 1e-3  # a share of momentum below which a step is left out


class LazyLowRank(TwoPoint):
    """z = U Vᵀ/√r on matrices: U is fresh each step, V is kept for ν steps (arXiv 2410.07698).

    While V stays, the sum of steps c U Vᵀ is (Σ c U) Vᵀ: momentum M ← β M + (1 − β) c U lives in the small
    factor. It is kept as the seeds and slopes that make it up, and starts anew with each V; the paper
    projects it onto the new V, which keeps 1/√n of it.

    Args:
        rank: r; 0 takes 2.
        refresh: ν, the steps that V is kept; 0 takes 50.
        momentum: β; 0 is LOZO, 0.9 the paper's LOZO-M.
    """

    # two-point's, not tuned on their own
    DEFAULTS: ClassVar = {**TwoPoint.DEFAULTS, "full": Settings(1e-3, 1e-5, 1)}

    def __init__(
        self, problem: Problem, *, rank: int = 0, refresh: int = 0, momentum: float = 0.0, **options: Any
    ) -> None:
        if min(rank, refresh) < 0 or not 0.0 <= momentum < 1.0:
            raise UserError(
                "spsa:LazyLowRank: rank and refresh must not be negative, momentum is in [0, 1): "
                f"rank={rank}, refresh={refresh}, momentum={momentum:g}"
            )
        super().__init__(problem, **options)
        check_low_rank(problem, self.distribution)
        self._rank = rank or 2
        self._refresh = refresh or 50
        self._momentum = momentum
        self._past: list[tuple[int, float]] = []  # seeds and weights that make up the momentum

    def low_rank(self) -> LowRank:
        return LowRank(self._rank, derive(self._run_seed, _RIGHT, self._step // self._refresh))

    def direction(self, seeds: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
        if not self._momentum:
            return seeds, weights
        past = [] if self._step % self._refresh == 0 else self._past
        largest = max((abs(weight) for _, weight in past), default=0.0)
        kept = [(seed, self._momentum * weight) for seed, weight in past]
        kept = [(seed, weight) for seed, weight in kept if abs(weight) > _FORGOTTEN * largest]
        self._past = kept + [(s, (1.0 - self._momentum) * w) for s, w in zip(seeds, weights, strict=True)]
        return [seed for seed, _ in self._past], [weight for _, weight in self._past]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"past": list(self._past)} if self._momentum else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._past = [(seed, weight) for seed, weight in state.get("past", [])]
