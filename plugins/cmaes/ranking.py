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
    order = told.argsort(stable=True)
    worse = torch.zeros_like(told, dtype=torch.bool)
    if mirrored:
        worse = (told.view(-1, 2) > told.view(-1, 2).flip(1)).flatten()
        order = order[worse[order].argsort(stable=True)]
    keys, behind = told[order], worse[order]
    differs = (keys[1:] != keys[:-1]) | (behind[1:] != behind[:-1])
    given = torch.tensor(weights, dtype=torch.float64)
    group = torch.nn.functional.pad(differs.long().cumsum(0), (1, 0))  # of equal ranks, in order
    sums = torch.zeros_like(given).index_add_(0, group, given)
    shared = torch.empty_like(given)
    shared[order] = (sums / group.bincount(minlength=len(group)))[group]
    return torch.where(told.isinf(), shared.clamp(max=0.0), shared)
