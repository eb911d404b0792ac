"""What the engine asks of an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from pipeline.errors import UserError
from pipeline.objective.texts import TextObjective
from pipeline.tasks.base import Batch


class Objective(Protocol):
    """A function of logits ``[candidates, outputs, classes]`` and targets ``[outputs]``: ``[candidates]``."""

    def __call__(self, logits: Tensor, targets: Tensor, /) -> Tensor: ...


@runtime_checkable
class BatchObjective(Protocol):
    """An objective that looks at the batch before its outputs are there."""

    def on(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The loss of logits of ``batch``."""
        ...


AnyObjective = Objective | BatchObjective | TextObjective


def judge(objective: AnyObjective, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The loss that ``objective`` finds in logits of ``batch``.

    Raises:
        UserError: it scores texts.
    """
    if isinstance(objective, TextObjective):
        raise UserError("an objective on texts is added to others on texts only, not to one on outputs")
    if isinstance(objective, BatchObjective):
        return objective.on(batch)
    plain = objective
    return lambda logits: plain(logits, batch.targets)
