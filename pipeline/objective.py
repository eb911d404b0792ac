"""A model's outputs and their targets to one scalar, always minimised."""

from __future__ import annotations

from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats: logits ``[outputs, classes]``, targets int64 ``[outputs]``."""
    return nn.functional.cross_entropy(logits.float(), targets)


def cross_entropies_(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each output, float32 ``[outputs]``; ``logits`` are overwritten.

    Fresh memory of a vocabulary's width would cost more than the arithmetic.
    """
    logits = logits.float()
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    largest = logits.amax(1)
    return logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest).sub_(chosen)
