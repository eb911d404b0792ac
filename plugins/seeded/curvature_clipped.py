"""Two-point SPSA that damps directions of high curvature ("1.5-SPSA", 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from plugins.seeded.base import SeededOptimizer, Settings

EXPONENT = 0.1


class CurvatureClipped(SeededOptimizer):
    """cᵢ = (L₊ − L₋) / 2ε · 1/max(1, |(L₊ − 2L₀ + L₋)/ε²|^0.1); 2n + 1 forward passes a step.

    The paper ties η = ε, which cancels ε in the step; here η is an option like any other.
    """

    centred = True
    # head: found on the validation split, see docs/log.md; the others are two-point's
    DEFAULTS: ClassVar = {
        "head": Settings(1e-2, 4e-3, 8),
        "biases": Settings(1e-2, 1e-3, 4),
        "norms": Settings(1e-2, 1e-3, 4),
        "lora": Settings(1e-2, 1e-3, 4),
        "full": Settings(1e-3, 1e-5, 4),
        "projection": Settings(1e-1, 1e-1, 4),
        "prompt": Settings(3e-1, 3.0, 4),
    }

    @property
    def passes_a_step(self) -> int:
        return 2 * self.directions + 1

    def scales(self) -> list[float]:
        return [self.epsilon, -self.epsilon]

    def slopes(self, centre: float, losses: Sequence[Sequence[float]]) -> list[float]:
        return [self._damped(centre, plus, minus) for plus, minus in losses]

    def _damped(self, centre: float, plus: float, minus: float) -> float:
        curvature = abs(plus - 2.0 * centre + minus) / self.epsilon**2
        slope = (plus - minus) / (2.0 * self.epsilon)
        damping: float = max(1.0, curvature**EXPONENT)
        return slope / damping
