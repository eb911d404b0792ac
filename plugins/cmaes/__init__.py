"""The covariance matrix adaptation evolution strategy (Hansen 2016, arXiv 1604.00772) on torch tensors.

``cmaes:CMA`` adapts a full covariance matrix, ``cmaes:SepCMA`` its diagonal (Ros & Hansen 2008); ``cmaes``
alone takes the first where it is quick and the second elsewhere.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import unknown
from pipeline.optimizer import Problem
from pipeline.registry import Variant, options_of
from plugins.cmaes.full import CMA
from plugins.cmaes.separable import SepCMA
from plugins.cmaes.strategy import CMAES

VARIANTS: dict[str, type[CMAES]] = {"CMA": CMA, "SepCMA": SepCMA}
FULL_UP_TO = 1000  # coordinates; an eigendecomposition of this size takes some tenths of a second


def cmaes(
    problem: Problem, *, name: str | None = None, sigma: float = 0.1, population_size: int = 0
) -> CMAES:
    """Builds ``CMA`` or ``SepCMA``; the ``name`` of what it returns says which.

    Args:
        problem: the space; coordinates are displacements, so the search starts at zero.
        name: ``CMA`` or ``SepCMA``; None takes ``CMA`` for at most `FULL_UP_TO` coordinates.
        sigma: the standard deviation at the start, in every coordinate.
        population_size: λ, candidates a generation; 0 takes 4 + ⌊3 ln d⌋.

    Raises:
        UserError: another name, or an option out of its range.
    """
    return _variant(problem, name)(problem, sigma=sigma, population_size=population_size)


def memory_bytes(
    problem: Problem, *, name: str | None = None, population_size: int = 0, **options: Any
) -> int:
    """Peak bytes of state, work space and candidates; allocates nothing. Raises UserError as `cmaes` does."""
    return _variant(problem, name).memory_bytes(problem, population_size)


def variants() -> list[Variant]:
    """Each variant; their options are the same."""
    return [Variant(name, "evolution strategy", options_of(cmaes)) for name in VARIANTS]


# where `pipeline.registry` looks for them
cmaes.memory_bytes = memory_bytes  # type: ignore[attr-defined]
cmaes.variants = variants  # type: ignore[attr-defined]


def _variant(problem: Problem, name: str | None) -> type[CMAES]:
    if name is None:
        return CMA if problem.size <= FULL_UP_TO else SepCMA
    if name not in VARIANTS:
        raise unknown("variant of cmaes", name, VARIANTS)
    return VARIANTS[name]
