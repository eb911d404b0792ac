"""One-sided SPSA that normalises its own step (FZOO, Dang et al., ICLR 2026)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import ClassVar

from pipeline.errors import UserError
from plugins.seeded.base import SeededOptimizer, Settings


class OneSided(SeededOptimizer):
    """cᵢ = (L(θ + εzᵢ) − L(θ)) / σ, σ the standard deviation of the n losses; n + 1 forward passes a step.

    E[σ²] = ε²‖∇L‖² to first order, so η is a length: a step moves the weights by about η√(d/n), whatever
    the gradient's size.
    """

    centred = True
    # head: found on the validation split, see docs/log.md; the others are first guesses
    DEFAULTS: ClassVar = {
        "head": Settings(1e-2, 2e-3, 8),
        "biases": Settings(1e-2, 1e-3, 8),
        "norms": Settings(1e-2, 1e-3, 8),
        "lora": Settings(1e-2, 1e-3, 8),
        "full": Settings(1e-3, 5e-5, 8),
        "projection": Settings(1e-1, 1e-2, 8),
        "prompt": Settings(3e-1, 1e-1, 8),
    }

    @property
    def passes_a_step(self) -> int:
        if self.directions < 2:
            raise UserError(f"spsa:OneSided takes at least 2 directions, not {self.directions}")
        return self.directions + 1

    def scales(self) -> list[float]:
        return [self.epsilon]

    def slopes(self, centre: float, losses: Sequence[Sequence[float]]) -> list[float]:
        along = [loss for (loss,) in losses]
        spread = statistics.stdev(along)
        if not spread:
            return [0.0] * len(along)
        return [(loss - centre) / spread for loss in along]
