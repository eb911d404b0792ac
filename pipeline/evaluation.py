"""Held-out figures with intervals, and the yardsticks a result stands beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.engine import shared
from pipeline.objective import cross_entropy
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
def losses_and_hits(
    model: TaskModel, batches: Sequence[Batch], kept: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Per target, in the batches' order: its loss in nats (float32) and whether it was predicted (bool).

    ``kept`` are the batches' `features`, where they are known.
    """
    device = next(model.parameters()).device
    losses, hits = [], []
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        logits = (model(batch) if kept is None else model.outputs(kept[number])).float()
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none").cpu())
        hits.append((logits.argmax(-1) == batch.targets).cpu())
    return torch.cat(losses), torch.cat(hits)


def measure(
    model: TaskModel, batches: Sequence[Batch], kept: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """``loss`` (nats) and ``accuracy`` over all targets; ``kept`` as in `losses_and_hits`."""
    losses, hits = losses_and_hits(model, batches, kept)
    return {"loss": float(losses.double().mean()), "accuracy": float(hits.double().mean())}


def measured(start: Start, kept: Sequence[Tensor] | None = None) -> dict[str, float]:
    """What the trainer is told of the validation split, by the task's own examiner if it has one.

    ``kept`` as in `losses_and_hits`.
    """
    if start.examiner:
        return start.examiner.measure(start.model, start.validation)
    return measure(start.model, start.validation, kept)


def tested(start: Start, model: TaskModel) -> Tested:
    """The held-out test of ``model``, which began as ``start``."""
    if start.examiner:
        return start.examiner.test(model, start.test)
    losses, hits = losses_and_hits(model, start.test)
    return Tested(with_interval(losses, hits), losses.tolist(), hits.float().tolist())


def measure_with_interval(model: TaskModel, batches: Sequence[Batch]) -> dict[str, float]:
    """`measure`, with ``accuracy_low`` and ``accuracy_high``."""
    return with_interval(*losses_and_hits(model, batches))


def with_interval(losses: Tensor, hits: Tensor) -> dict[str, float]:
    """``loss`` (nats) and `accuracy` of what `losses_and_hits` gave."""
    return {"loss": float(losses.double().mean()), **accuracy(hits.numpy())}


def accuracy(hits: np.ndarray) -> dict[str, float]:
    """Share of ``hits`` (bool ``[examples]``) with its 95% Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": float(hits.mean()),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
    }


def majority(train: Sequence[Batch], test: Sequence[Batch]) -> dict[str, float]:
    """Always the most frequent label of the training split."""
    most = np.bincount(_targets(train)).argmax()
    return accuracy(_targets(test) == most)


def linear_probe(
    model: TaskModel, train: Sequence[Batch], validation: Sequence[Batch], test: Sequence[Batch]
) -> dict[str, float]:
    """Logistic regression on frozen features; its regularisation is chosen on the validation split."""
    from sklearn.linear_model import LogisticRegression

    x, xv, xt = (
        torch.cat([each.float().cpu() for each in features(model, batches)]).numpy()
        for batches in (train, validation, test)
    )
    y, yv, yt = (_targets(batches) for batches in (train, validation, test))
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in (1e-3, 1e-2, 1e-1, 1.0)]
    best = max(fits, key=lambda fit: float(fit.score(xv, yv)))
    logits = torch.from_numpy(best.predict_log_proba(xt))
    loss = cross_entropy(logits, torch.from_numpy(np.searchsorted(best.classes_, yt)))
    return {"loss": float(loss), **accuracy(best.predict(xt) == yt)}


def _targets(batches: Sequence[Batch]) -> np.ndarray:
    return torch.cat([batch.targets for batch in batches]).numpy()
