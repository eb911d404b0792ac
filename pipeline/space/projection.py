"""A random subspace of some parameters, for methods that cannot hold more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline import noise
from pipeline.errors import UserError
from pipeline.optimizer import Candidate, Drawn, Explicit, LowRank, Move
from pipeline.space.factors import Factors
from pipeline.space.memory import PIECE, Group
from pipeline.space.searched import Space

_PATH = 1  # to the seed of S


class Projection(Space):
    """A random k-dimensional subspace: θ = start + S c, S sparse with one ±√(k/d) in each row.

    The columns of S are orthogonal, and of unit length on average: a step of length r in coordinates is a
    step of about length r in the weights, times a tensor's scale.
    """

    def __init__(
        self, kind: str, tensors: Iterable[tuple[str, nn.Parameter, float]], dimension: int, seed: int
    ) -> None:
        super().__init__(kind, tensors, seed)
        self.dimension = min(dimension, self.elements)
        self._point = torch.zeros(self.dimension, device=self.device)

    @property
    def size(self) -> int:
        return self.dimension

    @property
    def elementwise(self) -> bool:
        return False

    def factors(self, seeds: Sequence[int], distribution: str, low_rank: LowRank) -> Factors:
        raise UserError(
            f"the space '{self.kind}' has no matrices for low-rank directions; choose full or lora"
        )

    def stacked(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        resolved = [self.resolved(each) for each in candidates]
        return {s.name: torch.stack([self.value(s, each) for each in resolved]) for s in self.tensors}

    def move(self, *moves: Move) -> None:
        """As in `Space`, in coordinates; the decay draws them to the start point."""
        point = self._point
        for move in moves:
            if move.low_rank:
                self.factors(move.seeds, move.distribution, move.low_rank)
            point = point * (1.0 - move.decay)
            for seed, coefficient in zip(move.seeds, move.coefficients, strict=True):
                law, factor = self._law(seed, move.distribution)
                z = noise.direction(seed, 0, self.dimension, law, point.device)
                point.add_(z.mul_(coefficient * factor))
        self.place(point)

    def place(self, coordinates: Tensor) -> None:
        super().place(coordinates)
        self._point = coordinates.clone()

    def resolved(self, candidate: Candidate) -> Candidate:
        if isinstance(candidate, Drawn):
            return self._read(candidate)
        if isinstance(candidate, Explicit):
            return candidate
        law, factor = self._law(candidate.seed, candidate.distribution)
        z = noise.direction(candidate.seed, 0, self.dimension, law, self._point.device)
        return Explicit(z.mul_(candidate.scale * factor).add_(self._point))

    def _displace(self, group: Group, coordinates: Tensor, out: Tensor) -> None:
        scale = (self.dimension / self.elements) ** 0.5 * group.segment.scale
        for part, values in zip(group.pieces(), torch.split(out, PIECE), strict=True):
            counters = torch.arange(part.start, part.start + part.count, device=out.device)
            words = noise.words_at(noise.derive(self._seed, _PATH), counters).long() & 0xFFFFFFFF
            signs = 1.0 - 2.0 * (words & 1)
            delta = coordinates[(words >> 1) % self.dimension] * (signs * scale)
            values.copy_(self._start_of(part) + delta)
