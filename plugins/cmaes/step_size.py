"""How σ changes from generation to generation: by the length of a path, or by the success of a population."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from plugins.cmaes.parameters import Parameters


class PathLength:
    """Cumulative step-size adaptation: σ grows when steps go one way, shrinks when they undo each other."""

    def __init__(self, parameters: Parameters, *, squared: bool = False) -> None:
        self._p = parameters
        self._squared = squared

    def growth(self, path_length: float, losses: Sequence[float]) -> float:
        """What σ is multiplied with, given ‖p_σ‖: equation (44).

        Or, ``squared``, equation 21 of algorithm 2 of Loshchilov et al. 2017 (arXiv 1705.06693).
        """
        p = self._p
        if self._squared:
            return math.exp(min(1.0, p.c_sigma / 2 * (path_length**2 / p.size - 1)))
        return math.exp(min(1.0, p.c_sigma / p.d_sigma * (path_length / p.chi_n - 1)))

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


class PopulationSuccess:
    """The population success rule (Loshchilov 2014, arXiv 1404.5520, section 3.3).

    It reads losses alone, so the candidates need not be those of one generation.
    """

    TARGET, RATE, DAMPING = 0.25, 0.3, 1.0  # z*, c_σ, d_σ

    def __init__(self) -> None:
        self._before: list[float] = []
        self._smoothed = 0.0

    def growth(self, path_length: float, losses: Sequence[float]) -> float:
        """What σ is multiplied with, given the losses of two populations in turn."""
        now = sorted(loss if math.isfinite(loss) else math.inf for loss in losses)
        if self._before:
            # how many ranks lower the newer one lies, in the mean over both orders of ties
            better = sum(_rank(self._before, loss) for loss in now) / (len(now) * len(self._before))
            self._smoothed += self.RATE * (1 - 2 * better - self.TARGET - self._smoothed)
        self._before = now
        return math.exp(self._smoothed / self.DAMPING)

    def state(self) -> Any:
        return self._smoothed, list(self._before)

    def restore(self, state: Any) -> None:
        self._smoothed, before = state
        self._before = list(before)


StepSize = PathLength | PopulationSuccess


def _rank(ascending: Sequence[float], value: float) -> float:
    """How many of ``ascending`` are less, an equal one counting half."""
    return (bisect.bisect_left(ascending, value) + bisect.bisect_right(ascending, value)) / 2
