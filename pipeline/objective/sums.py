"""Weighted sums: ``cross_entropy+0.1*error``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.objective.base import AnyObjective, judge
from pipeline.registry import split_unquoted
from pipeline.tasks.base import Batch

# a plus sign may also be part of a number, as in 1e+3
_PLUS = re.compile(r"\+(?=\s*(?:[\d.]+(?:[eE]-?\d+)?\s*\*)?\s*[A-Za-z_./~])")
_WEIGHTED = re.compile(r"\s*([^*,]+?)\s*\*\s*(.+)")


def terms(text: str) -> list[tuple[float, str]]:
    """The weights and the objectives of a sum; of what is no sum, itself once.

    Raises:
        UserError: a weight that is no number above 0.
    """
    return [_term(part, text) for part in split_unquoted(text, _PLUS)]


def _term(part: str, text: str) -> tuple[float, str]:
    found = _WEIGHTED.fullmatch(part)
    if not found:
        return 1.0, part.strip()
    try:
        weight = float(found[1])
    except ValueError:
        weight = 0.0
    if not 0.0 < weight < float("inf"):
        raise UserError(
            f"'{found[1]}' in the objective '{text}' is no weight above 0; write cross_entropy+0.1*error"
        )
    return weight, found[2]


class Sum:
    """Objectives on outputs, weighted and added."""

    def __init__(self, parts: Sequence[tuple[float, AnyObjective]]) -> None:
        self._parts = parts

    def on(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The sum over ``batch``."""
        judges = [(weight, judge(objective, batch)) for weight, objective in self._parts]

        def summed(logits: Tensor) -> Tensor:
            # an objective may overwrite logits, if not those that need a gradient
            rest = [logits.clone() if not logits.requires_grad else logits for _ in judges[1:]]
            each = [weight * judged(of) for (weight, judged), of in zip(judges, [*rest, logits], strict=True)]
            return torch.stack(each).sum(0)

        return summed
