"""Does it pay to optimise the metric itself? ``python -m benchmarks.objectives [--only NAME] [--json]``.

The sentiment task of the default run, over the head, from the weights that ``dvc repro`` pretrained; whole,
where the metric is accuracy, and with nine in ten of the positive texts left out of every split, where it is
macro F1. Every objective gets the same batches, budget and search: the same points of epsilon and learning
rate, of which the one with the best metric on validation is taken, by a seed that is not among those
reported. The figures are the metric on the test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import qmc
from sklearn.metrics import accuracy_score, f1_score

from benchmarks.convergence import Setting, setting
from benchmarks.harness import Row, main, note
from pipeline import objective
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.noise import derive
from pipeline.optimizer import BudgetSpent, Problem, Stalled
from pipeline.registry import Spec, create
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import shuffled

BUDGET = 20_000
BATCH = 64
POINTS = 8
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 10
EPSILON, RATE = (1e-3, 1.0), (1e-4, 1e-1)
OBJECTIVES = ("cross_entropy", "error", "f1", "margin", "squared_error")


@dataclass(frozen=True)
class Texts:
    """The rows of a split: their features, float32 ``[rows, hidden]``, and labels, int64 ``[rows]``."""

    features: torch.Tensor
    labels: torch.Tensor

    def thinned(self) -> Texts:
        """Without nine in ten of the rows of the last label."""
        last = (self.labels == self.labels.max()).nonzero().squeeze(-1)
        kept = torch.ones(len(self.labels), dtype=torch.bool)
        kept[last[torch.arange(len(last)) % 10 != 0]] = False
        return Texts(self.features[kept], self.labels[kept])


Splits = tuple[Texts, Texts, Texts]
Metric = Callable[[np.ndarray, np.ndarray], float]


def _macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    return float(f1_score(true, predicted, average="macro"))


METRICS: dict[str, Metric] = {"accuracy": accuracy_score, "macro_f1": _macro_f1}


@functools.cache
def splits(device: torch.device) -> Splits:
    """Training, validation and test texts of the task."""
    begin = setting(device).begin

    @torch.inference_mode()
    def texts(batches: list[Batch]) -> Texts:
        found = [begin.model.features(batch.to(device)) for batch in batches]
        return Texts(torch.cat(found).cpu(), torch.cat([batch.targets for batch in batches]))

    return texts(begin.train), texts(begin.validation), texts(begin.test)


class _Kept(TaskModel):
    """The head alone: what it reads of a batch are its inputs."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = torch.nn.Identity(), head

    def features(self, batch: Batch) -> torch.Tensor:
        return batch.inputs["features"]

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(features)
        return logits


def trained(at: Setting, texts: Texts, wanted: str, epsilon: float, rate: float, seed: int) -> bool:
    """Moves the head from its start by the whole budget; whether it stayed finite."""
    at.space.restore(at.before)
    at.space._start = {}
    engine = Engine(
        _Kept(at.begin.model.get_submodule("classifier")), at.space, BUDGET, seed, objective.parse(wanted)
    )
    problem = Problem(at.space.size, at.space.kind, BUDGET, seed, at.space.device)
    optimizer = create(Spec.parse(f"spsa,epsilon={epsilon},learning_rate={rate}"), problem)
    step = 0
    try:
        while True:
            rows = torch.tensor(shuffled(len(texts.labels), BATCH, derive(seed, 1), step))
            batch = Batch({"features": texts.features[rows]}, texts.labels[rows])
            optimizer.step(engine.bind(batch, step))
            step += 1
    except (BudgetSpent, Stalled):  # a run that stalls keeps what it has
        return True
    except UserError:  # it diverged
        return False
    finally:
        engine.close()


@torch.inference_mode()
def measured(at: Setting, texts: Texts, metric: Metric) -> float:
    """The metric of the head as it is."""
    logits = at.begin.model.outputs(texts.features.to(at.space.device)).cpu()
    return metric(texts.labels.numpy(), logits.argmax(-1).numpy())


def _points() -> list[tuple[float, float]]:
    unit = qmc.Sobol(2, seed=0).random(POINTS)
    low, high = np.log([[EPSILON[0], RATE[0]], [EPSILON[1], RATE[1]]])
    return [(float(e), float(r)) for e, r in np.exp(low + unit * (high - low))]


def row(data: str, wanted: str, metric_name: str, device: torch.device) -> Row | None:
    """The test's metric of an objective at its best point, over the seeds."""
    at, metric = setting(device), METRICS[metric_name]
    train, validation, test = splits(device)
    if data == "thinned":
        train, validation, test = train.thinned(), validation.thinned(), test.thinned()
    tried = {}
    for epsilon, rate in _points():
        if trained(at, train, wanted, epsilon, rate, TUNING_SEED):
            tried[epsilon, rate] = measured(at, validation, metric)
    if not tried:
        note(f"{data}, {wanted}: diverged at every point")
        return None
    epsilon, rate = max(tried, key=lambda point: tried[point])
    note(f"{data}, {wanted}: epsilon {epsilon:.3g}, rate {rate:.3g}, validation {tried[epsilon, rate]:.4f}")
    found = []
    for seed in SEEDS:
        if not trained(at, train, wanted, epsilon, rate, seed):
            note(f"{data}, {wanted}: seed {seed} diverged")
        found.append(measured(at, test, metric))
    return Row.of(f"{metric_name}/{data}/{wanted}", "", found)


if __name__ == "__main__":
    settings = {"whole": "accuracy", "thinned": "macro_f1"}
    main(
        {
            f"{data}/{wanted}": functools.partial(row, data, wanted, metric)
            for data, metric in settings.items()
            for wanted in OBJECTIVES
        }
    )
