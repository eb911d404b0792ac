"""The covariance matrix adaptation evolution strategy (Hansen 2016, arXiv 1604.00772) on torch tensors.

``cmaes:CMA`` adapts a full covariance matrix, ``cmaes:VkD`` a diagonal and a few directions, ``cmaes:SepCMA``
a diagonal, ``cmaes:LMMA`` a handful of paths. ``cmaes`` alone takes the first of them that the budget can
teach and the memory hold.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pipeline.errors import UserError, unknown
from pipeline.optimizer import Problem
from pipeline.registry import Variant, options_of
from plugins.cmaes.choice import VARIANTS
from plugins.cmaes.choice import choose as _choose
from plugins.cmaes.options import Options
from plugins.cmaes.restarts import SCHEMES, Restarts, largest
from plugins.cmaes.strategy import CMAES
from plugins.cmaes.warm_start import warmed

# head and prompt: found on the validation split, see docs/log.md; elsewhere a first guess
SIGMAS = {"head": 0.01, "prompt": 1.0}
SIGMA = 0.1


def cmaes(
    problem: Problem,
    *,
    name: str | None = None,
    sigma: float = 0.0,
    population_size: int = 0,
    mirrored: bool = False,
    orthogonal: bool = False,
    step_size: str = "csa",
    restarts: str = "none",
    lower: float = -math.inf,
    upper: float = math.inf,
    rank: int = 0,
    dtype: str = "auto",
    warm_start: str = "",
) -> CMAES | Restarts:
    """Builds a variant; the ``name`` of what it returns says which.

    Args:
        problem: the space; coordinates are displacements, so the search starts at zero.
        name: ``CMA``, ``VkD``, ``SepCMA`` or ``LMMA``; None takes what `choose` says.
        sigma: the standard deviation at the start, in every coordinate; 0 takes the space's own.
        population_size: λ, candidates a generation; 0 takes 4 + ⌊3 ln d⌋.
        mirrored: candidates in pairs z, −z.
        orthogonal: candidates of a generation orthogonal to each other.
        step_size: ``csa``, by the length of the evolution path, or ``psr``, by the population's success.
        restarts: ``none``, where a stop criterion ends the run, ``ipop`` or ``bipop``.
        lower: the least value of a coordinate.
        upper: the largest.
        rank: directions of ``VkD``, and of no other variant; 0 takes 4.
        dtype: of the state: ``float32``, ``float64``, or ``auto``, the variant's own.
        warm_start: the trajectory of an earlier run over the same space from the same start: where its better
            points lie is where the search begins.

    Raises:
        UserError: another name, or an option out of its range.
    """
    sigma = sigma or defaults(problem.space, name)["sigma"]
    options = Options(sigma, population_size, mirrored, orthogonal, step_size, lower, upper, dtype, rank)
    variant = _variant(problem, name, options)
    if restarts not in SCHEMES:
        raise unknown("restarts of cmaes", restarts, SCHEMES)

    def build(problem: Problem, options: Options, start: Tensor | None, restart: int) -> CMAES:
        method = variant(problem, options, start, restart)
        return warmed(method, problem, warm_start) if warm_start and not restart else method

    if restarts == "none":
        return build(problem, options, None, 0)
    return Restarts(restarts, build, problem, options)


def choose(problem: Problem, **options: Any) -> tuple[str, str]:
    """The variant that ``cmaes`` alone takes for ``problem``, and why."""
    return _choose(problem, _options(options))


def memory_bytes(problem: Problem, *, name: str | None = None, **options: Any) -> int:
    """Peak bytes of state, work space and candidates; allocates nothing. Raises UserError as `cmaes` does."""
    chosen = _options(options)
    variant = _variant(problem, name, chosen)
    if options.get("restarts", "none") != "none":
        chosen = largest(problem, chosen)
    return variant.memory_bytes(problem, chosen)


def variants() -> list[Variant]:
    """Each variant; ``rank`` is of `VkD` alone."""
    every = options_of(cmaes)
    own = {name: {key: every[key] for key in every if key != "rank" or name == "VkD"} for name in VARIANTS}
    return [Variant(name, "evolution strategy", options) for name, options in own.items()]


def defaults(space: str, name: str | None) -> dict[str, float]:
    """What an option of 0 takes in a space of that kind."""
    return {"sigma": SIGMAS.get(space, SIGMA)}


# where `pipeline.registry` looks for them
cmaes.memory_bytes = memory_bytes  # type: ignore[attr-defined]
cmaes.variants = variants  # type: ignore[attr-defined]
cmaes.choose = choose  # type: ignore[attr-defined]
cmaes.defaults = defaults  # type: ignore[attr-defined]


def _options(given: dict[str, Any]) -> Options:
    apart = ("restarts", "warm_start", "sigma")  # nothing of a choice, or of memory, hangs on them
    return Options(**{key: value for key, value in given.items() if key not in apart})


def _variant(problem: Problem, name: str | None, options: Options) -> type[CMAES]:
    if name is None:
        name, _ = _choose(problem, options)
    if name not in VARIANTS:
        raise unknown("variant of cmaes", name, VARIANTS)
    if options.rank and name != "VkD":
        raise UserError(f"'cmaes:{name}' has no option 'rank'; cmaes:VkD has")
    return VARIANTS[name]
