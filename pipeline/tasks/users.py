"""What a task of a user's file gives, held against what `Task` asks for."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tasks.base import Start
from pipeline.user_code import Reference


def checked_start(reference: Reference, start: Any, *, tested: bool) -> Start:
    """``start``, whose model has been tried on a batch; ``tested`` says that a test is to come.

    Raises:
        UserError: it is none, or its batches or its model's outputs do not fit each other.
    """
    if not isinstance(start, Start):
        raise UserError(f"{reference} gave a {type(start).__name__} from start(); it must give a Start")
    empty = [name for name in ("validation", *(["test"] if tested else [])) if not getattr(start, name)]
    if empty:
        raise UserError(f"{reference} gave a Start without batches to measure on: {' and '.join(empty)}")
    if start.examiner is None:
        _check_outputs(reference, start)
    return start


@torch.inference_mode()
def _check_outputs(reference: Reference, start: Start) -> None:
    batch = start.validation[0].to(next(start.model.parameters()).device)
    targets, logits = batch.targets, start.model(batch)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        made = (
            f"{targets.dtype} {tuple(targets.shape)}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise UserError(f"{reference}: a batch's targets are {made}; they must be int64 [outputs]")
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


def checked_figures(reference: Reference, found: Any) -> dict[str, dict[str, float]]:
    """What ``yardsticks`` gave: figures by name, by yardstick.

    Raises:
        UserError: it is anything else.
    """
    wanted = f'{reference} gave %s from yardsticks(); it must give {{"name": {{"accuracy": 0.5}}}}, or {{}}'
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise UserError(wanted % f"a {type(found).__name__}")
    for figures in found.values():
        for name, value in figures.items():
            if not isinstance(value, Real):
                raise UserError(wanted % f"{name}, a {type(value).__name__},")
    return {name: {key: float(value) for key, value in each.items()} for name, each in found.items()}
