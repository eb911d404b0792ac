"""COCO's `bbob` functions, ours beside pycma: ``bbob/<restarts>/<d>/<library>``.

The share of targets reached by 1000 d evaluations: 51 targets from 10² to 10⁻⁸ above the optimum, 24
functions, instances 1 to 5, three times. Both restart in the same way, from the same points,
uniform in ±4, with σ = 2 and the defaults of either. A row's spread is over the
instances' three times.

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
SEEDS = range(3)
TARGETS = [10 ** (2 - exponent / 5) for exponent in range(51)]
EVALUATIONS, SIGMA, REACH = 1000, 2.0, 4.0


class Function:
    """One function: how far above its optimum the best point was, of at most ``budget``."""

    def __init__(self, function: int, size: int, instance: int, seed: int) -> None:
        from cocoex.bare_problem import BareProblem

        self._problem = BareProblem("bbob", function, size, instance)
        self._optimum = self._problem.best_value()
        self.size = size
        self.seed = 1 + 1000 * seed + 100 * instance + function  # pycma takes 0 for the time of day
        self.left = EVALUATIONS * size
        self.best = math.inf

    def __call__(self, points: Any) -> list[float]:
        """The losses of points ``[n]``; those after the budget do not count."""
        losses = [float(self._problem(point)) - self._optimum for point in points]
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
        generator = torch.Generator().manual_seed(10_000 * self.seed + number)
        return REACH * (2 * torch.rand(self.size, generator=generator, dtype=torch.float64) - 1)


def ours(problem: Function, scheme: str) -> None:
    space = Problem(problem.size, "benchmark", problem.left, problem.seed)
    method = Restarts(scheme, CMA, space, Options(sigma=SIGMA, dtype="float64"), problem.start)
    while problem.going:
        candidates = method.ask()
        method.tell(candidates, problem([each.coordinates.numpy() for each in candidates]))


def pycma(problem: Function, scheme: str) -> None:
    import cma

    starts = iter(range(1000))
    options = {"verbose": -9, "maxfevals": problem.left, "ftarget": TARGETS[-1], "seed": problem.seed}
    cma.fmin2(
        lambda point: problem([point])[0],
        lambda: problem.start(next(starts)).numpy(),
        SIGMA,
        options,
        restarts=100,
        bipop=scheme == "bipop",
    )


LIBRARIES: dict[str, Callable[[Function, str], None]] = {"ours": ours, "pycma": pycma}


def share(scheme: str, size: int, library: str, device: torch.device) -> Row | None:
    """Of each instance, over all functions."""
    name = f"bbob/{scheme}/{size}/{library}"
    if importlib.util.find_spec("cocoex") is None:
        note(f"{name}: coco-experiment is not installed")
        return None
    torch.set_num_threads(1)
    shares: dict[tuple[int, int], list[float]] = {
        (instance, seed): [] for instance in INSTANCES for seed in SEEDS
    }
    for function in FUNCTIONS:
        for (instance, seed), found in shares.items():
            problem = Function(function, size, instance, seed)
            LIBRARIES[library](problem, scheme)
            found.append(problem.share)
        note(f"{name} f{function}: {statistics.mean(found[-1] for found in shares.values()):.3f}")
    each = [statistics.mean(found) for found in shares.values()]
    return Row(name, statistics.mean(each), "share", min(each), max(each), len(each))


def rows() -> dict[str, Callable[[torch.device], Row | None]]:
    """Every row's measurement, by name."""
    return {
        f"bbob/{scheme}/{size}/{library}": functools.partial(share, scheme, size, library)
        for scheme in ("ipop", "bipop")
        for size in SIZES
        for library in LIBRARIES
    }
