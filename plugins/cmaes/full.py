"""CMA-ES with a full covariance matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.strategy import CMAES, least_variance


class CMA(CMAES):
    """Active CMA-ES (Hansen 2016, arXiv 1604.00772v2) with rank-one, rank-μ and negative updates.

    Memory is O(n²), time a candidate O(n²): the eigendecomposition is made every few generations only.
    """

    name = "CMA"

    def __init__(self, problem: Problem, *, sigma: float = 0.1, population_size: int = 0) -> None:
        super().__init__(problem, sigma=sigma, population_size=population_size)
        self._root = self._covariance.clone()
        p = self.parameters
        self._root_every = max(1, int(1 / (10 * p.size * (p.c_1 + p.c_mu))))  # appendix B.2

    @classmethod
    def memory_bytes(cls, problem: Problem, population_size: int = 0) -> int:
        """Eight float64 matrices: C, C^½, the rank-μ term, and what the eigensolver takes."""
        n = problem.size
        noise = (population_size or default_population_size(n)) * n * 8 * 4
        return 8 * 8 * n * n + noise

    def _parameters(self, size: int, population_size: int) -> Parameters:
        return Parameters.of(size, population_size)

    @staticmethod
    def _dtype(size: int) -> torch.dtype:
        return torch.float64

    def _identity(self, zeros: Tensor) -> Tensor:
        return torch.eye(len(zeros), dtype=zeros.dtype, device=zeros.device)

    def _noise(self) -> Tensor:
        """z of each candidate, ``[λ, n]``."""
        shape = (self.parameters.population_size, self.parameters.size)
        z = torch.randn(shape, generator=self._rewound(), dtype=self._mean.dtype)
        return z.to(self._mean.device)

    def _steps(self) -> Iterable[Tensor]:
        return self._rooted(self._noise()).unbind()

    def _rooted(self, z: Tensor) -> Tensor:
        return z @ self._root  # symmetric, so rows are as good as columns

    def _outer(self, path: Tensor) -> Tensor:
        return torch.outer(path, path)

    def _moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        z = self._noise()
        y = self._rooted(z)
        scaled = torch.where(weights >= 0, weights, weights * len(self._mean) / z.square().sum(1))  # (46)
        return weights.clamp(min=0) @ z, (y * scaled[:, None]).T @ y

    def _refresh(self) -> None:
        """C^½, once in a few generations, as long as C hardly changes between."""
        if self._generation % self._root_every == 0:
            variances, axes = torch.linalg.eigh(self._covariance)
            least = least_variance(float(variances[-1]))
            if float(variances[0]) < least:
                variances.clamp_(min=least)
                self._covariance = (axes * variances) @ axes.T
            self._root = (axes * variances.sqrt()) @ axes.T

    def _tensors(self) -> tuple[str, ...]:
        return (*super()._tensors(), "root")
