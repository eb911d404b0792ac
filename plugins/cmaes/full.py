"""CMA-ES with a full covariance matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import Parameters
from plugins.cmaes.sampling import Samples
from plugins.cmaes.stopping import Scales
from plugins.cmaes.strategy import CMAES, population_size

# From here on the root is Cholesky's: a twentieth of the time of an eigendecomposition. Below, both are
# quick, and eigenvalues are what the stop criteria read.
CHOLESKY_FROM = 400
_LEAST = 1e-15  # of the largest eigenvalue: what rounding would leave of a smaller one is not to be trusted


class CMA(CMAES):
    """Active CMA-ES (Hansen 2016, arXiv 1604.00772v2) with rank-one, rank-μ and negative updates.

    Memory is O(n²), time a candidate O(n²). The root A of C is refreshed once in a few generations, in
    float64 unless the caller chose otherwise: the symmetric one, of an eigendecomposition, or Cholesky's.
    """

    name = "CMA"
    holds_samples = True

    def __init__(
        self, problem: Problem, options: Options | None = None, start: Tensor | None = None, restart: int = 0
    ) -> None:
        super().__init__(problem, options, start, restart)
        n, like = problem.size, self._mean
        self._covariance = torch.eye(n, dtype=like.dtype, device=like.device)
        self._root = self._covariance.clone()
        self._axes, self._roots = self._covariance[:0], torch.ones_like(like)
        self._triangular = n >= CHOLESKY_FROM
        if not self._triangular:
            self._axes = self._covariance.clone()
        p = self.parameters
        self._root_every = max(1, int(1 / (10 * n * (p.c_1 + p.c_mu))))  # appendix B.2

    @classmethod
    def memory_bytes(cls, problem: Problem, options: Options) -> int:
        """C, its root and what the decomposition takes: 8 matrices, or 4 by Cholesky's."""
        n = problem.size
        number = options.float_type(cls.dtype).itemsize
        matrices = 4 if n >= CHOLESKY_FROM else 8
        return number * (matrices * n * n + 5 * n * population_size(n, options))

    @classmethod
    def parameters_for(cls, size: int, options: Options) -> Parameters:
        return Parameters.of(size, population_size(size, options))

    def _spread(self, z: Tensor) -> Tensor:
        return z @ self._root.T

    def _whitened(self, y: Tensor) -> Tensor:
        if self._triangular:
            solved: Tensor = torch.linalg.solve_triangular(self._root, y.T, upper=False)
            return solved.T
        return (y @ self._axes / self._roots) @ self._axes.T

    def _learn(self, samples: Samples, weights: Tensor) -> None:
        p, z = self.parameters, samples.block(slice(None))
        y = self._spread(z)
        positive = weights.clamp(min=0)
        h_sigma = self._move(positive @ z, positive @ y)
        scaled = torch.where(weights >= 0, weights, weights * p.size / z.square().sum(1))  # (46)
        vectors = torch.cat((self._path_c[None], y))
        rates = torch.cat((scaled.new_full((1,), p.c_1), p.c_mu * scaled))
        torch.addmm(
            self._covariance,
            (vectors * rates[:, None]).T,
            vectors,
            beta=self._decay(h_sigma, weights),
            out=self._covariance,
        )  # (47)
        if self._updates % self._root_every == 0:
            self._refresh()

    def _refresh(self) -> None:
        """A from C, which hardly changes between."""
        if self._triangular:
            root, failed = torch.linalg.cholesky_ex(self._covariance)
            if not failed:
                self._root = root
                return
        on_apple = self._covariance.device.type == "mps"  # which decomposes nothing
        found = torch.linalg.eigh(self._covariance.cpu() if on_apple else self._covariance)
        variances, axes = (each.to(self._covariance.device) for each in found)
        least = _LEAST * float(variances[-1])
        if float(variances[0]) < least:  # only rounding can bring it there: (52) keeps C positive
            variances.clamp_(min=least)
            self._covariance = (axes * variances) @ axes.T
        if self._triangular:
            self._covariance.diagonal().add_(least)
            self._root = torch.linalg.cholesky(self._covariance)
        else:
            self._axes, self._roots = axes, variances.sqrt()
            self._root = (axes * self._roots) @ axes.T

    def _scales(self) -> Scales:
        sigma, axis = self.sigma, None
        # of a triangular root the diagonal bounds the eigenvalues' range from within
        roots = self._root.diagonal() if self._triangular else self._roots
        if not self._triangular:
            index = self._updates // 10 % len(roots)
            axis = sigma * roots[index] * self._axes[:, index]
        return Scales(
            sigma,
            self._mean,
            sigma * self._covariance.diagonal().sqrt(),
            sigma * self._path_c,
            float(roots.min()),
            float(roots.max()),
            axis,
        )

    def warm(self, sigma: float, deviations: Tensor, prior: float) -> None:
        super().warm(sigma, deviations, prior)
        self._covariance = deviations.T @ deviations
        self._covariance.diagonal().add_(prior**2)
        self._refresh()

    def _tensors(self) -> tuple[str, ...]:
        return (*super()._tensors(), "covariance", "root", "axes", "roots")
