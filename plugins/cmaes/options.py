"""What a user may choose of any variant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.errors import UserError, unknown

STEP_SIZES = ("csa", "psr")
DTYPES = {"auto": None, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Options:
    """The search distribution's options; `plugins.cmaes.cmaes` says what each means.

    Raises:
        UserError: one out of its range.
    """

    sigma: float = 0.1
    population_size: int = 0
    mirrored: bool = False
    orthogonal: bool = False
    step_size: str = "csa"
    lower: float = -math.inf
    upper: float = math.inf
    dtype: str = "auto"
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UserError(f"cmaes: sigma must be positive and finite, not {self.sigma:g}")
        if self.population_size < 0 or self.population_size == 1:
            raise UserError(f"cmaes: population_size must be at least 2, not {self.population_size}")
        if self.mirrored and self.population_size % 2:
            raise UserError(
                f"cmaes: mirrored samples are pairs: population_size must be even, not {self.population_size}"
            )
        if self.step_size not in STEP_SIZES:
            raise unknown("step_size of cmaes", self.step_size, STEP_SIZES)
        if self.dtype not in DTYPES:
            raise unknown("dtype of cmaes", self.dtype, DTYPES)
        if not self.lower < 0 < self.upper:
            raise UserError(
                f"cmaes: the start point, 0, must lie inside the bounds [{self.lower:g}, {self.upper:g}]"
            )
        if self.rank < 0:
            raise UserError(f"cmaes: rank must be at least 1, not {self.rank}")

    @property
    def point_type(self) -> torch.dtype:
        """The candidates' dtype: float32, which is what weights are, unless float64 was asked for."""
        return DTYPES[self.dtype] or torch.float32

    def float_type(self, otherwise: torch.dtype) -> torch.dtype:
        """The state's dtype: the one asked for, or what the variant takes by itself."""
        return DTYPES[self.dtype] or otherwise
