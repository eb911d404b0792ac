"""Means and spreads over seeds, and how far two methods are apart on the same examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.measuring.resampling import interval, resampled


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) over seeds; of one seed, 0; NaN where one of them diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean difference of ``ours`` from ``theirs``, each ``[seeds, examples]``, and its 95% interval.

    The interval is of examples drawn again (Efron 1979), for both methods and all seeds alike: what other
    test texts would have shown of these runs. The chance of a seed is not in it; its spread is said beside.
    Where a loss is not finite, all three are NaN.
    """
    with np.errstate(invalid="ignore"):  # of two infinite losses
        difference = (ours - theirs).mean(0)
    if not np.isfinite(difference).all():
        return math.nan, math.nan, math.nan
    count = len(difference)
    low, high = interval(resampled(count, lambda draws: draws @ difference / count))
    return float(difference.mean()), float(low), float(high)
