"""The strategy parameters of CMA-ES and their defaults: Table 1 of Hansen's tutorial, arXiv 1604.00772v2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameters:
    """For ``size`` (n) coordinates and ``population_size`` (λ) candidates a generation.

    ``weights`` are in the order of rank, best first: the positive ones sum to 1, the rest are negative.
    ``chi_n`` approximates E‖N(0, I)‖.
    """

    size: int
    population_size: int
    weights: tuple[float, ...]
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    chi_n: float

    @classmethod
    def of(cls, size: int, population_size: int, rate_factor: float = 1.0) -> Parameters:
        """The defaults; ``rate_factor`` multiplies c_1 and c_μ before their sum is held to 1."""
        n = size
        raw = [math.log((population_size + 1) / 2) - math.log(i + 1) for i in range(population_size)]  # (49)
        mu_eff = _mu_eff([w for w in raw if w > 0])  # (8)
        c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # (55)
        c_1 = rate_factor * 2 / ((n + 1.3) ** 2 + mu_eff)  # (57)
        c_mu = rate_factor * 2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff)  # (58)
        c_mu = min(1 - c_1, c_mu)
        return cls(
            size=n,
            population_size=population_size,
            weights=_weights(raw, n, mu_eff, c_1, c_mu),
            mu_eff=mu_eff,
            c_sigma=c_sigma,
            d_sigma=1 + 2 * max(0.0, _crowding(n) * math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma,  # (55)
            c_c=(4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n),  # (56)
            c_1=c_1,
            c_mu=c_mu,
            chi_n=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2)),
        )


def default_population_size(size: int) -> int:
    """λ = 4 + ⌊3 ln n⌋ (48)."""
    return 4 + math.floor(3 * math.log(size))


def _crowding(n: int) -> float:
    """How much sooner than in (55) a large population damps σ.

    pycma (4.5) has it so: else σ of a population that restarts have doubled falls before a plateau is left.
    In few dimensions it is not needed and only slows (docs/log.md). Default populations never feel it.
    """
    return 1.0 if n <= 10 else 3 * (1 - 0.5 ** (n / 9))


def _mu_eff(weights: Sequence[float]) -> float:
    return sum(weights) ** 2 / sum(w * w for w in weights)


def _weights(raw: Sequence[float], n: int, mu_eff: float, c_1: float, c_mu: float) -> tuple[float, ...]:
    """Recombination weights (53). The bound (52) on the negative ones keeps C positive definite."""
    positive = sum(w for w in raw if w > 0)
    negative = [w for w in raw if w < 0]
    bound = min(
        1 + c_1 / c_mu,  # (50)
        1 + 2 * _mu_eff(negative) / (mu_eff + 2),  # (51)
        (1 - c_1 - c_mu) / (n * c_mu),  # (52)
    )
    return tuple(w / positive if w >= 0 else -bound * w / sum(negative) for w in raw)
