"""A matrix adaptation strategy whose memory is a few vectors, for whole models."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.sampling import HELD, Samples
from plugins.cmaes.step_size import PathLength
from plugins.cmaes.stopping import Scales
from plugins.cmaes.strategy import CMAES, population_size

_FELT = 1e-3  # what a path may do to a sample at the end of a run before it is worth its memory


class LMMA(CMAES):
    """LM-MA-ES (Loshchilov, Glasmachers and Beyer 2017, arXiv 1705.06693, algorithm 2).

    A is a product of m factors (1 − c) I + c p pᵀ, one for each of m paths of fading memory. Two things
    differ from the paper's procedure, not from what it computes:

    - All factors together are a I + Pᵀ B P: one product with the paths P, ``[m, n]``, a triangular system of
      size m from their inner products, which are carried along, and one product back; not m dot products in
      turn. So ⟨y⟩ is had from ⟨z⟩, and no candidate is kept.
    - A path that the budget ends before it can bend a sample is not held: the i-th takes some 4ⁱ n/λ
      generations. At n = 10⁷ and 40,000 evaluations that leaves 7 of 52.
    """

    name = "LMMA"
    dtype = torch.float32
    has_path_c = False

    def __init__(
        self, problem: Problem, options: Options | None = None, start: Tensor | None = None, restart: int = 0
    ) -> None:
        super().__init__(problem, options, start, restart)
        n, p, on = problem.size, self.parameters, self._mean.device
        rows = _paths(problem, p.population_size)
        self._paths = torch.zeros(rows, n, dtype=self._mean.dtype, device=on)
        self._products = torch.zeros(rows, rows, dtype=torch.float64)
        i = torch.arange(rows, dtype=torch.float64)
        self._c_d = 1 / (1.5**i * n)
        self._c_c = (p.population_size / (4**i * n)).clamp(max=0.5)
        self._left = (1 - self._c_d).cumprod(0)  # what is left of z after each factor

    @classmethod
    def memory_bytes(cls, problem: Problem, options: Options) -> int:
        """The paths, two vectors of state, four of work, and one candidate, or all of a small space's."""
        n, number = problem.size, options.float_type(cls.dtype).itemsize
        count = population_size(n, options)
        return number * (n * (_paths(problem, count) + 7) + 4 * min(HELD, n * count))

    @classmethod
    def parameters_for(cls, size: int, options: Options) -> Parameters:
        p = Parameters.of(size, population_size(size, options))
        weights = tuple(max(weight, 0.0) for weight in p.weights)
        # the paper's 2 λ/n is no rate where n is small
        return replace(p, weights=weights, c_sigma=min(0.3, 2 * p.population_size / size))

    def _path_length_rule(self) -> PathLength:
        return PathLength(self.parameters, squared=True)

    def _spread(self, z: Tensor) -> Tensor:
        rows = min(self._updates, len(self._paths))
        if not rows:
            return z.clone()
        along = (z @ self._paths[:rows].T).cpu().double()
        by = self._coefficients(along.T, rows).T.to(self._mean)
        return torch.addmm(z, by, self._paths[:rows], beta=float(self._left[rows - 1]))

    def _coefficients(self, along: Tensor, rows: int) -> Tensor:
        """How much of each path is added to samples; ``along``: their products with them, ``[rows, k]``.

        The j-th factor adds c_j p_j (p_jᵀ d) to what the ones before made of z, d = a z + Σ_{i<j} b_i p_i:
        the products p_jᵀ d solve a triangular system.
        """
        left, c = self._left[:rows], self._c_d[:rows]
        before = torch.cat((left.new_ones(1), left[:-1]))
        # b_i, as it is when factor j comes: c_i p_iᵀd, faded by the factors between
        fades = torch.tril(before[:, None] / left * c, -1) * self._products[:rows, :rows]
        system = torch.eye(rows, dtype=torch.float64) - fades
        met = torch.linalg.solve_triangular(system, before[:, None] * along, upper=False, unitriangular=True)
        faded: Tensor = (c * left[-1] / left)[:, None] * met
        return faded

    def _whitened(self, y: Tensor) -> Tensor:
        z, rows = y.clone(), min(self._updates, len(self._paths))
        for i in reversed(range(rows)):  # of a factor, by Sherman and Morrison
            c, path = float(self._c_d[i]), self._paths[i]
            share = c / (1 - c + c * float(self._products[i, i]))
            z = (z - share * torch.outer(z @ path, path)) / (1 - c)
        return z

    def _learn(self, samples: Samples, weights: Tensor) -> None:
        z = samples.weighted(weights, torch.empty_like(self._mean))
        self._move(z, self._spread(z[None])[0])
        kept, gain = 1 - self._c_c, (self.parameters.mu_eff * self._c_c * (2 - self._c_c)).sqrt()
        along, length = (self._paths @ z).cpu().double(), float(z.square().sum())
        crossed = torch.outer(kept * along, gain)
        self._products.mul_(torch.outer(kept, kept)).add_(crossed).add_(crossed.T)
        self._products.add_(torch.outer(gain, gain), alpha=length)
        for path, keep, add in zip(self._paths, kept.tolist(), gain.tolist(), strict=True):
            path.mul_(keep).add_(z, alpha=add)

    def _scales(self) -> Scales:
        stretch = 1 - self._c_d + self._c_d * self._products.diagonal()
        least = float(self._left[-1])
        deviation = self._mean.new_tensor(self.sigma * least)
        return Scales(
            self.sigma,
            self._mean,
            deviation.expand_as(self._mean),
            None,
            least,
            max(1.0, float(stretch.max())),
        )

    def _tensors(self) -> tuple[str, ...]:
        return (*super()._tensors(), "paths", "products")


def _paths(problem: Problem, population_size: int) -> int:
    """m: 4 + ⌊3 ln n⌋, or as many as the budget lets matter.

    After T generations path i, of rate c = λ/(4ⁱ n), stretches a direction that was always taken by at most
    c T²: see docs/architecture.md.
    """
    generations = problem.forward_passes / population_size
    felt = population_size * generations**2 / (problem.size * _FELT)
    times = math.ceil(math.log(max(1.0, felt), 4))
    return min(default_population_size(problem.size), 1 + times)
