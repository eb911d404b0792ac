"""A model's outputs and their targets to one scalar, always minimised: the only place that knows the sign.

An objective is a function of logits and targets. Logits are ``[candidates, outputs, classes]`` (the first
dimension may be missing, or more), targets int64 ``[outputs]``; it gives a loss for each candidate, float32
``[candidates]``. It may overwrite logits that need no gradient. It need not have a gradient: only the
yardstick asks for one.

A score of texts (`pipeline.objective.texts`) is maximised: what is minimised is its negative mean. Others of
both kinds come through the entry-point group ``pipeline.objectives``, or from a file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline import user_code
from pipeline.entry_points import load
from pipeline.errors import UserError
from pipeline.objective.base import AnyObjective, BatchObjective, Objective, judge
from pipeline.objective.outputs import cosine, cross_entropy, error, f1, margin, squared_error
from pipeline.objective.sums import Sum, terms
from pipeline.objective.teacher import Divergence, Load
from pipeline.objective.texts import Each, TextObjective, TextScore, is_score, positional
from pipeline.objective.users import UsersObjective, UsersScores
from pipeline.registry import Spec, check_options
from pipeline.tasks.base import TaskModel
from pipeline.user_code import Reference

__all__ = [
    "AnyObjective",
    "BatchObjective",
    "Divergence",
    "Objective",
    "TextObjective",
    "TextScore",
    "cosine",
    "cross_entropy",
    "error",
    "f1",
    "judge",
    "margin",
    "parse",
    "squared_error",
]


def parse(text: str, load_model: Load | None = None) -> AnyObjective:
    """The objective that ``[weight*]name[,option=value…][+…]`` names.

    ``name`` is an entry point's or ``./file.py:name``. Options are keyword-only parameters of the function
    or class behind it. ``load_model`` loads a finished model of the run's task, for objectives that ask one.

    Raises:
        UserError: no such objective or option, or one that cannot be used.
    """
    weighted = [(weight, _one(part, load_model or _no_models)) for weight, part in terms(text)]
    scores = [(weight, one) for weight, one in weighted if isinstance(one, TextScore)]
    if scores and len(scores) < len(weighted):
        raise UserError(
            f"the objective '{text}' mixes scores of texts with losses of outputs; choose one kind"
        )
    if scores:
        return TextObjective(scores)
    losses = [(weight, one) for weight, one in weighted if not isinstance(one, TextScore)]
    return losses[0][1] if len(losses) == 1 and losses[0][0] == 1.0 else Sum(losses)


def _one(text: str, load_model: Load) -> AnyObjective | TextScore:
    spec = Spec.parse(text)
    head = text.split(",")[0].strip()
    reference = Reference.parse(head)
    if reference:
        spec = Spec(head, None, spec.options)
    elif spec.name:
        raise UserError(f"objective '{text}' has no variants; write '{spec.backend}'")
    behind: Any = load("objective", spec.backend)
    options = check_options("objective", spec, behind)
    made: Any
    if isinstance(behind, type):
        with user_code.watched(reference, "when made"):
            made = behind(load_model, **options)
    elif is_score(behind):
        return Each(behind, spec.backend, options, reference)
    else:
        made = partial(behind, **options) if options else behind
        if reference:
            _check_parameters(behind, reference)
    if reference and isinstance(made, TextScore):
        return UsersScores(made, reference)
    if reference:
        return UsersObjective(made, reference)
    found: AnyObjective | TextScore = made
    return found


def _check_parameters(function: Any, reference: Reference) -> None:
    """What a function of a user's file takes says what it is: another would fail at work, in other words."""
    takes = positional(function)
    if takes != ["logits", "targets"]:
        raise UserError(
            f"{reference} takes ({', '.join(takes)}); write (logits, targets) for a loss of outputs, or "
            "(prompt, completion) or (prompt, completion, target) for a score of a text"
        )


def _no_models(folder: Path) -> TaskModel:
    raise UserError(f"{folder} cannot be asked here: there is no task that loads it")
