"""Objectives from a user's file: what goes wrong in one costs one line that says where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pipeline import user_code
from pipeline.errors import UserError
from pipeline.objective.base import AnyObjective, judge
from pipeline.objective.texts import TextScore
from pipeline.tasks.base import Asked, Batch
from pipeline.user_code import Reference


class UsersObjective:
    """The objective on outputs that ``reference`` names, watched."""

    def __init__(self, inner: AnyObjective, reference: Reference) -> None:
        self._inner = inner
        self._reference = reference

    def on(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The objective over ``batch``.

        Raises:
            UserError: where the file raises, here or in what is returned, which also checks what it gives.
        """
        with user_code.watched(self._reference, f"at a batch of targets {tuple(batch.targets.shape)}"):
            judged = judge(self._inner, batch)

        def watched(logits: Tensor) -> Tensor:
            finite = bool(logits.detach().isfinite().all())  # it may be overwritten
            shape = tuple(logits.shape)
            at = f"at logits {shape} and targets {tuple(batch.targets.shape)}"
            with user_code.watched(self._reference, at):
                losses = judged(logits)
            if not isinstance(losses, Tensor) or losses.shape != shape[:-2]:
                made = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                wanted = f"a loss for each of {shape[0]} candidates" if len(shape) > 2 else "one loss"
                raise UserError(
                    f"the objective {self._reference} gave {made} {at}; "
                    f"it must give a tensor of {wanted}, of the shape {shape[:-2]}"
                )
            if finite and not bool(losses.detach().isfinite().all()):
                bad = "NaN" if bool(losses.detach().isnan().any()) else "an infinite loss"
                raise UserError(
                    f"the objective {self._reference} gave {bad} at finite logits {shape}: "
                    "look for a division by zero or the logarithm of one"
                )
            return losses

        return watched


class UsersScores:
    """The score of texts that ``reference`` names, a class with ``scores``, watched."""

    def __init__(self, inner: TextScore, reference: Reference) -> None:
        self._inner = inner
        self._reference = reference

    def scores(self, asked: Asked, completions: Sequence[str]) -> list[float]:
        """One for each completion.

        Raises:
            UserError: where the file raises, or gives anything but as many finite numbers.
        """
        with user_code.watched(self._reference, f"at {len(completions)} completions"):
            found = [float(each) for each in self._inner.scores(asked, completions)]
        if len(found) != len(completions):
            raise UserError(
                f"the objective {self._reference} gave {len(found)} scores of {len(completions)} completions"
            )
        for score in found:
            if not math.isfinite(score):
                raise UserError(
                    f"the objective {self._reference} gave the score {score}; each must be finite"
                )
        return found
