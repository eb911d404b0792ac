"""What a method itself costs: ``python -m benchmarks.asktell [--only NAME] [--json] [--device DEVICE]``.

Seconds of ask and tell for one candidate, as a share of one bare forward pass of the 22.7M model (16 texts of
64 tokens), which is timed in turn with them. Losses are noise: nothing is scored, so nothing else is timed.
What a method refuses, such as a space that it cannot hold, is a note on stderr and no row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, partial

import torch

from benchmarks.harness import Row, interleaved, main, note, ratios
from benchmarks.step import bert, masked_batch
from pipeline.errors import UserError
from pipeline.optimizer import AskTell, AskTellOptimizer, Problem
from pipeline.registry import Spec, create
from pipeline.tasks.language_modelling import LanguageModel

METHODS = (
    "nevergrad:OnePlusOne",
    "nevergrad:DE",
    "nevergrad:TBPSA",
    "nevergrad:PSO",
    "nevergrad:CMA",
    "cmaes:SepCMA",
    "cyberagent:SepCMA",  # where tests/plugins/cyberagent is installed
)
DIMENSIONS = {"1e3": 1_000, "1e5": 100_000, "1e6": 1_000_000}
WARM = 48  # candidates that are not counted: more than the first populations of DE and PSO, drawn cheaply
CANDIDATES, ROUNDS = 8, 5  # at least so many a round
PASSES = 1_000  # a short run's budget: more than is spent here, and some methods hold what grows with it


def share(spec: str, dimension: str, device: torch.device) -> Row | None:
    """Ask and tell of one candidate over one forward pass."""
    try:
        candidates, work = asking_telling(spec, DIMENSIONS[dimension], device)
        seconds = interleaved({"ask and tell": work, "forward": forward(device)}, ROUNDS, device)
    except UserError as error:
        note(f"{spec} at {dimension}: {error}")
        return None
    each = [second / candidates for second in seconds["ask and tell"]]
    return Row.of(f"asktell/{spec}/{dimension}", "of a forward", ratios(each, seconds["forward"]))


def asking_telling(spec: str, size: int, device: torch.device) -> tuple[int, Callable[[], None]]:
    """How many candidates a call of the function asks for and tells, and the function; the method is warm.

    Raises:
        UserError: the method refuses.
    """
    optimizer = create(Spec.parse(spec), Problem(size, "full", PASSES, 0, device))
    if not isinstance(optimizer, AskTellOptimizer):
        raise UserError(f"'{spec}' owns its step: there is no ask and tell to time")
    method: AskTell = optimizer.method
    population, noise = len(method.ask()), random.Random(0)
    asks = math.ceil(CANDIDATES / population)

    def work(asks: int = asks) -> None:
        for _ in range(asks):
            asked = method.ask()
            method.tell(asked, [noise.gauss(0.0, 1.0) for _ in asked])

    work(math.ceil(WARM / population))
    return asks * population, work


@cache
def forward(device: torch.device) -> Callable[[], None]:
    """One bare forward pass, as transformers makes it."""
    model, batch = LanguageModel(bert("22m")).to(device), masked_batch(device)[0]

    @torch.inference_mode()
    def work() -> None:
        model(batch)

    return work


if __name__ == "__main__":
    main(
        {
            f"asktell/{spec}/{dimension}": partial(share, spec, dimension)
            for spec in METHODS
            for dimension in DIMENSIONS
        }
    )
