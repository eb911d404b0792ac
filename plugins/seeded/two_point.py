"""Two-point SPSA (Spall 1992; MeZO, Malladi et al. 2023, arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from plugins.seeded.base import SeededOptimizer, Settings


class TwoPoint(SeededOptimizer):
    """cᵢ = (L(θ + εzᵢ) − L(θ − εzᵢ)) / 2ε, the central difference; 2n forward passes a step."""

    # head and prompt: found on the validation split, see docs/defaults.md; the others are first guesses
    DEFAULTS: ClassVar = {
        "head": Settings(1e-2, 2e-3, 8),
        "biases": Settings(1e-2, 1e-3, 4),
        "norms": Settings(1e-2, 1e-3, 4),
        "lora": Settings(1e-2, 1e-3, 4),
        "full": Settings(1e-3, 1e-5, 1),
        "projection": Settings(1e-1, 1e-1, 4),
        "prompt": Settings(3e-1, 30.0, 4),
    }

    @property
    def passes_a_step(self) -> int:
        return 2 * self.directions

    def scales(self) -> list[float]:
        return [self.epsilon, -self.epsilon]

    def slopes(self, centre: float, losses: Sequence[Sequence[float]]) -> list[float]:
        return [(plus - minus) / (2.0 * self.epsilon) for plus, minus in losses]
