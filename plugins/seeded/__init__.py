"""Methods that move along directions which seeds give: they keep no more than the weights.

``spsa``, simultaneous perturbation stochastic approximation (Spall 1992), alone is ``spsa:TwoPoint``.
``spsa:OneSided`` spends one forward pass a direction and normalises its own step; ``spsa:CurvatureClipped``
damps directions of high curvature; ``spsa:LazyLowRank`` perturbs matrices in low rank.

``es``, an evolution strategy with mirrored samples and shaped losses, alone is ``es:Gaussian``;
``es:LowRank`` draws samples of low rank, of which many share a forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.errors import UserError, unknown
from pipeline.optimizer import Problem
from pipeline.registry import Variant, options_of
from plugins.seeded.base import SeededOptimizer
from plugins.seeded.curvature_clipped import CurvatureClipped
from plugins.seeded.evolution import Evolution, LowRankEvolution
from plugins.seeded.low_rank import LazyLowRank
from plugins.seeded.one_sided import OneSided
from plugins.seeded.two_point import TwoPoint

SPSA: dict[str, type[SeededOptimizer]] = {
    "TwoPoint": TwoPoint,
    "OneSided": OneSided,
    "CurvatureClipped": CurvatureClipped,
    "LazyLowRank": LazyLowRank,
}
ES: dict[str, type[SeededOptimizer]] = {"Gaussian": Evolution, "LowRank": LowRankEvolution}


def spsa(
    problem: Problem,
    *,
    name: str = "TwoPoint",
    epsilon: float = 0.0,
    learning_rate: float = 0.0,
    directions: int = 0,
    distribution: str = "rademacher",
    schedule: str = "linear",
    weight_decay: float = 0.0,
    rank: int = 0,
    refresh: int = 0,
    momentum: float = 0.0,
) -> SeededOptimizer:
    """Builds the variant ``name``; ``rank``, ``refresh`` and ``momentum`` are of `LazyLowRank` alone.

    Raises:
        UserError: an unknown name, an option of another variant, or one out of its range.
    """
    options = {
        "epsilon": epsilon,
        "learning_rate": learning_rate,
        "directions": directions,
        "distribution": distribution,
        "schedule": schedule,
        "weight_decay": weight_decay,
    }
    return _built(
        "spsa", SPSA, name, problem, options, {"rank": rank, "refresh": refresh, "momentum": momentum}
    )


def es(
    problem: Problem,
    *,
    name: str = "Gaussian",
    sigma: float = 0.0,
    learning_rate: float = 0.0,
    population_size: int = 0,
    shaping: str = "rank",
    distribution: str = "gaussian",
    schedule: str = "linear",
    weight_decay: float = 0.0,
    rank: int = 0,
) -> SeededOptimizer:
    """Builds the variant ``name``; ``rank`` is of `LowRankEvolution` alone.

    Raises:
        UserError: an unknown name, an option of another variant, or one out of its range.
    """
    options = {
        "sigma": sigma,
        "learning_rate": learning_rate,
        "population_size": population_size,
        "shaping": shaping,
        "distribution": distribution,
        "schedule": schedule,
        "weight_decay": weight_decay,
    }
    return _built("es", ES, name, problem, options, {"rank": rank})


def _built(
    backend: str,
    variants: dict[str, type[SeededOptimizer]],
    name: str,
    problem: Problem,
    options: dict[str, Any],
    special: dict[str, Any],
) -> SeededOptimizer:
    """The variant; ``special`` are options that not all of them take, false where they are not given."""
    if name not in variants:
        raise unknown(f"variant of {backend}", name, variants)
    given = {key: value for key, value in special.items() if value}
    for key in given:
        if not _takes(variants[name], key):
            raise UserError(f"'{backend}:{name}' has no option '{key}'; a low-rank variant of {backend} has")
    return variants[name](problem, **options, **given)


SPECIAL = ("rank", "refresh", "momentum")  # options that not all variants take


def _takes(variant: type[SeededOptimizer], option: str) -> bool:
    return option not in SPECIAL or option in inspect.signature(variant).parameters


def _variants(backend: Callable[..., Any], variants: dict[str, type[SeededOptimizer]]) -> list[Variant]:
    options = options_of(backend)
    return [
        Variant(name, backend.__name__, {key: options[key] for key in options if _takes(variant, key)})
        for name, variant in variants.items()
    ]


def _defaults(
    backend: Callable[..., Any], variants: dict[str, type[SeededOptimizer]], space: str, name: str | None
) -> dict[str, float]:
    """What an option of 0 takes in a space of that kind, by its name."""
    variant = variants.get(name or "", next(iter(variants.values())))
    settings = variant.DEFAULTS.get(space)
    if settings is None:
        return {}
    if backend is spsa:
        scale, count = "epsilon", {"directions": settings.directions}
    else:  # mirrored: two samples a direction
        scale, count = "sigma", {"population_size": 2 * settings.directions}
    return {scale: settings.epsilon, "learning_rate": settings.learning_rate, **count}


# where `pipeline.registry` looks for them
spsa.variants = partial(_variants, spsa, SPSA)  # type: ignore[attr-defined]
es.variants = partial(_variants, es, ES)  # type: ignore[attr-defined]
spsa.defaults = partial(_defaults, spsa, SPSA)  # type: ignore[attr-defined]
es.defaults = partial(_defaults, es, ES)  # type: ignore[attr-defined]
