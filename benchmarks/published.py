"""The published MeZO step (Malladi et al. 2023, algorithm 1), written from its description.

Every parameter is perturbed in place with ``torch.normal`` from one seed: +ε, −2ε, +ε, and once more for the
update. The loss is that of the model as it stands, logits of every position included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


class PublishedMeZO:
    """One model, one step after another."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, epsilon: float, learning_rate: float
    ) -> None:
        torch.nn.Module.to(model, device).train(False)
        self.model = model
        self._parameters = [parameter.data for parameter in model.parameters()]
        self._epsilon = epsilon
        self._learning_rate = learning_rate

    @torch.inference_mode()
    def step(self, inputs: dict[str, Tensor], labels: Tensor, seed: int) -> float:
        """One update; ``labels`` is −100 where nothing is asked. The mean of the two losses."""
        self._add(seed, self._epsilon)
        plus = float(self.model(**inputs, labels=labels).loss)
        self._add(seed, -2 * self._epsilon)
        minus = float(self.model(**inputs, labels=labels).loss)
        self._add(seed, self._epsilon)
        projected_grad = (plus - minus) / (2 * self._epsilon)
        self._add(seed, -self._learning_rate * projected_grad)
        return (plus + minus) / 2

    def _add(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for data in self._parameters:
            z = torch.normal(mean=0.0, std=1.0, size=data.shape, device=data.device, dtype=data.dtype)
            data.add_(z, alpha=scale)
