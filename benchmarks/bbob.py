"""COCO's `bbob` functions, ours beside pycma: ``bbob/<restarts>/<d>/<library>``.

The share of targets reached by 1000 d evaluations: 51 targets from 10² to 10⁻⁸ above the optimum, 24
functions, instances 1 to 5. Both restart in the same way, from the same points,
uniform in ±4, with σ = 2 and the defaults of either. A row's spread is over the instances.

Without the package ``coco-experiment`` there are no rows: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, note
from pipeline.optimizer import Problem
from plugins.cmaes.full import CMA
from plugins.cmaes.options import Options
from plugins.cmaes.restarts import Restarts

FUNCTIONS, INSTANCES, SIZES = range(1, 25), range(1, 6), (5, 20)
TARGETS = [10 ** (2 - exponent / 5) for exponent in range(51)]
EVALUATIONS, SIGMA, REACH = 1000, 2.0, 4.0


class Problems:
    """One function: how far above its optimum the best point was, of at most ``budget``."""

    def __init__(self, function: int, size: int, instance: int) -> None:
        from cocoex.bare_problem import BareProblem

        self._problem = BareProblem("bbob", function, size, instance)
        self._optimum = self._problem.best_value()
        self.size, self.instance, self.function = size, instance, function
        self.left = EVALUATIONS * size
        self.best = math.inf

    def __call__(self, points: Any) -> list[float]:
        """The losses of points ``[k, n]``; those after the budget do not count."""
        losses = [float(loss) - self._optimum for loss in self._problem(points)]
        self.best = min([self.best, *losses[: self.left]])
        self.left = max(0, self.left - len(losses))
        return losses

    @property
    def going(self) -> bool:
        return self.left > 0 and self.best > TARGETS[-1]

    @property
    def share(self) -> float:
        """Of the targets, how many were reached."""
        return sum(self.best <= target for target in TARGETS) / len(TARGETS)

    def start(self, number: int) -> Tensor:
        """Where the run of this number among restarts begins: ``[n]``."""
        seed = 10_000 * self.function + 100 * self.instance + number
        generator = torch.Generator().manual_seed(seed)
        return REACH * (2 * torch.rand(self.size, generator=generator, dtype=torch.float64) - 1)


def ours(problem: Problems, scheme: str) -> None:
    space = Problem(problem.size, "benchmark", problem.left, problem.instance)
    method = Restarts(scheme, CMA, space, Options(sigma=SIGMA, dtype="float64"), problem.start)
    while problem.going:
        candidates = method.ask()
        method.tell(candidates, problem(torch.stack([each.coordinates for each in candidates]).numpy()))


def pycma(problem: Problems, scheme: str) -> None:
    import cma
    import numpy

    starts = iter(range(1000))
    options = {"verbose": -9, "maxfevals": problem.left, "ftarget": TARGETS[-1], "seed": problem.instance}
    cma.fmin2(
        lambda point: problem(numpy.atleast_2d(point))[0],
        lambda: problem.start(next(starts)).numpy(),
        SIGMA,
        options,
        restarts=100,
        bipop=scheme == "bipop",
    )


LIBRARIES: dict[str, Callable[[Problems, str], None]] = {"ours": ours, "pycma": pycma}


def share(scheme: str, size: int, library: str, device: torch.device) -> Row | None:
    """Of each instance, over all functions."""
    name = f"bbob/{scheme}/{size}/{library}"
    if importlib.util.find_spec("cocoex") is None:
        note(f"{name}: coco-experiment is not installed")
        return None
    torch.set_num_threads(1)
    shares: dict[int, list[float]] = {instance: [] for instance in INSTANCES}
    for function in FUNCTIONS:
        for instance in INSTANCES:
            problem = Problems(function, size, instance)
            LIBRARIES[library](problem, scheme)
            shares[instance].append(problem.share)
        found = [shares[instance][-1] for instance in INSTANCES]
        note(f"{name} f{function}: {statistics.mean(found):.3f}")
    return Row.of(name, "share", [statistics.mean(each) for each in shares.values()])


def rows() -> dict[str, Callable[[torch.device], Row | None]]:
    """Every row's measurement, by name."""
    return {
        f"bbob/{scheme}/{size}/{library}": functools.partial(share, scheme, size, library)
        for scheme in ("ipop", "bipop")
        for size in SIZES
        for library in LIBRARIES
    }
