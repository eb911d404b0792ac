"""Simultaneous perturbation stochastic approximation (Spall 1992), along directions that seeds give.

``spsa`` alone is ``spsa:TwoPoint``. ``spsa:OneSided`` spends one forward pass a direction and normalises its
own step; ``spsa:CurvatureClipped`` damps directions of high curvature. None keeps more than the weights.
"""

from __future__ import annotations

from pipeline.errors import unknown
from pipeline.optimizer import Problem
from plugins.spsa.base import SPSA
from plugins.spsa.curvature_clipped import CurvatureClipped
from plugins.spsa.one_sided import OneSided
from plugins.spsa.two_point import TwoPoint

VARIANTS: dict[str, type[SPSA]] = {
    "TwoPoint": TwoPoint,
    "OneSided": OneSided,
    "CurvatureClipped": CurvatureClipped,
}


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
) -> SPSA:
    """Builds the variant ``name``; the other arguments are those of `SPSA`.

    Raises:
        UserError: an unknown name, or an option out of its range.
    """
    if name not in VARIANTS:
        raise unknown("variant of spsa", name, VARIANTS)
    return VARIANTS[name](
        problem,
        epsilon=epsilon,
        learning_rate=learning_rate,
        directions=directions,
        distribution=distribution,
        schedule=schedule,
        weight_decay=weight_decay,
    )
