"""``python -m pipeline.testing.memory SPEC COORDINATES``: bytes an optimizer declares, and bytes it takes.

In a process of its own, with an evaluator that holds nothing. One that declares nothing is held to a few
vectors.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from pipeline.entry_points import load
from pipeline.errors import guarded
from pipeline.optimizer import Candidate, Move, Problem
from pipeline.peak_memory import PeakMemory
from pipeline.registry import Spec, create, declared_bytes

VECTORS = 4  # float32 vectors that whoever declares nothing may hold, and that the adapter of AskTell does
STEPS = 3


class Hollow:
    """An `Evaluator` without a model: losses fall by what was asked before."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._asked = 0

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        self._asked += len(candidates)
        for candidate in candidates:  # one at a time, as an engine reads them
            getattr(candidate, "coordinates", None)
        return [1.0 / (self._asked + i * 7 % 5) for i in range(len(candidates))]

    def move(self, move: Move) -> None:
        pass

    def place(self, coordinates: Tensor) -> None:
        pass

    def gradient(self) -> tuple[float, list[Tensor]]:
        return 1.0, [torch.ones(self._size)]

    def tensors(self) -> list[Tensor]:
        return [torch.zeros(self._size)]


def measured(spec: Spec, size: int) -> tuple[int, int]:
    """Bytes declared for ``size`` coordinates, the adapter's vectors included, and bytes that steps take."""
    budget = 1000 * STEPS
    small = Problem(8, "full", budget, 0)
    create(spec, small).step(Hollow(8))  # imports
    gc.collect()
    problem = Problem(size, "full", budget, 0)
    declared = declared_bytes(spec, load("optimizer", spec.backend), problem) or 0
    before = psutil.Process().memory_info().rss
    with PeakMemory(torch.device("cpu")) as peak:
        optimizer = create(spec, problem)
        for _ in range(STEPS):
            optimizer.step(Hollow(size))
    return declared + VECTORS * 4 * size, int(peak.mib * 2**20) - before


if __name__ == "__main__":
    guarded(lambda: print(json.dumps(measured(Spec.parse(sys.argv[1]), int(sys.argv[2])))))
