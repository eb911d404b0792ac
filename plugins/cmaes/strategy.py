"""The loop that all variants share: sampling, ranking, and the paths of the mean, the step size and C.

Symbols and equation numbers are those of Hansen's tutorial, arXiv 1604.00772v2: m the mean, σ the step size,
C the covariance, p_σ and p_c the evolution paths, z ~ N(0, I), y = A z with A Aᵀ = C, and x = m + σ y.

The path p_σ adds up z itself, which is A⁻¹ y. For a symmetric A that is the tutorial's (43); for another root
it is the same up to a rotation that changes as slowly as C does (Krause, Arbonès and Igel 2016).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import Drawn, Explicit, Problem, Stalled
from plugins.cmaes.box import Box
from plugins.cmaes.options import Options
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.ranking import by_rank
from plugins.cmaes.sampling import HELD, Generation, Samples, generation_seed
from plugins.cmaes.step_size import PathLength, PopulationSuccess, StepSize
from plugins.cmaes.stopping import Scales, Stopping

LOOK_EVERY = 10  # generations between checks of the criteria on coordinates


class CMAES(ABC):
    """An `AskTell`; the variants differ in what they hold of the covariance.

    Args:
        problem: the space. Coordinates are displacements: the start point is the zero vector.
        options: see `Options`.
        start: the first mean, ``[size]``; None is the zero vector.
        restart: the number of this run among restarts: each has noise of its own.

    Raises:
        UserError: orthogonal samples of a space too large to hold all of a generation.
    """

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float64
    has_path_c: ClassVar[bool] = True
    holds_samples: ClassVar[bool] = False
    """Whether a generation's samples are all held, however many."""

    def __init__(
        self, problem: Problem, options: Options | None = None, start: Tensor | None = None, restart: int = 0
    ) -> None:
        self.options = options = options or Options()
        self.parameters = self.parameters_for(problem.size, options)
        large = self.parameters.population_size * problem.size > HELD
        if options.orthogonal and large and not (self.holds_samples or restart):
            raise UserError(
                f"cmaes: orthogonal=true needs all samples of {problem.size:,} coordinates at once; leave it "
                "out: in so many dimensions samples are orthogonal as they come"
            )
        self.sigma = options.sigma
        self._seed, self._restart = problem.run_seed, restart
        self._device = problem.device
        dtype = options.float_type(self.dtype)
        # Apple's GPUs have no float64
        apart = problem.device.type == "mps" and dtype == torch.float64
        on = torch.device("cpu") if apart else problem.device
        self._mean = torch.zeros(problem.size, dtype=dtype, device=on)
        if start is not None:
            self._mean.copy_(start)
        self._path_sigma = torch.zeros_like(self._mean)
        self._path_c = torch.zeros_like(self._mean if self.has_path_c else self._mean[:0])
        self._box = Box(options.lower, options.upper)
        self._step_size: StepSize = PopulationSuccess()
        if options.step_size == "csa":
            self._step_size = self._path_length_rule()
        self._stopping = Stopping(problem.size, self.parameters.population_size, options.sigma)
        self._generation = 0
        self._updates = 0
        self._noise = self._next_noise()

    def ask(self) -> list[Explicit]:
        """λ candidates, ``[size]`` on the problem's device; the same ones until they are told.

        They are float32 unless float64 was asked for. Those of a large space are drawn as they are read.

        Raises:
            Stalled: one of Hansen's stop criteria holds.
        """
        if self._stopping.reason:
            raise Stalled(f"{self.name} stops by {self._stopping.reason}")
        if self._noise.held:
            z = self._noise.block(slice(None))
            points = torch.add(self._mean, self._spread(z), alpha=self.sigma)  # (40)
            return [Explicit(point) for point in self._sent(points)]
        drawn = [functools.partial(self._point, i, self._generation) for i in range(self._noise.shape[0])]
        return [Drawn(draw) for draw in drawn]

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        """Moves the distribution by the losses of the candidates just asked, in that order.

        A loss that is not finite ranks last. A generation whose losses are all alike says nothing of C, which
        would shrink at random: only σ grows.

        Raises:
            ValueError: not λ candidates and losses.
        """
        if not len(candidates) == len(losses) == self.parameters.population_size:
            raise ValueError(
                f"{self.name} asks for {self.parameters.population_size} candidates and was told "
                f"{len(losses)} losses of {len(candidates)}"
            )
        self._learn_from(self._noise, losses, mirrored=self.options.mirrored)
        self.resample()

    def resample(self) -> None:
        """Has ``ask`` give other candidates of the same distribution; those it gave may still be injected."""
        self._generation += 1
        self._noise = self._next_noise()

    def inject(self, points: Sequence[Tensor], losses: Sequence[float]) -> None:
        """As ``tell``, from points ``[size]`` of any origin: of older distributions, or of another method.

        How far one may pull is bounded (Hansen 2011, arXiv 1110.4181, equation 5). Where not all points are
        of the present distribution, ``step_size=psr`` is the rule that still means something.
        """
        y = (torch.stack([point.to(self._mean) for point in points]) - self._mean) / self.sigma
        z = self._whitened(y)
        n = self.parameters.size
        longest = math.sqrt(n) + 2 * n / (n + 2)
        z = z * (longest / z.norm(dim=1, keepdim=True)).clamp(max=1.0)
        self._learn_from(Samples(z), losses, mirrored=False)

    def recommend(self) -> Tensor:
        """The mean, as candidates are."""
        return self._sent(self._mean.clone())

    @property
    def stopped(self) -> str:
        """The stop criterion that holds, in words, or nothing."""
        return self._stopping.reason

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: copies."""
        tensors = {key: getattr(self, f"_{key}").clone() for key in self._tensors()}
        numbers = {
            key: getattr(self, key) for key in ("sigma", "_generation", "_updates", "_seed", "_restart")
        }
        rules = {"step_size": self._step_size.state(), "stopping": self._stopping.state()}
        return {**numbers, **rules, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("sigma", "_generation", "_updates", "_seed", "_restart"):
            setattr(self, key, state[key])
        self._step_size.restore(state["step_size"])
        self._stopping.restore(state["stopping"])
        for key in self._tensors():
            getattr(self, f"_{key}").copy_(state[key])
        self._noise = self._next_noise()

    @classmethod
    @abstractmethod
    def memory_bytes(cls, problem: Problem, options: Options) -> int:
        """Peak bytes of state, work space and candidates."""

    @classmethod
    @abstractmethod
    def parameters_for(cls, size: int, options: Options) -> Parameters:
        """The strategy parameters for so many coordinates."""

    @abstractmethod
    def _spread(self, z: Tensor) -> Tensor:
        """A z of each row, ``[k, n]``."""

    @abstractmethod
    def _whitened(self, y: Tensor) -> Tensor:
        """A⁻¹ y of each row, ``[k, n]``."""

    @abstractmethod
    def _learn(self, samples: Samples, weights: Tensor) -> None:
        """Moves the mean, the paths and C; ``weights`` are of the candidates, ``[λ]``, like the mean."""

    @abstractmethod
    def _scales(self) -> Scales:
        """For the stop criteria."""

    def warm(self, sigma: float, deviations: Tensor, prior: float) -> None:
        """Takes over σ, and what it can hold of C = YᵀY + ``prior``² I; Y are ``deviations``, ``[k, n]``."""
        self.sigma = sigma

    def _path_length_rule(self) -> PathLength:
        return PathLength(self.parameters)

    def _tensors(self) -> tuple[str, ...]:
        return ("mean", "path_sigma", "path_c")

    def _next_noise(self) -> Generation:
        shape = (self.parameters.population_size, self.parameters.size)
        return Generation(
            generation_seed(self._seed, self._restart, self._generation),
            shape,
            self._mean,
            mirrored=self.options.mirrored,
            orthogonal=self.options.orthogonal,
            held=self.holds_samples,
        )

    def _point(self, index: int, generation: int) -> Tensor:
        if generation != self._generation:
            raise RuntimeError("a candidate was read after its generation was told")
        y = self._spread(self._noise.row(index)[None])[0]
        return self._sent(y.mul_(self.sigma).add_(self._mean))

    def _sent(self, points: Tensor) -> Tensor:
        """Points as the engine gets them."""
        on_apple = self._device.type == "mps"  # which has no float64
        return self._box(points).to(self._device, torch.float32 if on_apple else self.options.point_type)

    def _learn_from(self, samples: Samples, losses: Sequence[float], *, mirrored: bool) -> None:
        finite = [loss for loss in losses if math.isfinite(loss)]
        self._stopping.note(losses)
        if not finite:
            return
        if len(finite) < len(losses) or min(finite) < max(finite):
            weights = by_rank(losses, self.parameters.weights, mirrored=mirrored)
            self._learn(samples, weights.to(self._mean))
            self.sigma *= self._step_size.growth(float(self._path_sigma.norm()), losses)
            if self._updates % LOOK_EVERY == 0:
                self._stopping.look(self._scales())
        if self._on_plateau(losses):
            self.sigma *= math.exp(0.2 + self.parameters.c_sigma / self.parameters.d_sigma)

    def _on_plateau(self, losses: Sequence[float]) -> bool:
        """Whether seven tenths of a generation are as good as its best (appendix B.3, flat fitness)."""
        told = sorted(loss if math.isfinite(loss) else math.inf for loss in losses)
        return told[0] == told[math.ceil(0.7 * len(told)) - 1]

    def _move(self, z: Tensor, y: Tensor) -> float:
        """Moves the mean and the paths by ⟨z⟩_w and ⟨y⟩_w; returns h_σ."""
        p = self.parameters
        self._mean.add_(y, alpha=self.sigma)  # (42)
        self._path_sigma.mul_(1 - p.c_sigma).add_(
            z, alpha=math.sqrt(p.c_sigma * (2 - p.c_sigma) * p.mu_eff)
        )  # (43)
        self._updates += 1
        settled = math.sqrt(1 - (1 - p.c_sigma) ** (2 * self._updates))
        length = float(self._path_sigma.norm())
        h_sigma = float(length / settled < (1.4 + 2 / (p.size + 1)) * p.chi_n)
        if self.has_path_c:
            self._path_c.mul_(1 - p.c_c).add_(
                y, alpha=h_sigma * math.sqrt(p.c_c * (2 - p.c_c) * p.mu_eff)
            )  # (45)
        return h_sigma

    def _decay(self, h_sigma: float, weights: Tensor) -> float:
        """What C is multiplied with before anything is added (47); ``weights`` are as in `_learn`."""
        p = self.parameters
        stalled = (1 - h_sigma) * p.c_c * (2 - p.c_c)
        return 1 + p.c_1 * stalled - p.c_1 - p.c_mu * float(weights.sum())


def population_size(size: int, options: Options) -> int:
    """λ: as asked for, or 4 + ⌊3 ln n⌋, one more where pairs need it."""
    count = options.population_size or default_population_size(size)
    return count + 1 if options.mirrored and count % 2 else count
