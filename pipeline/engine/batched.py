"""Many candidates of the head in one batched forward over features that are computed once.

A head is small and its features are given, so what a candidate costs one by one is calls, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.objective import cross_entropy
from pipeline.optimizer import Candidate
from pipeline.space import Space
from pipeline.tasks.base import TaskModel

_ELEMENTS = 2**24  # of stacked weights and logits held at once: 64 MiB in float32


class BatchedHead:
    """Scores candidates of ``space``, which holds parameters of the head alone."""

    def __init__(self, model: TaskModel, space: Space) -> None:
        self._outputs = _Outputs(model)
        self._space = space

    def losses(self, features: Tensor, targets: Tensor, candidates: Sequence[Candidate]) -> Tensor:
        """The objective at each candidate: float32 ``[candidates]``."""
        at_once = max(1, _ELEMENTS // (self._space.elements + features.numel()))
        chunks = (candidates[i : i + at_once] for i in range(0, len(candidates), at_once))
        return torch.cat(list(self._scored(features, targets, chunks)))

    def _scored(
        self, features: Tensor, targets: Tensor, chunks: Iterator[Sequence[Candidate]]
    ) -> Iterator[Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(self._outputs, weights, (features,))
            return cross_entropy(logits, targets)

        for chunk in chunks:
            weights = {f"model.{name}": value for name, value in self._space.stacked(chunk).items()}
            yield torch.vmap(loss)(weights)


class _Outputs(nn.Module):
    """The head of a model as a module of its own."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model.outputs(features)
