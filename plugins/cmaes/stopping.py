"""When a run has nothing more to find: appendix B.3 of Hansen's tutorial (arXiv 1604.00772v2).

Each holds well before a number underflows or overflows, so they are also what keeps the arithmetic sound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TOL_FUN = 1e-12
TOL_X = 1e-12  # of the σ at the start
TOL_X_UP = 1e4
CONDITION = 1e14
STAGNATION_KEPT = 20_000  # generations


@dataclass(frozen=True)
class Scales:
    """How far a distribution reaches: what the criteria on coordinates read.

    ``deviations`` are σ √C_ii, and ``path`` σ p_c, both ``[n]``, the latter None for a variant without one.
    ``least`` and ``most`` are the roots of C's least and largest known eigenvalue. ``axis`` is σ times one
    principal axis, in turn, ``[n]``, or None where none is known.
    """

    sigma: float
    mean: Tensor
    deviations: Tensor
    path: Tensor | None
    least: float
    most: float
    axis: Tensor | None = None


class Stopping:
    """Watches one run from its start at ``sigma``."""

    def __init__(self, size: int, population_size: int, sigma: float) -> None:
        self._recent = 10 + math.ceil(30 * size / population_size)
        self._stagnant = 120 + math.ceil(30 * size / population_size)
        self._start_sigma = sigma
        self._best: list[float] = []
        self._median: list[float] = []
        self.reason = ""

    def note(self, losses: Sequence[float]) -> None:
        """Notes a generation's losses, of which those that are not finite are the worst."""
        told = [loss if math.isfinite(loss) else math.inf for loss in losses]
        self._best.append(min(told))
        self._median.append(statistics.median(told))
        del self._best[:-STAGNATION_KEPT], self._median[:-STAGNATION_KEPT]
        self.reason = self.reason or self._flat(told) or self._stagnates()

    def look(self, scales: Scales) -> None:
        """Checks the criteria on coordinates."""
        self.reason = self.reason or _collapsed(scales, self._start_sigma) or _no_effect(scales)

    def state(self) -> Any:
        return self.reason, list(self._best), list(self._median)

    def restore(self, state: Any) -> None:
        self.reason, best, median = state
        self._best, self._median = list(best), list(median)

    def _flat(self, told: list[float]) -> str:
        if len(self._best) < self._recent:
            return ""
        recent = self._best[-self._recent :]
        if min(recent) == max(recent) and math.isfinite(recent[0]):
            return f"EqualFunValues: the best loss of each of {self._recent} generations is the same"
        if max(*recent, *told) - min(*recent, *told) < TOL_FUN:
            return f"TolFun: the best losses of {self._recent} generations differ by less than {TOL_FUN:g}"
        return ""

    def _stagnates(self) -> str:
        """No fall of the best and median losses in the last fifth of the run, or 120 + 30 n/λ generations."""
        count = max(self._stagnant, len(self._best) // 5)
        if len(self._best) < self._stagnant or len(self._best) % 10:  # seldom enough to cost nothing
            return ""
        part = max(1, 3 * count // 10)
        for history in (self._best[-count:], self._median[-count:]):
            if not statistics.median(history[-part:]) >= statistics.median(history[:part]):
                return ""
        return f"Stagnation: neither the best nor the median loss has fallen in {count} generations"


def _collapsed(scales: Scales, start_sigma: float) -> str:
    reach = float(scales.deviations.max())
    if scales.path is not None:
        reach = max(reach, float(scales.path.abs().max()))
    if reach < TOL_X * start_sigma:
        return f"TolX: no coordinate moves by more than {reach:.1g}"
    if scales.sigma * scales.most > TOL_X_UP * start_sigma:
        return f"TolXUp: the distribution is {TOL_X_UP:g} times as wide as at the start; is sigma too small?"
    if scales.most**2 > CONDITION * scales.least**2:
        return f"ConditionCov: the condition number of C is above {CONDITION:g}"
    return ""


def _no_effect(scales: Scales) -> str:
    mean = scales.mean
    if scales.axis is not None and bool((mean + 0.1 * scales.axis == mean).all()):
        return "NoEffectAxis: a tenth of a principal axis no longer changes the mean"
    if bool((mean + 0.2 * scales.deviations == mean).any()):
        return "NoEffectCoord: a fifth of a coordinate's deviation no longer changes the mean"
    return ""
