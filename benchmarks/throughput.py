"""Many directions in one pass: ``python -m benchmarks.throughput [--only NAME] [--json] [--device DEVICE]``.

Sixteen low-rank directions, each over its own copy of a batch, against plain inference over as many tokens.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from benchmarks.harness import Row, interleaved, main, ratios
from benchmarks.step import PASSES, bert, masked_batch
from pipeline import space as spaces
from pipeline.engine.batched import repeated
from pipeline.engine.evaluator import Engine
from pipeline.optimizer import LowRank, Seeded
from pipeline.tasks.base import Batch
from pipeline.tasks.language_modelling import LanguageModel

DIRECTIONS, EXAMPLES, TOKENS = 16, 4, 32


@cache
def seconds(device: torch.device) -> dict[str, list[float]]:
    """16 directions in one pass and one by one; inference by transformers' and by the engine's products."""
    model, plain = (LanguageModel(bert("22m")).to(device) for _ in range(2))
    engine = Engine(model, spaces.build(spaces.parse("full"), model, 0), PASSES, run_seed=0)
    batch = masked_batch(device, EXAMPLES, TOKENS)[0]
    many = repeated(batch, DIRECTIONS)
    candidates = [Seeded(i, 1e-3, "gaussian", LowRank(1)) for i in range(DIRECTIONS)]

    @torch.inference_mode()
    def forward(of: LanguageModel, batch: Batch) -> None:
        of(batch)

    found = interleaved(
        {
            "together": lambda: engine.losses(batch, candidates),
            "alone": lambda: [engine.losses(batch, [candidate]) for candidate in candidates],
            "bare": lambda: forward(plain, many),
            "own": lambda: forward(model, many),
        },
        11,
        device,
    )
    engine.close()
    return found


def share(of: str, name: str, device: torch.device) -> Row:
    return Row.of(name, "share", ratios(seconds(device)[of], seconds(device)["together"]))


if __name__ == "__main__":
    main(
        {
            name: partial(share, of, name)
            for name, of in {
                "batched_throughput": "bare",
                "batched_throughput_own_products": "own",
                "batched_over_one_by_one": "alone",
            }.items()
        }
    )
