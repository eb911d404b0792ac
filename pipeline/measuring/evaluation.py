"""Held-out figures with intervals, and the yardsticks a result stands beside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.engine import shared
from pipeline.errors import UserError
from pipeline.measuring.predictions import Predictions
from pipeline.tasks.base import Batch, Start, TaskModel, Tested


@torch.inference_mode()
def features(model: TaskModel, batches: Sequence[Batch]) -> list[Tensor]:
    """What the head reads of each batch. It can be kept for as long as nothing below the head moves."""
    device = next(model.parameters()).device
    known = shared.store(model, "held-out")
    if known is None:
        return [model.features(batch.to(device)) for batch in batches]
    found = []
    for batch in batches:
        key = shared.content(batch, range(len(batch.targets)))
        if key not in known:
            known[key] = model.features(batch.to(device))
        found.append(known[key].to(device))
    return found


@torch.inference_mode()
def predictions(
    model: TaskModel, batches: Sequence[Batch], kept: Sequence[Tensor] | None = None
) -> Predictions:
    """What ``model`` says of every target, in the batches' order.

    ``kept`` are the batches' `features`, where they are known.
    """
    device = next(model.parameters()).device
    parts = []
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        logits = model(batch) if kept is None else model.outputs(kept[number])
        parts.append(Predictions.of(logits, batch.targets))
    return Predictions.joined(parts)


def measure(model: TaskModel, batches: Sequence[Batch]) -> dict[str, float]:
    """``loss`` (nats) and ``accuracy`` over all targets."""
    return predictions(model, batches).loss_and_accuracy()


def measured(start: Start, kept: Sequence[Tensor] | None = None) -> dict[str, float]:
    """What the trainer is told of the validation split, by the task's own examiner if it has one.

    ``kept`` as in `predictions`.
    """
    if start.examiner:
        figures = start.examiner.measure(start.model, start.validation)
        if "loss" not in figures:
            raise UserError(
                f"{type(start.examiner).__name__} measures no 'loss', by which training is followed"
            )
        return figures
    return predictions(start.model, start.validation, kept).figures()


def tested(start: Start, model: TaskModel) -> Tested:
    """The held-out test of ``model``, which began as ``start``."""
    if start.examiner:
        return start.examiner.test(model, start.test)
    made = predictions(model, start.test, features(model, start.test))
    assert made.losses is not None
    return Tested(made.figures_with_intervals(), made.losses.tolist(), made.hits.float().tolist())


def majority(train: Sequence[Batch], test: Sequence[Batch]) -> dict[str, float]:
    """Always the most frequent label of the training split."""
    most, targets = _targets(train).bincount().argmax(), _targets(test)
    return Predictions(targets, most.expand_as(targets)).figures_with_intervals()


def linear_probe(
    model: TaskModel, train: Sequence[Batch], validation: Sequence[Batch], test: Sequence[Batch]
) -> dict[str, float]:
    """Logistic regression on frozen features; its regularisation is chosen on the validation split."""
    from sklearn.linear_model import LogisticRegression

    x, xv, xt = (
        torch.cat([each.float().cpu().flatten(1) for each in features(model, batches)]).numpy()
        for batches in (train, validation, test)
    )
    y, yv = (_targets(batches).numpy() for batches in (train, validation))
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in (1e-3, 1e-2, 1e-1, 1.0)]
    best = max(fits, key=lambda fit: float(fit.score(xv, yv)))
    targets = _targets(test)
    logits = torch.full((len(xt), int(max(y.max(), targets.max())) + 1), -torch.inf)
    scores = torch.from_numpy(best.decision_function(xt)).float()
    # of two classes it is the second's score above the first's; its log-probabilities would run into log(0)
    logits[:, best.classes_] = (
        scores if scores.dim() > 1 else torch.stack([torch.zeros_like(scores), scores], 1)
    )
    return Predictions.of(logits, targets).figures_with_intervals()


def _targets(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.targets for batch in batches]).cpu()
