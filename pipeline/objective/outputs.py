"""Objectives on outputs: functions of logits ``[…, outputs, classes]`` and targets ``[outputs]``."""

from __future__ import annotations

from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets in nats."""
    if logits.requires_grad:
        several = targets.expand(logits.shape[:-1])
        each = nn.functional.cross_entropy(logits.float().flatten(0, -2), several.flatten(), reduction="none")
        return each.view(several.shape).mean(-1)
    logits = logits.float()
    chosen = _of_targets(logits, targets)
    largest = logits.amax(-1)
    # in place: fresh memory of a vocabulary's width would cost more than the arithmetic
    exponents = logits.sub_(largest[..., None]).exp_()
    # the difference first: a small loss would drown in logits that are large
    return exponents.sum(-1).log_().sub_(chosen.sub_(largest)).mean(-1)


def error(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of outputs whose largest logit is not the target's (0–1 loss): one minus accuracy."""
    return (logits.argmax(-1) != targets).float().mean(-1)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of Σ (predicted probability − target)² over the classes (Brier 1950): from 0 to 2."""
    probabilities = logits.float().softmax(-1)
    return (probabilities.square().sum(-1) - 2.0 * _of_targets(probabilities, targets) + 1.0).mean(-1)


def margin(logits: Tensor, targets: Tensor, *, width: float = 1.0) -> Tensor:
    """Mean hinge: what the target's logit lacks to be ``width`` above all others (Crammer & Singer 2001)."""
    logits = logits.float()
    chosen = _of_targets(logits, targets)
    others = logits.scatter(-1, targets.expand(logits.shape[:-1])[..., None], float("-inf")).amax(-1)
    return (width + others - chosen).clamp(min=0.0).mean(-1)


def cosine(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine distance between predicted probabilities and targets: from 0 to 1."""
    probabilities = logits.float().softmax(-1)
    lengths: Tensor = probabilities.square().sum(-1).sqrt()
    return (1.0 - _of_targets(probabilities, targets) / lengths).mean(-1)


def f1(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus macro F1 on the batch: the mean over the classes that are a target or predicted."""
    predicted = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
    true = nn.functional.one_hot(targets, logits.shape[-1]).bool()
    hits = (predicted & true).sum(-2)
    either = predicted.sum(-2) + true.sum(-2)  # true positives twice, and every miss once
    return 1.0 - (2.0 * hits / either.clamp(min=1)).sum(-1) / (either > 0).sum(-1)


def _of_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Of ``[…, outputs, classes]`` those of each output's target: ``[…, outputs]``."""
    return values.gather(-1, targets.expand(values.shape[:-1])[..., None]).squeeze(-1)
