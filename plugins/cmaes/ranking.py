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

    Of mirrored pairs, the better ones rank before all worse ones, so that a pair never draws the mean to both
    sides (pairwise selection, Auger, Brockhoff and Hansen 2011, doi 10.1145/2001576.2001694).
    """
    told = torch.tensor([loss if math.isfinite(loss) else math.inf for loss in losses], dtype=torch.float64)
    given = torch.tensor(weights, dtype=torch.float64)
    if mirrored:
        pairs = told.view(-1, 2)
        worse = torch.stack((pairs[:, 0] > pairs[:, 1], pairs[:, 1] >= pairs[:, 0]), 1).flatten()
        order = torch.tensor(sorted(range(len(told)), key=lambda i: (bool(worse[i]), float(told[i]))))
        shared = torch.empty_like(told)
        shared[order] = given
    else:
        _, group, sizes = torch.unique(told, return_inverse=True, return_counts=True)
        order = torch.argsort(told, stable=True)
        sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group[order], given)
        shared = (sums / sizes)[group]
    return torch.where(told.isinf(), shared.clamp(max=0.0), shared)
