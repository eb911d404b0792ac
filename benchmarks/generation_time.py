"""A generation of our CMA-ES beside one of pycma, cmaes and evotorch: ``time/<variant>/<d>/over_<library>``.

Ratios of seconds, ours over theirs, so below 1 we are faster. A generation is sampling, handing each
candidate out once, and learning from losses drawn at random, on which no strategy converges. What is done
once in several generations is in it: the libraries take turns by blocks of as many generations as the rarest
of their decompositions needs. Population size and number type are the same on both sides: float64, and
float32 beside evotorch, which is its default. Beside LMMA, which no library has, stand their separable ones.

At 10,000 dimensions pycma takes minutes to decompose a full covariance. So its one generation is one without
it, against ours with a share of it, which is in our disfavour. cmaes and evotorch make a matrix of each
candidate there, 12 to 25 GB in all: no rows.

A library that is not installed says so and gives no row: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, interleaved, note, ratios
from pipeline.optimizer import Problem
from plugins.cmaes import cmaes
from plugins.cmaes.parameters import default_population_size

LARGEST = 10_000  # that a full covariance is tried at
VARIANTS = {"CMA": (100, 1000, LARGEST), "SepCMA": (1000, 100_000, 1_000_000), "LMMA": (100_000, 1_000_000)}
SIGMA = 0.5

Generation = Callable[[], None]
_told = itertools.count()


def over(variant: str, size: int, library: str, device: torch.device) -> Row | None:
    name = f"time/{variant}/{size}/over_{library}"
    if importlib.util.find_spec(library) is None:
        note(f"{name}: {library} is not installed")
        return None
    dtype = "float32" if library == "evotorch" else "float64"
    block, rounds = plan(variant, size)
    theirs = block
    if (variant, size) == ("CMA", LARGEST):
        theirs = 1  # minutes
    sides = {
        "ours": repeated(ours(variant, size, dtype, device), block),
        "theirs": repeated(THEIRS[library](size, separable=variant != "CMA"), theirs),
    }
    seconds = interleaved(sides, rounds, device, warm=size < LARGEST or variant != "CMA")
    each = {"ours": [s / block for s in seconds["ours"]], "theirs": [s / theirs for s in seconds["theirs"]]}
    note(f"{name}: {1e3 * min(each['ours']):.3g} ms a generation, theirs {1e3 * min(each['theirs']):.3g} ms")
    return Row.of(name, "ratio", ratios(each["ours"], each["theirs"]))


def plan(variant: str, size: int) -> tuple[int, int]:
    """Generations in a block, and blocks."""
    if variant == "CMA":
        return {100: (100, 9), 1000: (10, 5), LARGEST: (60, 1)}[size]
    return (200, 9) if size <= 1000 else (3, 5)


def repeated(generation: Generation, times: int) -> Generation:
    def run() -> None:
        for _ in range(times):
            generation()

    return run


def ours(variant: str, size: int, dtype: str, device: torch.device) -> Generation:
    problem = Problem(size, "benchmark", 10**6, 0, device)
    method = cmaes(problem, name=variant, sigma=SIGMA, dtype=dtype)

    def generation() -> None:
        candidates = method.ask()
        method.tell(candidates, [_read(each.coordinates) for each in candidates])

    return generation


def _read(point: Any) -> float:
    """A loss of a point that is there: random, and falling, or it would stop by stagnation."""
    return 0.0 * float(point[0]) + random.random() - 0.01 * next(_told)


def pycma(size: int, separable: bool) -> Generation:
    import cma

    options = {"verbose": -9, "CMA_diagonal": separable, "seed": 1, "popsize": default_population_size(size)}
    strategy = cma.CMAEvolutionStrategy([1.0] * size, SIGMA, options)

    def generation() -> None:
        candidates = strategy.ask()
        strategy.tell(candidates, [_read(each) for each in candidates])

    return generation


def cyberagent(size: int, separable: bool) -> Generation:
    import numpy
    from cmaes import CMA, SepCMA

    strategy = (SepCMA if separable else CMA)(
        mean=numpy.ones(size), sigma=SIGMA, seed=1, population_size=default_population_size(size)
    )

    def generation() -> None:
        candidates = [strategy.ask() for _ in range(strategy.population_size)]
        strategy.tell([(each, _read(each)) for each in candidates])

    return generation


def evotorch(size: int, separable: bool) -> Generation:
    import evotorch
    from evotorch.algorithms import CMAES

    problem = evotorch.Problem(
        "min",
        evotorch.decorators.vectorized(lambda points: torch.rand(len(points))),
        solution_length=size,
        initial_bounds=(1.0, 1.0),
    )
    strategy = CMAES(problem, stdev_init=SIGMA, separable=separable, popsize=default_population_size(size))
    step: Generation = strategy.step
    return step


THEIRS = {"cma": pycma, "cmaes": cyberagent, "evotorch": evotorch}


def rows() -> dict[str, Callable[[torch.device], Row | None]]:
    """Every row's measurement, by name."""
    return {
        f"time/{variant}/{size}/over_{library}": functools.partial(over, variant, size, library)
        for variant, sizes in VARIANTS.items()
        for size in sizes
        for library in THEIRS
        if (variant, size) != ("CMA", LARGEST) or library == "cma"
    }
