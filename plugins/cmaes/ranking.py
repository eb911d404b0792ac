"""From losses to the weight that each candidate has in the next distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def by_rank(losses: Sequence[float], weights: Sequence[float], *, mirrored: bool = False) -> Tensor:
    """The weight of each candidate, float64 ``[λ]`` on the CPU; ``weights`` are in order of rank, best first.

    Equal losses share what their ranks would get: which of them came first says nothing. A loss that is not
    finite ranks last, and never has a positive weight: the mean is not drawn to a failure.

    Of mirrored pairs, the worse ones rank behind all others, so that a pair does not draw the mean to both
    sides (pairwise selection, Auger, Brockhoff and Hansen 2011, doi 10.1145/2001576.2001694).
    """
    told = torch.tensor([loss if math.isfinite(loss) else math.inf for loss in losses], dtype=torch.float64)
    worse = torch.zeros_like(told)
    if mirrored:
        worse = (told.view(-1, 2) > told.view(-1, 2).flip(1)).flatten().double()
    # groups of equal rank, in order, and whose ranks are theirs
    _, group, sizes = torch.unique(
        torch.stack((worse, told), 1), dim=0, return_inverse=True, return_counts=True
    )
    ranks = torch.arange(len(sizes)).repeat_interleave(sizes)
    given = torch.tensor(weights, dtype=torch.float64)
    shared = (torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, ranks, given) / sizes)[group]
    return torch.where(told.isinf(), shared.clamp(max=0.0), shared)
