"""Examples drawn again: what other test texts would have shown (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SHARE = 0.95
_SEED = 20260101  # the same resamples whenever a table is made
_AT_ONCE = 2**22  # draws held in memory

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From how often each example is drawn, ``[resamples, examples]``, to figures ``[resamples, …]``."""


def resampled(count: int, statistic: Statistic) -> NDArray[np.float64]:
    """``statistic`` of ``RESAMPLES`` resamples of ``count`` examples: ``[RESAMPLES, …]``."""
    rng, share = np.random.default_rng(_SEED), np.full(count, 1 / count)
    rows = max(1, _AT_ONCE // count)
    sizes = [min(rows, RESAMPLES - begin) for begin in range(0, RESAMPLES, rows)]
    return np.concatenate([statistic(rng.multinomial(count, share, size).astype(float)) for size in sizes])


def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bounds that ``SHARE`` of the resamples' ``values`` lie within: ``[2, …]``."""
    bounds: NDArray[np.float64] = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
    return bounds
