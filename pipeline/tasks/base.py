"""What the engine and the trainer ask of any task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Model inputs and what they should give.

    ``inputs`` maps the model's argument names to tensors ``[examples, tokens]``. ``targets`` is int64
    ``[outputs]``. ``positions`` are the flat token positions that have a target, int64 ``[outputs]``, or None
    where each example has one. ``examples`` are row numbers in the data set, or None where the inputs change
    each time they are drawn and nothing computed from them can be kept.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    positions: Tensor | None = None
    examples: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            self.targets.to(device),
            None if self.positions is None else self.positions.to(device),
            self.examples,
        )


class TaskModel(nn.Module):
    """A model in two parts: ``features`` (the encoder) and ``outputs`` (the head).

    The split lets a search of the head alone compute the features once, and logits be computed only where
    there is a target.
    """

    encoder: nn.Module

    def features(self, batch: Batch) -> Tensor:
        """Hidden states below the head: ``[outputs, hidden]``."""
        raise NotImplementedError

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[outputs, classes]``."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[outputs, classes]``."""
        return self.outputs(self.features(batch))

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that only ``outputs`` reads."""
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def add_lora(self, rank: int, seed: int) -> None:
        """Adds low-rank factors to every linear layer of the encoder; the output is unchanged by it."""
        from pipeline.models import with_lora

        with_lora(self.encoder, rank, seed)


class BatchSource(Protocol):
    """Batches by number: the same number gives the same batch, whatever came before."""

    def __call__(self, step: int) -> Batch: ...
