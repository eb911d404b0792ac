"""Restarts with other population sizes when a run has nothing more to find."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline import noise
from pipeline.optimizer import Explicit, Problem
from plugins.cmaes.box import Box
from plugins.cmaes.options import Options
from plugins.cmaes.strategy import CMAES, population_size

SCHEMES = ("none", "ipop", "bipop")
_LARGEST = 2**9  # times the first population size
_PATH = 12  # to the seeds of this module
_SIZES, _POINTS = 0, 1

Build = Callable[[Problem, Options, Tensor | None, int], CMAES]
"""Problem, options, first mean and number of a run to its strategy."""


class Restarts:
    """An `AskTell` that begins anew whenever a stop criterion holds.

    ``ipop`` doubles λ each time (Auger & Hansen 2005, doi 10.1109/CEC.2005.1554902). ``bipop`` spends as many
    evaluations on small populations, of random size and σ, as on doubled ones (Hansen 2009,
    doi 10.1145/1570256.1570333).

    ``start`` gives each run's first mean by its number; by default the first run starts at zero and the
    others at a point drawn in the box, or, where it has no bounds, one σ around zero.
    """

    def __init__(
        self,
        scheme: str,
        build: Build,
        problem: Problem,
        options: Options,
        start: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._scheme, self._build = scheme, build
        self._problem, self._options = problem, options
        self._start = start
        self._first = population_size(problem.size, options)
        self._doubled = 0
        self._spent = {"large": 0, "small": 0}
        self._regime = "small"  # whose budget the first run counts to, as in pycma
        self._best: tuple[float, Tensor] | None = None
        self._run = self._begun(0, options)

    @property
    def name(self) -> str:
        return self._run.name

    @property
    def restarts(self) -> int:
        """How many there were."""
        return self._run._restart

    def ask(self) -> list[Explicit]:
        """As of the run that is on."""
        return self._run.ask()

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        """As of the run that is on; when it has nothing more to find, the next begins."""
        run = self._run
        run.tell(candidates, losses)
        self._spent[self._regime] += len(losses)
        if run.stopped:
            self._keep(losses)
            self._run = self._begun(self.restarts + 1, self._next())
        else:
            self._value = _value(losses)

    def recommend(self) -> Tensor:
        """The mean of the run whose last generation was the best by its median."""
        if self._best and self._best[0] < self._value:
            return self._best[1].clone()
        return self._run.recommend()

    def state_dict(self) -> dict[str, Any]:
        best = self._best and (self._best[0], self._best[1].clone())
        options = {key: getattr(self._run.options, key) for key in ("sigma", "population_size")}
        return {
            "doubled": self._doubled,
            "spent": dict(self._spent),
            "regime": self._regime,
            "best": best,
            "value": self._value,
            "options": options,
            "run": self._run.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._doubled, self._regime = state["doubled"], state["regime"]
        self._spent = dict(state["spent"])
        run = state["run"]
        self._run = self._begun(run["_restart"], replace(self._options, **state["options"]))
        self._run.load_state_dict(run)
        self._best = state["best"] and (state["best"][0], state["best"][1].clone())
        self._value = state["value"]

    def _begun(self, number: int, options: Options) -> CMAES:
        self._value = math.inf
        start = self._start(number) if self._start else self._drawn(number) if number else None
        return self._build(self._problem, options, start, number)

    def _keep(self, losses: Sequence[float]) -> None:
        value = _value(losses)
        if self._best is None or value < self._best[0]:
            self._best = value, self._run.recommend()

    def _next(self) -> Options:
        """λ and σ of the next run."""
        spent = self._spent
        if self._scheme == "bipop" and spent["small"] < spent["large"]:
            self._regime = "small"
            one, two = torch.rand(
                2, generator=self._generator(_SIZES, self.restarts), dtype=torch.float64
            ).tolist()
            room = 0.5 * 2**self._doubled
            return self._sized(room ** (one**2), self._options.sigma * 10 ** (-2 * two))
        self._regime = "large"
        self._doubled += 1
        return self._sized(min(2**self._doubled, _LARGEST), self._options.sigma)

    def _sized(self, factor: float, sigma: float) -> Options:
        count = max(2, int(self._first * factor))
        return replace(self._options, population_size=count + count % 2 * self._options.mirrored, sigma=sigma)

    def _drawn(self, number: int) -> Tensor:
        generator = self._generator(_POINTS, number)
        point = Box(self._options.lower, self._options.upper).uniform(self._problem.size, generator)
        if point is None:
            point = self._options.sigma * torch.randn(
                self._problem.size, generator=generator, dtype=torch.float64
            )
        return point

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(noise.derive(self._problem.run_seed, _PATH, purpose, number))


def largest(problem: Problem, options: Options) -> Options:
    """The options of the largest population that the budget lets a restart begin."""
    first = population_size(problem.size, options)
    doubled = min(
        first * _LARGEST, problem.forward_passes // 5
    )  # it followed some ten generations of half as many
    return replace(options, population_size=max(first, doubled - doubled % 2))


def _value(losses: Sequence[float]) -> float:
    return statistics.median(loss if math.isfinite(loss) else math.inf for loss in losses)
