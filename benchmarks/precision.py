"""What becomes of small steps in half precision: ``python -m benchmarks.precision [--only NAME] [--json]``.

Steps along seeds, of the size of a fine-tuning run's, are added to weights of MiniLM's shape: rounded to
nearest, and rounded at random as `Space.move` does. What float32 weights make of the same steps is the truth.
Also what a step in bfloat16 costs beside one in float32.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from benchmarks.harness import Row, interleaved, main, ratios
from benchmarks.step import Ours, bert
from pipeline import noise
from pipeline import space as spaces
from pipeline.optimizer import Move
from pipeline.space import Space
from pipeline.tasks.language_modelling import LanguageModel

STEPS = 200
LEARNING_RATE, SLOPE = 1e-6, 40.0  # MeZO's rate; a projected gradient as measured on a pretrained MiniLM
SEEDS = (0, 1, 2)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _space(dtype: torch.dtype, weights: torch.dtype, device: torch.device) -> Space:
    model = LanguageModel(bert("22m")).to(weights).to(dtype).to(device)
    return spaces.build(spaces.parse("full"), model, 0)


def _coefficients(seed: int) -> list[float]:
    slopes = torch.randn(STEPS, generator=torch.Generator().manual_seed(seed))
    return (-LEARNING_RATE * SLOPE * slopes).tolist()


def _moved(space: Space, seed: int, how: str) -> torch.Tensor:
    before = torch.cat([segment.flat for segment in space.segments]).clone()
    for step, coefficient in enumerate(_coefficients(seed)):
        if how == "stochastic":
            space.move(Move([1000 * seed + step], [coefficient], "rademacher"))
            continue
        for segment in space.segments:
            change = torch.zeros(len(segment.flat), device=space.device)
            noise.add(change, 1000 * seed + step, segment.offset, "rademacher", coefficient, out=change)
            segment.flat.add_(change.to(segment.flat.dtype) if how == "nearest" else change)
    return torch.cat([segment.flat for segment in space.segments]).float() - before.float()


@cache
def kept(name: str, device: torch.device) -> dict[str, list[float]]:
    """Per way of rounding: the share of the true movement that is kept, seed by seed, and the error."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        truth = _moved(_space(torch.float32, DTYPES[name], device), seed, "float32")
        for how in ("nearest", "stochastic"):
            moved = _moved(_space(DTYPES[name], DTYPES[name], device), seed, how)
            share = float((moved.double() @ truth.double()) / truth.double().square().sum())
            error = float((moved - truth).double().norm() / truth.double().norm())
            found.setdefault(f"kept_{how}", []).append(share)
            found.setdefault(f"error_{how}", []).append(error)
    return found


def row(dtype: str, figure: str, device: torch.device) -> Row:
    return Row.of(f"{figure}_{dtype}", "of movement", kept(dtype, device)[figure])


def step_over_float32(device: torch.device) -> Row:
    """A step of SPSA over every parameter in bfloat16, the update included, over one in float32."""
    half = Ours("22m", device, LanguageModel(bert("22m")).to(torch.bfloat16))
    full = Ours("22m", device)
    seconds = interleaved({"half": half.step, "full": full.step}, 15, device)
    half.engine.close()
    full.engine.close()
    return Row.of("step_bfloat16_over_float32", "ratio", ratios(seconds["half"], seconds["full"]))


if __name__ == "__main__":
    figures = [f"{figure}_{how}" for figure in ("kept", "error") for how in ("nearest", "stochastic")]
    rows = {f"{figure}_{dtype}": partial(row, dtype, figure) for dtype in DTYPES for figure in figures}
    main({**rows, "step_bfloat16_over_float32": step_over_float32})
