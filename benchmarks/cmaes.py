"""Our CMA-ES beside others: ``python -m benchmarks.cmaes [--only NAME] [--json]``.

``time/…`` is in `generation_time`, ``bbob/…`` in `bbob`: both are beside libraries run here and now.

``evals/<variant>/<function>/<d>``, evaluations to f < 1e-8: x0 = 1 and σ = 0.5 (Rosenbrock: 0 and 0.1), the
default population, five seeds, candidates of float64. The cap is five times the reference; a run that does
not arrive counts as it and is named on stderr. ``restarts``: Rastrigin, IPOP,
each start uniform in ±5, σ = 2.

``memory_vectors/<variant>/<d>``: what steps take above the process before, in float32 vectors of that length,
the pipeline's own (the start point, the point to move to) included, each candidate read once.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import bbob, generation_time
from benchmarks.harness import Row, main, note
from pipeline.optimizer import AskTell, Problem, Stalled
from plugins.cmaes import cmaes
from plugins.cmaes.full import CMA
from plugins.cmaes.options import Options
from plugins.cmaes.restarts import Restarts

SEEDS = range(5)
TARGET = 1e-8

Function = Callable[[Tensor], Tensor]
"""Points ``[λ, d]`` to losses ``[λ]``."""


def sphere(x: Tensor) -> Tensor:
    return x.square().sum(1)


def ellipsoid(x: Tensor) -> Tensor:
    d = x.shape[1]
    return (10 ** (6 * torch.arange(d, dtype=x.dtype) / (d - 1)) * x.square()).sum(1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def rastrigin(x: Tensor) -> Tensor:
    return 10 * x.shape[1] + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum(1)


def cigar(x: Tensor) -> Tensor:
    """Rotated: its long axis lies along no coordinate."""
    y = x @ _rotation(x.shape[1])
    return y[:, 0].square() + 1e6 * y[:, 1:].square().sum(1)


@functools.cache
def _rotation(size: int) -> Tensor:
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    axes: Tensor = torch.linalg.qr(drawn)[0]
    return axes


# variant, function, dimension, and what others need: ../shared/FIELD.md section 4; of VkD, pycma's own
CELLS: list[tuple[str, Function, int, int]] = [
    ("CMA", sphere, 10, 1360),
    ("CMA", ellipsoid, 10, 3870),
    ("CMA", rosenbrock, 10, 4990),
    ("CMA", sphere, 20, 2544),
    ("CMA", ellipsoid, 20, 13116),
    ("CMA", rosenbrock, 20, 16236),
    ("CMA", sphere, 100, 10744),
    ("CMA", ellipsoid, 100, 292400),
    ("CMA", rosenbrock, 100, 394383),
    ("SepCMA", sphere, 100, 10047),
    ("SepCMA", ellipsoid, 100, 27404),
    ("VkD", cigar, 20, 6440),
    ("LMMA", sphere, 128, 11349),
    ("LMMA", rosenbrock, 128, 429000),
]
RESTARTS = ("restarts", rastrigin, 10, 61000)


def evaluations(method: AskTell, function: Function, at_most: int) -> float:
    """Evaluations until a candidate is below `TARGET`; ``at_most`` where none is."""
    count = 0
    while count < at_most:
        try:
            candidates = method.ask()
        except Stalled as stalled:
            note(str(stalled))
            return at_most
        losses = function(torch.stack([candidate.coordinates for candidate in candidates])).tolist()
        for index, loss in enumerate(losses):
            if loss < TARGET:
                return count + index + 1
        method.tell(candidates, losses)
        count += len(losses)
    note(f"did not arrive in {at_most:,}")
    return at_most


def one(variant: str, function: Function, size: int, cap: int, seed: int) -> float:
    shift, sigma = (0.0, 0.1) if function is rosenbrock else (1.0, 0.5)
    method = cmaes(Problem(size, "benchmark", cap, seed), name=variant, sigma=sigma, dtype="float64")
    return evaluations(method, lambda x: function(x + shift), cap)


def restarted(function: Function, size: int, cap: int, seed: int) -> float:
    def start(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + number)
        return torch.rand(size, generator=generator, dtype=torch.float64) * 10 - 5

    problem = Problem(size, "benchmark", cap, seed)
    return evaluations(
        Restarts("ipop", CMA, problem, Options(sigma=2.0, dtype="float64"), start), function, cap
    )


def cell(variant: str, function: Function, size: int, reference: int, device: torch.device) -> Row:
    torch.set_num_threads(1)
    name = f"evals/{variant}/{function.__name__}/{size}"
    run = functools.partial(one, variant) if variant != "restarts" else restarted
    found = [run(function, size, 5 * reference, seed) for seed in SEEDS]
    note(f"{name}: {found}, others {reference}")
    return Row.of(name, "evaluations", found)


def memory_vectors(variant: str, size: int, device: torch.device) -> Row:
    """Of three processes."""
    command = [sys.executable, "-P", "-m", "pipeline.testing.memory", f"cmaes:{variant}", str(size)]
    found = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout)[1] / (4 * size))
    return Row.of(f"memory_vectors/{variant}/{size}", "vectors", found)


if __name__ == "__main__":
    main(
        generation_time.rows()
        | {
            f"memory_vectors/{variant}/{size}": functools.partial(memory_vectors, variant, size)
            for variant, size in (("LMMA", 10**6), ("LMMA", 10**7), ("SepCMA", 10**7))
        }
        | {
            f"evals/{each[0]}/{each[1].__name__}/{each[2]}": functools.partial(cell, *each)
            for each in [*CELLS, RESTARTS]
        }
        | bbob.rows()
    )
