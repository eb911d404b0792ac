"""CMA-ES with a diagonal covariance, for spaces whose full matrix does not fit or could not be learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.optimizer import Problem
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import Parameters
from plugins.cmaes.sampling import HELD, Samples
from plugins.cmaes.stopping import Scales
from plugins.cmaes.strategy import CMAES, population_size

_LEAST = 1e-14  # of the largest variance


class SepCMA(CMAES):
    """sep-CMA-ES (Ros & Hansen 2008): C stays diagonal, and learns (n + 2)/3 times faster.

    Memory and time a candidate are O(n). Negative weights as in `CMA`, bounded by the faster rates.
    """

    name = "SepCMA"

    def __init__(
        self, problem: Problem, options: Options | None = None, start: Tensor | None = None, restart: int = 0
    ) -> None:
        super().__init__(problem, options, start, restart)
        self._variances = torch.ones_like(self._mean)

    @classmethod
    def memory_bytes(cls, problem: Problem, options: Options) -> int:
        """Four vectors of state, five of work, and one candidate, or all of a small space's."""
        n, number = problem.size, options.float_type(cls.dtype).itemsize
        held = min(HELD, n * population_size(n, options))
        return 10 * n * number + 4 * held * number

    @classmethod
    def parameters_for(cls, size: int, options: Options) -> Parameters:
        return Parameters.of(size, population_size(size, options), rate_factor=(size + 2) / 3)

    def _spread(self, z: Tensor) -> Tensor:
        return z * self._variances.sqrt()

    def _whitened(self, y: Tensor) -> Tensor:
        return y / self._variances.sqrt()

    def _learn(self, samples: Samples, weights: Tensor) -> None:
        p = self.parameters
        mean, squares = torch.empty_like(self._mean), torch.empty_like(self._mean)
        positive, scaled = weights.clamp(min=0), self._scaled(samples, weights)
        for span in samples.spans:
            z = samples.block(span)
            torch.mv(z.T, positive, out=mean[span])
            torch.mv(z.square().T, scaled, out=squares[span])
        h_sigma = self._move(mean, self._variances.sqrt().mul_(mean))
        # (47), the rank-μ term first: it is C times what it adds
        squares.mul_(p.c_mu).add_(self._decay(h_sigma, weights))
        self._variances.mul_(squares).addcmul_(self._path_c, self._path_c, value=p.c_1)
        self._variances.clamp_(min=_LEAST * float(self._variances.max()))

    def _scaled(self, samples: Samples, weights: Tensor) -> Tensor:
        """Negative weights by n/‖z‖² (46): 1, within a hundredth, where a generation is too large to hold."""
        if not samples.held:
            return weights
        lengths = samples.block(slice(None)).square().sum(1)
        return torch.where(weights >= 0, weights, weights * self.parameters.size / lengths)

    def _scales(self) -> Scales:
        deviations = self._variances.sqrt()
        least, most = float(deviations.min()), float(deviations.max())
        return Scales(
            self.sigma,
            self._mean,
            deviations.mul_(self.sigma),
            self.sigma * self._path_c,
            least,
            most,
        )

    def warm(self, sigma: float, deviations: Tensor, prior: float) -> None:
        super().warm(sigma, deviations, prior)
        self._variances = deviations.square().sum(0) + prior**2

    def _tensors(self) -> tuple[str, ...]:
        return (*super()._tensors(), "variances")
