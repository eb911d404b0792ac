"""What a replay costs beside the run: ``python -m benchmarks.replay [--only NAME] [--json]``.

Seconds to make a run's recorded steps again, over the seconds the steps took when they were scored: two-point
SPSA over every parameter of 22.7M, one direction a step, and over a head whose features are kept, eight. The
digests before and after, which do not grow with the steps, are left out.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Row, main
from benchmarks.step import TOKENS, bert, masked_batch
from pipeline import noise
from pipeline import space as spaces
from pipeline.registry import Spec
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.classification import TextClassifier
from pipeline.tasks.language_modelling import LanguageModel
from pipeline.trainer import Training, train
from pipeline.trajectory import Trajectory, redo

DIRECTIONS = {"full": 1, "head": 8}
STEPS = {"full": 64, "head": 2048}
ROUNDS = 3


def _task(space: str, device: torch.device) -> tuple[TaskModel, Batch]:
    if space == "full":
        return LanguageModel(bert("22m")).to(device), masked_batch(device)[0]
    model = TextClassifier(bert("22m").bert, 384, ["no", "yes"], pooled_layers=1).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (64, TOKENS), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, Batch(inputs, torch.randint(2, (64,), generator=generator), examples=tuple(range(64)))


def replay_share(kind: str, device: torch.device) -> Row:
    spec = Spec.parse(f"spsa,directions={DIRECTIONS[kind]},epsilon=0.001,learning_rate=1e-6")
    passes = 2 * DIRECTIONS[kind] * STEPS[kind]
    model, batch = _task(kind, device)
    training = Training(spec, spaces.parse(kind), passes, passes, 0)
    shares = []
    noise.worth_fusing = lambda elements: elements > 1e9  # as in a run of 100,000 steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trajectory.jsonl"
        for _ in range(ROUNDS + 1):  # the first compiles
            space = spaces.build(spaces.parse(kind), model, 0)
            measured: list[float] = []

            def clock(measured: list[float] = measured) -> dict[str, float]:
                measured.append(time.perf_counter())
                return {"loss": 0.0}

            train(training, model, space, lambda step: batch, clock, trajectory=path)
            started = time.perf_counter()
            redo(Trajectory.read(path).steps, space, None)
            shares.append((time.perf_counter() - started) / (measured[-1] - measured[0]))
    return Row.of(f"replay_share_{kind}", "of the run", shares[1:])


if __name__ == "__main__":
    main({f"replay_share_{kind}": partial(replay_share, kind) for kind in STEPS})
