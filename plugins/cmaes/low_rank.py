"""CMA-ES whose covariance is a diagonal and a few directions: between `SepCMA` and `CMA`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import Parameters
from plugins.cmaes.sampling import Samples
from plugins.cmaes.stopping import Scales
from plugins.cmaes.strategy import CMAES, population_size

RANK = 4
_LEAST = 1e-14  # of the largest variance


class VkD(CMAES):
    """VkD-CMA (Akimoto & Hansen 2016, doi 10.1145/2908812.2908863): C = D (I + Vᵀ S V) D.

    D is a diagonal, V has k = ``rank`` orthonormal rows, S is a diagonal. Each generation's C, as `CMA` would
    make it without negative weights, is brought back to that form. Memory is O(k n), time a generation
    O((λ + k)² n). The paper's two-point step-size rule gives way to that of the other variants, and k stays.
    """

    name = "VkD"
    holds_samples = True

    def __init__(
        self, problem: Problem, options: Options | None = None, start: Tensor | None = None, restart: int = 0
    ) -> None:
        super().__init__(problem, options, start, restart)
        like, rank = self._mean, _rank(problem.size, self.options)
        self._diagonal = torch.ones_like(like)
        self._directions = torch.zeros(rank, len(like), dtype=like.dtype, device=like.device)
        self._stretch = torch.zeros(rank, dtype=like.dtype, device=like.device)

    @classmethod
    def memory_bytes(cls, problem: Problem, options: Options) -> int:
        """State, the samples, and the vectors that a new C is made of, with the products between them."""
        count, rank = population_size(problem.size, options), _rank(problem.size, options)
        vectors = 8 + 5 * count + 4 * rank
        return options.float_type(cls.dtype).itemsize * (vectors * problem.size + 4 * (count + rank) ** 2)

    @classmethod
    def parameters_for(cls, size: int, options: Options) -> Parameters:
        """Rates for its degrees of freedom (Akimoto & Hansen 2016, doi 10.1007/978-3-319-45823-6_1)."""
        p, rank = Parameters.of(size, population_size(size, options)), _rank(size, options)
        free = size * (rank + 1)
        c_1 = 2 / (free + size + 2 * (rank + 2) + p.mu_eff)
        c_mu = min(1 - c_1, 2 * (p.mu_eff - 2 + 1 / p.mu_eff) / (free + 4 * (rank + 2) + p.mu_eff))
        weights = tuple(max(weight, 0.0) for weight in p.weights)
        return replace(p, weights=weights, c_1=c_1, c_mu=c_mu, c_c=math.sqrt(c_1))

    def _spread(self, z: Tensor) -> Tensor:
        return self._diagonal * self._stretched(z, (1 + self._stretch).sqrt() - 1)

    def _whitened(self, y: Tensor) -> Tensor:
        return self._stretched(y / self._diagonal, (1 + self._stretch).rsqrt() - 1)

    def _stretched(self, rows: Tensor, by: Tensor) -> Tensor:
        """Each row with its part along direction i stretched by 1 + ``by[i]``."""
        return torch.addmm(rows, (rows @ self._directions.T) * by, self._directions)

    def _learn(self, samples: Samples, weights: Tensor) -> None:
        p, z = self.parameters, samples.block(slice(None))
        chosen = weights.nonzero().squeeze(1)
        weights, z = weights[chosen], z[chosen]
        y = self._spread(z)
        h_sigma = self._move(weights @ z, weights @ y)
        kept = self._decay(h_sigma, weights)
        parts = (
            self._directions * (kept * self._stretch).sqrt()[:, None],
            y / self._diagonal * (p.c_mu * weights).sqrt()[:, None],
            (self._path_c / self._diagonal * math.sqrt(p.c_1))[None],
        )
        self._project(torch.cat(parts), kept)

    def _project(self, rows: Tensor, kept: float) -> None:
        """The nearest C of the form to D (kept · I + rowsᵀ rows) D, by its leading axes and its diagonal."""
        rank, n = self._directions.shape
        values, turns = torch.linalg.eigh((rows @ rows.T).cpu().double())  # ascending
        values = values.clamp(min=0.0).to(rows)
        rest = values[:-rank].sum() / (n - rank)  # what the dropped axes held, spread over all that is left
        leading = values[-rank:]
        self._stretch = ((leading - rest) / (kept + rest)).clamp(min=0.0)
        scaled = turns[:, -rank:].T.to(rows) / leading.clamp(min=1e-300).sqrt()[:, None]
        self._directions = torch.where(self._stretch[:, None] > 0, scaled @ rows, 0.0)
        wanted = kept + rows.square().sum(0)
        self._diagonal.mul_((wanted / (1 + self._stretch @ self._directions.square())).sqrt())
        self._diagonal.clamp_(min=math.sqrt(_LEAST) * float(self._diagonal.max()))

    def _scales(self) -> Scales:
        variances = 1 + self._stretch @ self._directions.square()
        deviations = self._diagonal * variances.sqrt()
        index = self._updates // 10 % len(self._stretch)
        axis = self._diagonal * self._directions[index] * (1 + self._stretch[index]).sqrt()
        known = bool(self._stretch[index] > 0)
        return Scales(
            self.sigma,
            self._mean,
            self.sigma * deviations,
            self.sigma * self._path_c,
            float(self._diagonal.min()),
            float(deviations.max()),
            self.sigma * axis if known else None,
        )

    def warm(self, sigma: float, deviations: Tensor, prior: float) -> None:
        super().warm(sigma, deviations, prior)
        self._diagonal = (deviations.square().sum(0) + prior**2).sqrt()
        self._project(deviations / self._diagonal, float((prior / self._diagonal).square().mean()))

    def _tensors(self) -> tuple[str, ...]:
        return (*super()._tensors(), "diagonal", "directions", "stretch")


def _rank(size: int, options: Options) -> int:
    return max(1, min(options.rank or RANK, size - 1))
