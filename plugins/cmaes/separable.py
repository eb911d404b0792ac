"""CMA-ES with a diagonal covariance, for spaces whose full matrix does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.strategy import CMAES, least_variance

MAX_FLOAT64_SIZE = 1_000_000


class SepCMA(CMAES):
    """sep-CMA-ES (Ros & Hansen 2008): C stays diagonal, and learns (n + 2)/3 times faster.

    Memory and time a candidate are O(n); one candidate's noise is held at a time. State is float32 above
    `MAX_FLOAT64_SIZE` coordinates. Negative weights as in `CMA`, bounded by the faster rates.
    """

    name = "SepCMA"

    @classmethod
    def memory_bytes(cls, problem: Problem, population_size: int = 0) -> int:
        """The float32 candidates, and at most twelve vectors of state and work space."""
        n = problem.size
        return n * ((population_size or default_population_size(n)) * 4 + 12 * cls._dtype(n).itemsize)

    def _parameters(self, size: int, population_size: int) -> Parameters:
        return Parameters.of(size, population_size, rate_factor=(size + 2) / 3)

    @staticmethod
    def _dtype(size: int) -> torch.dtype:
        return torch.float64 if size <= MAX_FLOAT64_SIZE else torch.float32

    def _identity(self, zeros: Tensor) -> Tensor:
        return torch.ones_like(zeros)

    def _noise(self) -> Iterator[Tensor]:
        """z of each candidate, ``[n]``; the next overwrites it, or as many buffers would fragment memory."""
        generator, z = self._rewound(), torch.empty_like(self._mean, device="cpu")
        for _ in range(self.parameters.population_size):
            yield z.normal_(generator=generator).to(self._mean.device)

    def _steps(self) -> Iterator[Tensor]:
        root = self._covariance.sqrt()
        return (z.mul_(root) for z in self._noise())

    def _rooted(self, z: Tensor) -> Tensor:
        return self._covariance.sqrt() * z

    def _outer(self, path: Tensor) -> Tensor:
        return path.square()

    def _moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        mean, squares = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        for weight, z in zip(weights.tolist(), self._noise(), strict=True):
            if weight >= 0:
                mean.add_(z, alpha=weight)
            z.square_()
            scaled = weight if weight >= 0 else weight * len(z) / float(z.sum())  # (46)
            squares.add_(z, alpha=scaled)
        return mean, squares.mul_(self._covariance)

    def _refresh(self) -> None:
        self._covariance.clamp_(min=least_variance(float(self._covariance.max())))
