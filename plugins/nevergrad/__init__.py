"""Any of nevergrad's optimizers, as ``nevergrad:<Name>``.

nevergrad offers no state to save but a pickle of itself. An optimizer is a function of its seed and of the
losses it was told, though, so those losses are its state here, and loading them asks and tells again. To make
that hold, whatever nevergrad draws from numpy's global generator comes from a private state that is put in
place for the length of a call: see `enclosure`, which also mends a few habits of the libraries below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import Explicit, Problem
from pipeline.registry import Variant
from plugins.nevergrad.catalogue import configured, every_variant, limit, lookup, memory_bytes
from plugins.nevergrad.enclosure import Enclosure, one_at_a_time

# told in place of a loss that is not finite: nevergrad would accept −inf as the best
WORST_LOSS = 1e10
# asks beyond the budget: some names raise when it is exceeded, and a step may ask more than it can score
SLACK = 16


class Nevergrad:
    """An `AskTell` over one optimizer of nevergrad's registry.

    Args:
        problem: the space; the search starts at the zero vector.
        name: a name of the registry, such as ``OnePlusOne``.
        sigma: the standard deviation that nevergrad takes as its unit of length.
        num_workers: candidates an ask, made without knowing each other's losses.
        options: of the optimizer's own configuration, such as ``popsize`` for ``DE``.

    Raises:
        UserError: no name or an unknown one, an option that it has not or that is out of range, or a library
            it needs that is not installed.
    """

    in_host_memory = True

    def __init__(
        self,
        problem: Problem,
        *,
        name: str | None = None,
        sigma: float = 0.1,
        num_workers: int = 1,
        **options: Any,
    ) -> None:
        if not 0 < sigma < math.inf:
            raise UserError(f"nevergrad: sigma must be positive and finite, not {sigma:g}")
        if num_workers < 1:
            raise UserError(f"nevergrad: num_workers must be at least 1, not {num_workers}")
        self.name, factory = lookup(name)
        if factory.no_parallelization and num_workers > 1:
            raise one_at_a_time(self.name)
        self._factory = configured(self.name, factory, options)
        if (needed := limit(self.name, factory)).startswith("needs"):  # before a run has computed anything
            raise UserError(f"nevergrad:{self.name} {needed}; install it or choose another optimizer")
        self._problem, self._sigma, self._num_workers = problem, sigma, num_workers
        self._start()

    def ask(self) -> list[Explicit]:
        """``num_workers`` candidates, float32 ``[size]`` on the problem's device; the same until told.

        Raises:
            UserError: the optimizer failed.
        """
        with self._enclosure.entered():
            while len(self._asked) < self._num_workers:
                self._asked.append(self._optimizer.ask())
        return [Explicit(self._tensor(parameter.value)) for parameter in self._asked]

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        """Tells the losses of the candidates just asked, in that order; one that is not finite as the worst.

        Raises:
            UserError: the optimizer failed.
            ValueError: not as many candidates and losses as were asked.
        """
        if not len(candidates) == len(losses) == len(self._asked):
            raise ValueError(
                f"{len(self._asked)} candidates asked, {len(losses)} losses of {len(candidates)} told"
            )
        told = [min(float(loss), WORST_LOSS) if math.isfinite(loss) else WORST_LOSS for loss in losses]
        with self._enclosure.entered():
            for parameter, loss in zip(self._asked, told, strict=True):
                self._optimizer.tell(parameter, loss)
        self._asked.clear()
        self._told.append(told)

    def recommend(self) -> Tensor:
        """The point that the optimizer would stop at, or the start before any tell: float32 ``[size]``."""
        if not self._told:
            return torch.zeros(self._problem.size, device=self._problem.device)
        with self._enclosure.visited():
            return self._tensor(self._optimizer.provide_recommendation().value)

    def state_dict(self) -> dict[str, Any]:
        """The losses told, a list for each tell: plain data, a few bytes an evaluation."""
        return {"losses": [list(losses) for losses in self._told]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts again and tells the losses again, which takes as long as the optimizer itself did."""
        self._start()
        for losses in state["losses"]:
            self.tell(self.ask(), losses)

    @staticmethod
    def variants() -> list[Variant]:
        """Every name of the registry, by family and name, with its options and what keeps it from running.

        Names that choose others by dimension and budget may still meet one that misses its package.
        """
        return every_variant()

    @staticmethod
    def memory_bytes(problem: Problem, *, name: str | None = None, **options: Any) -> int:
        """A coarse bound of what the optimizer holds, by its name; raises UserError for an unknown one."""
        return memory_bytes(lookup(name)[0], problem)

    def _start(self) -> None:
        """The optimizer as new."""
        import nevergrad

        self._told: list[list[float]] = []
        self._asked: list[Any] = []
        parametrization = nevergrad.p.Array(init=np.zeros(self._problem.size)).set_mutation(sigma=self._sigma)
        parametrization.random_state = np.random.RandomState(_seed(self._problem, 0))
        self._enclosure = Enclosure(self.name, _seed(self._problem, 1), parametrization.random_state)
        budget = self._problem.forward_passes + self._num_workers + SLACK
        with self._enclosure.entered():
            self._optimizer = self._factory(parametrization, budget=budget, num_workers=self._num_workers)

    def _tensor(self, value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self._problem.device)


def _seed(problem: Problem, purpose: int) -> int:
    """32 bits, as much as numpy's legacy generator takes."""
    return int(np.random.SeedSequence([problem.run_seed, purpose]).generate_state(1)[0])
