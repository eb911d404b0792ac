"""Our CMA-ES as an optimizer of nevergrad: importing this module registers ``TorchCMA`` there.

nevergrad asks for one point at a time, tells losses in any order, and may tell points that were never asked
for. So λ losses, whatever they are of, make a generation, and λ is no less than the number of workers.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import nevergrad
import numpy as np
import torch
from nevergrad.optimization import base

from pipeline.optimizer import Problem
from plugins.cmaes.full import CMA
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import default_population_size


class _TorchCMA(base.Optimizer):  # type: ignore[misc]
    """Restarts from the mean with twice the population when a stop criterion holds."""

    def __init__(
        self,
        parametrization: Any,
        budget: int | None = None,
        num_workers: int = 1,
        config: TorchCMA | None = None,
    ) -> None:
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        self._config = config or TorchCMA()
        self._method: CMA | None = None
        self._waiting: deque[np.ndarray] = deque()
        self._told: list[tuple[torch.Tensor, float]] = []

    @property
    def _population_size(self) -> int:
        return self._running().parameters.population_size

    def _running(self) -> CMA:
        before = self._method
        if before is None or before.stopped:
            c = self._config
            least = max(self.num_workers, c.population_size or default_population_size(self.dimension))
            size = 2 * before.parameters.population_size if before else least
            options = Options(c.sigma, size, step_size=c.step_size, dtype="float64")
            seed = before._seed if before else int(self._rng.randint(2**31))
            problem = Problem(self.dimension, "nevergrad", self.budget or 10**6, seed)
            restart = before._restart + 1 if before else 0
            self._method = CMA(problem, options, before.recommend() if before else None, restart)
        assert self._method is not None
        return self._method

    def _internal_ask_candidate(self) -> Any:
        method = self._running()
        if not self._waiting:
            self._waiting.extend(candidate.coordinates.numpy() for candidate in method.ask())
            method.resample()
        child = self.parametrization.spawn_child()
        return child.set_standardized_data(self._waiting.popleft(), reference=self.parametrization)

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        point = candidate.get_standardized_data(reference=self.parametrization)
        self._told.append((torch.from_numpy(np.asarray(point, dtype=np.float64)), float(loss)))
        if len(self._told) >= self._population_size:
            points, losses = zip(*self._told, strict=True)
            self._running().inject(points, losses)
            self._told.clear()
            self._waiting.clear()

    def _internal_tell_not_asked(self, candidate: Any, loss: float) -> None:
        self._internal_tell_candidate(candidate, loss)


class TorchCMA(base.ConfiguredOptimizer):  # type: ignore[misc]
    """`plugins.cmaes.full.CMA` in nevergrad's standardised space: options as those of ``cmaes:CMA``."""

    def __init__(self, *, sigma: float = 1.0, population_size: int = 0, step_size: str = "psr") -> None:
        super().__init__(_TorchCMA, locals(), as_config=True)
        self.sigma, self.population_size, self.step_size = sigma, population_size, step_size


if "TorchCMA" not in nevergrad.optimizers.registry:
    TorchCMA().set_name("TorchCMA", register=True)
