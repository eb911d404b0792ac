"""Bounds on every coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """[lower, upper] in every coordinate; either may be infinite.

    The search goes on in the whole space, folded into the box by reflection at its bounds: inside, a point is
    itself. A candidate is never out of bounds, and no penalty has to be scaled to the loss.
    """

    lower: float
    upper: float

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` folded into the box; ``x`` itself where there is none."""
        low, high = self.lower, self.upper
        if math.isinf(low) and math.isinf(high):
            return x
        if math.isinf(high):
            return low + (x - low).abs()
        if math.isinf(low):
            return high - (high - x).abs()
        width = high - low
        folded = (x - low).remainder(2 * width)
        return (low + width - (folded - width).abs()).clamp(low, high)

    def uniform(self, size: int, generator: torch.Generator) -> Tensor | None:
        """A point drawn uniformly: float64 ``[size]``; None in a box that is not finite."""
        if math.isinf(self.lower) or math.isinf(self.upper):
            return None
        drawn = torch.rand(size, generator=generator, dtype=torch.float64)
        return self.lower + (self.upper - self.lower) * drawn
