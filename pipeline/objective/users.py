"""An objective from a user's file: what goes wrong in it costs one line that says where."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import user_code
from pipeline.errors import UserError
from pipeline.objective.base import AnyObjective, judge
from pipeline.tasks.base import Batch
from pipeline.user_code import Reference


class UsersObjective:
    """The objective that ``reference`` names, watched."""

    def __init__(self, inner: AnyObjective, reference: Reference) -> None:
        self._inner = inner
        self._reference = reference

    def on(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The objective over ``batch``.

        Raises:
            UserError: from what it gives, where the file raises, or makes no number of finite logits.
        """
        judged = judge(self._inner, batch)

        def watched(logits: Tensor) -> Tensor:
            finite = bool(logits.detach().isfinite().all())  # it may be overwritten
            shape = tuple(logits.shape)
            try:
                losses = judged(logits)
            except UserError:
                raise
            except Exception as error:
                said = user_code.place(error, self._reference.path)
                raise UserError(
                    f"{said} (the objective {self._reference.name}, at logits {shape} and targets "
                    f"{tuple(batch.targets.shape)})"
                ) from error
            if finite and isinstance(losses, Tensor) and bool(torch.isnan(losses).any()):
                raise UserError(
                    f"the objective {self._reference} gave NaN at finite logits {shape}: "
                    "look for a division by zero or the logarithm of one"
                )
            return losses

        return watched
