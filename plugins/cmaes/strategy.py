"""The loop that both variants share: sampling, ranking, and the paths of mean, step size and covariance.

Symbols and equation numbers are those of Hansen's tutorial, arXiv 1604.00772v2: m the mean, σ the step size,
C the covariance, p_σ and p_c the evolution paths, z ~ N(0, I), y = C^½ z and x = m + σ y.

C^½ is the symmetric root. Unlike the tutorial's B D it does not depend on the signs and order in which an
eigensolver returns vectors, so every device samples the same up to rounding, and C^-½ y is z itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import Explicit, Problem
from plugins.cmaes.parameters import Parameters, default_population_size

# σ stays within these factors of its start: it would underflow once converged and overflow on a plane
SIGMA_RANGE = (1e-12, 1e6)
# of C's axes, as a part of the largest, and of the largest: rounding would leave zero or less
MIN_VARIANCE, MIN_LARGEST_VARIANCE = 1e-14, 1e-30


def least_variance(largest: float) -> float:
    """What no principal axis of C may fall below, given the variance of the largest."""
    return MIN_VARIANCE * max(largest, MIN_LARGEST_VARIANCE)


class CMAES(ABC):
    """An `AskTell`; the variants differ in what they hold of the covariance.

    A generation's noise is drawn on the CPU, from a generator of its own, and drawn again in ``tell`` rather
    than kept. To keep it would double the memory that a large space takes; to recover it from the candidates,
    which are float32, would give rounding noise once σ is small.

    Args:
        problem: the space; the search starts at the zero vector.
        sigma: σ at the start.
        population_size: λ; 0 takes 4 + ⌊3 ln n⌋.

    Raises:
        UserError: an option out of its range.
    """

    name: ClassVar[str]

    def __init__(self, problem: Problem, *, sigma: float = 0.1, population_size: int = 0) -> None:
        if not 0 < sigma < math.inf:
            raise UserError(f"cmaes: sigma must be positive and finite, not {sigma:g}")
        if population_size < 0 or population_size == 1:
            raise UserError(f"cmaes: population_size must be at least 2, not {population_size}")
        self.parameters = self._parameters(
            problem.size, population_size or default_population_size(problem.size)
        )
        self.sigma = sigma
        self._least_sigma, self._largest_sigma = (sigma * factor for factor in SIGMA_RANGE)
        self._generation = 0
        self._generator = torch.Generator().manual_seed(problem.run_seed)
        self._drawn_from = self._generator.get_state()
        self._device = problem.device
        # Apple's GPUs have no float64
        state_on = torch.device("cpu") if self._device.type == "mps" else self._device
        zeros = torch.zeros(problem.size, dtype=self._dtype(problem.size), device=state_on)
        self._mean, self._path_sigma, self._path_c = zeros, zeros.clone(), zeros.clone()
        self._covariance = self._identity(zeros)

    def ask(self) -> list[Explicit]:
        """λ candidates, float32 ``[size]`` on the problem's device; the same ones until they are told."""
        points = (torch.add(self._mean, y, alpha=self.sigma) for y in self._steps())  # (40)
        return [Explicit(point.float().to(self._device)) for point in points]

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        """Moves the distribution by the losses of the candidates just asked, in that order.

        A loss that is not finite ranks last. A generation whose losses are all alike says nothing: C would
        shrink at random, so only its noise is used up.

        Raises:
            ValueError: not λ candidates and losses.
        """
        if not len(candidates) == len(losses) == self.parameters.population_size:
            raise ValueError(
                f"{self.name} asks for {self.parameters.population_size} candidates and was told "
                f"{len(losses)} losses of {len(candidates)}"
            )
        ranked = [loss if math.isfinite(loss) else math.inf for loss in losses]
        z, rank_mu = self._moments(self._by_rank(ranked))
        self._drawn_from = self._generator.get_state()
        if min(ranked) < max(ranked):
            self._update(z, rank_mu)

    def recommend(self) -> Tensor:
        """The mean: float32 ``[size]``."""
        return self._mean.to(self._device, torch.float32, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: copies."""
        tensors = {key: getattr(self, f"_{key}").clone() for key in self._tensors()}
        return {"sigma": self.sigma, "generation": self._generation, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sigma, self._generation = state["sigma"], state["generation"]
        for key in self._tensors():
            getattr(self, f"_{key}").copy_(state[key])

    @classmethod
    @abstractmethod
    def memory_bytes(cls, problem: Problem, population_size: int = 0) -> int:
        """Peak bytes of state, work space and candidates."""

    @abstractmethod
    def _parameters(self, size: int, population_size: int) -> Parameters: ...

    @staticmethod
    @abstractmethod
    def _dtype(size: int) -> torch.dtype:
        """Of the state."""

    @abstractmethod
    def _identity(self, zeros: Tensor) -> Tensor:
        """C at the start, for a mean like ``zeros``."""

    @abstractmethod
    def _steps(self) -> Iterable[Tensor]:
        """y of each candidate (39)."""

    @abstractmethod
    def _rooted(self, z: Tensor) -> Tensor:
        """C^½ z."""

    @abstractmethod
    def _outer(self, path: Tensor) -> Tensor:
        """p pᵀ, as much of it as the variant holds."""

    @abstractmethod
    def _moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """⟨z⟩_w over the positive weights, and Σ w° y yᵀ over all (46); draws the noise once."""

    @abstractmethod
    def _refresh(self) -> None:
        """Keeps C positive, and brings what is derived from it up to date."""

    def _tensors(self) -> tuple[str, ...]:
        return ("mean", "path_sigma", "path_c", "covariance", "drawn_from")

    def _rewound(self) -> torch.Generator:
        """The generator as it was before this generation's noise (38)."""
        return self._generator.set_state(self._drawn_from)

    def _by_rank(self, losses: Sequence[float]) -> Tensor:
        """The weight of each candidate's rank, ``[λ]``; ties keep the order of the candidates."""
        weights = torch.empty(len(losses), dtype=self._mean.dtype)
        order = sorted(range(len(losses)), key=losses.__getitem__)
        weights[order] = torch.tensor(self.parameters.weights, dtype=weights.dtype)
        return weights.to(self._mean.device)

    def _update(self, z: Tensor, rank_mu: Tensor) -> None:
        p = self.parameters
        y = self._rooted(z)
        self._mean.add_(y, alpha=self.sigma)  # (42)
        self._path_sigma.mul_(1 - p.c_sigma).add_(
            z, alpha=math.sqrt(p.c_sigma * (2 - p.c_sigma) * p.mu_eff)
        )  # (43)
        length = float(self._path_sigma.norm())
        self._generation += 1
        settled = math.sqrt(1 - (1 - p.c_sigma) ** (2 * self._generation))
        h_sigma = float(length / settled < (1.4 + 2 / (p.size + 1)) * p.chi_n)
        self._path_c.mul_(1 - p.c_c).add_(
            y, alpha=h_sigma * math.sqrt(p.c_c * (2 - p.c_c) * p.mu_eff)
        )  # (45)
        stalled = (1 - h_sigma) * p.c_c * (2 - p.c_c)
        self._covariance.mul_(1 + p.c_1 * stalled - p.c_1 - p.c_mu * sum(p.weights))
        self._covariance.add_(self._outer(self._path_c), alpha=p.c_1).add_(rank_mu, alpha=p.c_mu)  # (47)
        growth = math.exp(min(1.0, p.c_sigma / p.d_sigma * (length / p.chi_n - 1)))  # (44)
        self.sigma = min(max(self.sigma * growth, self._least_sigma), self._largest_sigma)
        self._refresh()
