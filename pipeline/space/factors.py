"""Low-rank directions, by their factors: z = U Vᵀ / √rank on a matrix, z itself on any other tensor.

A direction of a matrix of m × n elements then is (m + n) · rank numbers, which ride along a layer's product:
x (W + s U Vᵀ)ᵀ = x Wᵀ + s (x V) Uᵀ (LOZO, Chen et al. 2024, arXiv 2410.07698; EGGROLL, arXiv 2511.16652).
Elements have mean 0 and variance 1, as those of a full direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import noise
from pipeline.optimizer import LowRank

_RIGHT = 7  # the path to a direction's own V


class Layout:
    """Where each tensor's factors lie among the elements of a direction: U's (and vectors) and V's."""

    def __init__(self, shapes: dict[str, torch.Size], rank: int) -> None:
        self.left: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.right: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.left_size = self.right_size = 0
        for name, shape in shapes.items():
            left = (shape[0], rank) if len(shape) == 2 else tuple(shape)
            self.left[name] = self.left_size, left
            self.left_size += torch.Size(left).numel()
            if len(shape) == 2:
                self.right[name] = self.right_size, (shape[1], rank)
                self.right_size += shape[1] * rank


class Factors:
    """The factors of several directions: U (or a vector's elements) is ``[seeds, …]``, V too.

    Where the directions share V, it is ``[1, columns, rank]``.
    """

    def __init__(
        self, layout: Layout, seeds: Sequence[int], law: str, low_rank: LowRank, device: torch.device
    ) -> None:
        rights = [noise.derive(seed, _RIGHT) for seed in seeds]
        if low_rank.right_seed is not None:
            rights = [low_rank.right_seed]
        self._layout = layout
        self._left = noise.directions(seeds, 0, layout.left_size, law, device)
        self._right = noise.directions(rights, 0, layout.right_size, law, device)
        self._right.div_(low_rank.rank**0.5)

    def left(self, name: str) -> Tensor:
        """U of a matrix, ``[seeds, rows, rank]``; of another tensor its elements, ``[seeds, *shape]``."""
        return _cut(self._left, *self._layout.left[name])

    def right(self, name: str) -> Tensor:
        """V / √rank of a matrix: ``[seeds or 1, columns, rank]``."""
        return _cut(self._right, *self._layout.right[name])


def _cut(flat: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    return flat[:, start : start + torch.Size(shape).numel()].view(len(flat), *shape)
