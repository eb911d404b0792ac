"""A model's outputs and their targets to one scalar, always minimised."""

from __future__ import annotations

from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats: logits ``[outputs, classes]``, targets int64 ``[outputs]``."""
    return nn.functional.cross_entropy(logits.float(), targets)
