"""What a task of a user's file gives, held against what `Task` asks for."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tasks.base import Batch, Start, TaskModel
from pipeline.user_code import Reference


def check_start(task: str, start: Start, split: str) -> None:
    """Tries the model of a user's ``task`` on the first batch of ``split``; a plugin's is not looked at.

    Raises:
        UserError: there is no such batch, or it and the model's outputs do not fit each other.
    """
    reference = Reference.parse(task)
    if reference is None:
        return
    batches: list[Batch] = getattr(start, split)
    if not batches:
        raise UserError(f"{reference} gave a Start without batches to measure on: {split} is empty")
    if start.examiner is None:
        _check_outputs(reference, start.model.eval(), batches[0])


@torch.inference_mode()
def _check_outputs(reference: Reference, model: TaskModel, batch: Batch) -> None:
    targets: Any = batch.targets
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        made = (
            f"{targets.dtype} {tuple(targets.shape)}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise UserError(f"{reference}: a batch's targets are {made}; they must be int64 [outputs]")
    logits = model(batch.to(next(model.parameters()).device))
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(targets):
        raise UserError(
            f"{reference}: the model gives {shape} for {len(targets)} targets; it must give logits "
            "[outputs, classes]"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise UserError(
            f"{reference}: targets lie between {int(targets.min())} and {int(targets.max())}, and the model "
            f"tells {logits.shape[1]} classes apart: 0 to {logits.shape[1] - 1}"
        )


def checked_figures(task: str, found: Any) -> dict[str, dict[str, float]]:
    """What ``yardsticks`` of ``task`` gave: figures by name, by yardstick.

    Raises:
        UserError: it is anything else.
    """
    wanted = f'{task} gave %s from yardsticks(); it must give {{"name": {{"accuracy": 0.5}}}}, or {{}}'
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise UserError(wanted % f"a {type(found).__name__}")
    for figures in found.values():
        for name, value in figures.items():
            if not isinstance(value, Real):
                raise UserError(wanted % f"{name}, a {type(value).__name__},")
    return {name: {key: float(value) for key, value in each.items()} for name, each in found.items()}
