"""Functions with a known optimum, and loops over them, for the tests of CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.optimizer import AskTell, Explicit, Problem

Objective = Callable[[Tensor], float]


def sphere(x: Tensor) -> float:
    return float(x.square().sum())


def ellipsoid(x: Tensor) -> float:
    return float((10 ** (6 * torch.arange(len(x)) / (len(x) - 1)) * x.square()).sum())


def rosenbrock(x: Tensor) -> float:
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def rastrigin(x: Tensor) -> float:
    return float(10 * len(x) + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum())


def rotated_cigar(x: Tensor) -> float:
    """One long axis among short ones, along no coordinate."""
    axis = torch.ones_like(x) / math.sqrt(len(x))
    along = x @ axis
    return float(along.square() + 1e6 * (x.square().sum() - along.square()))


def shifted(function: Objective) -> Objective:
    """Coordinates are displacements: the published x0 = 1 puts the optimum at -1."""
    return lambda x: function(x + 1)


def problem(size: int, seed: int = 0, budget: int = 10_000) -> Problem:
    return Problem(size, "projection", budget, seed)


def scored(candidates: list[Explicit], function: Objective) -> list[float]:
    return [function(candidate.coordinates.double()) for candidate in candidates]


def generations(method: AskTell, function: Objective, count: int) -> list[Tensor]:
    """Runs ``count`` generations; every candidate they asked for."""
    asked = []
    for _ in range(count):
        candidates = method.ask()
        points = [candidate.coordinates for candidate in candidates]
        method.tell(candidates, [function(point.double()) for point in points])
        asked += points
    return asked


def evaluations(method: AskTell, function: Objective, target: float, at_most: int) -> float:
    """Evaluations until a candidate is below ``target``; infinite after ``at_most``."""
    count = 0
    while count < at_most:
        candidates = method.ask()
        losses = scored(candidates, function)
        for index, loss in enumerate(losses):
            if loss < target:
                return count + index + 1
        method.tell(candidates, losses)
        count += len(losses)
    return math.inf
