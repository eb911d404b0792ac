"""Distillation: the outputs of another model as targets (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.layout import project_root
from pipeline.tasks.base import Batch, TaskModel

Load = Callable[[Path], TaskModel]
"""Loads a finished model of the run's task."""


class Divergence:
    """``kl``: the Kullback–Leibler divergence of the model's probabilities from its teacher's, in nats.

    ``teacher`` is a run's ``models/finetuned``, of the same task, tokenizer and labels. It reads each row of
    a data set once. At a ``temperature`` T both are softened, and the divergence is T² times as large, so
    that its gradient keeps its size.
    """

    def __init__(self, load: Load, *, teacher: str = "", temperature: float = 1.0) -> None:
        """Raises UserError where there is no such folder; the model is loaded when it is needed."""
        self._folder = found_folder(teacher, "kl,teacher=runs/NAME/models/finetuned")
        if not temperature > 0.0:
            raise UserError(f"the temperature of kl must be above 0, got {temperature:g}")
        self._load = load
        self._temperature = temperature
        self._model: TaskModel | None = None
        self._kept: dict[int, Tensor] = {}

    def on(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The divergence over ``batch``, of logits ``[…, outputs, classes]``: ``[…]``."""
        taught = self._softened(self._taught(batch))

        def divergence(logits: Tensor) -> Tensor:
            if logits.shape[-1] != taught.shape[-1]:
                raise UserError(
                    f"the teacher in {self._folder} tells {taught.shape[-1]:,} classes apart, the model "
                    f"{logits.shape[-1]:,}: they must be of the same task"
                )
            apart: Tensor = (taught.exp() * (taught - self._softened(logits))).sum(-1).mean(-1)
            return apart.mul(self._temperature * self._temperature)

        return divergence

    def _softened(self, logits: Tensor) -> Tensor:
        return (logits.float() / self._temperature).log_softmax(-1)

    @torch.inference_mode()
    def _taught(self, batch: Batch) -> Tensor:
        """The teacher's logits; rows of a data set are kept."""
        known = batch.examples is not None and all(example in self._kept for example in batch.examples)
        made: Tensor = torch.empty(0) if known else self._teacher(batch.targets.device)(batch)
        if batch.examples is None:
            return made
        if not known:
            for example, row in zip(batch.examples, made, strict=True):
                self._kept.setdefault(example, row)
        return torch.stack([self._kept[example] for example in batch.examples])

    def _teacher(self, device: torch.device) -> TaskModel:
        if self._model is None:
            self._model = self._load(self._folder).eval().to(device)
        return self._model


def found_folder(named: str, example: str) -> Path:
    """The folder of a model that an objective reads, seen from the working directory or the project.

    Raises:
        UserError: none is named, or none is there; it shows ``example``.
    """
    path = Path(named).expanduser()
    for place in (path.resolve(), project_root() / path):
        if named and place.is_dir():
            return place
    raise UserError(f"no model at '{named}' for an objective to read; write {example}")
