"""Objectives on texts: scores of what the model writes, which are maximised.

A score is a function ``(prompt, completion)`` or ``(prompt, completion, target)`` that gives a number for one
text; or a class, built as other objectives' classes are, with a method ``scores`` for several.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from pipeline import user_code
from pipeline.errors import UserError
from pipeline.tasks.base import Asked
from pipeline.user_code import Reference

_SHOWN = 60  # characters of a text in an error


@runtime_checkable
class TextScore(Protocol):
    """A score of several texts at once."""

    def scores(self, asked: Asked, completions: Sequence[str]) -> list[float]:
        """One for each completion, the larger the better."""
        ...


class TextObjective:
    """Scores, weighted and added; their negative mean is what is minimised."""

    def __init__(self, parts: Sequence[tuple[float, TextScore]]) -> None:
        self.parts = parts

    def scores(self, asked: Asked, completions: Sequence[str]) -> list[float]:
        """Of each completion.

        Raises:
            UserError: a score that is no finite number, or that fails; the line says at which text.
        """
        each = [[weight * s for s in part.scores(asked, completions)] for weight, part in self.parts]
        return [sum(of_one) for of_one in zip(*each, strict=True)]

    def loss(self, asked: Asked, completions: Sequence[str]) -> float:
        """The negative mean score."""
        scores = self.scores(asked, completions)
        return -math.fsum(scores) / len(scores)


def is_score(function: Callable[..., Any]) -> bool:
    """Whether a function scores texts, by the names of what it takes."""
    return positional(function)[:2] == ["prompt", "completion"]


def positional(function: Callable[..., Any]) -> list[str]:
    """The names of a function's positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


class Each:
    """The `TextScore` of a function of one text; of several targets the one that scores best counts.

    ``reference`` says that it is of a user's file."""

    def __init__(
        self, function: Callable[..., Any], name: str, options: dict[str, Any], reference: Reference | None
    ) -> None:
        self._function = function
        self._takes_target = len(positional(function)) > 2
        self._name = name
        self._options = options
        self._reference = reference

    def scores(self, asked: Asked, completions: Sequence[str]) -> list[float]:
        if self._takes_target and asked.references is None:
            raise UserError(
                f"the objective {self._name} compares with a target text, and the prompts have none: "
                "name their column with --label"
            )
        targets = asked.references or (("",),) * len(completions)
        return [
            max(self._one(prompt, completion, target) for target in several)
            for prompt, completion, several in zip(asked.prompts, completions, targets, strict=True)
        ]

    def _one(self, prompt: str, completion: str, target: str) -> float:
        arguments = (prompt, completion, target) if self._takes_target else (prompt, completion)
        where = f"at the prompt {_shown(prompt)} and the completion {_shown(completion)}"
        try:
            value = self._function(*arguments, **self._options)
        except UserError:
            raise
        except Exception as error:
            if self._reference is None:
                raise
            raise UserError(f"{user_code.place(error, self._reference.path)} ({where})") from error
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, Tensor):
            raise UserError(
                f"the objective {self._name} gave a tensor of shape {tuple(value.shape)} {where}; "
                "it must give one number"
            )
        if not isinstance(value, Real | np.bool_):
            kind = type(value).__name__
            raise UserError(f"the objective {self._name} gave a {kind} {where}; it must give one number")
        number = float(value)
        if not math.isfinite(number):
            raise UserError(f"the objective {self._name} gave {number} {where}; it must give a finite number")
        return number


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= _SHOWN else f"'{line[:_SHOWN].rstrip()} …'"
