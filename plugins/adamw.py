"""AdamW by backpropagation (Loshchilov & Hutter 2019): the yardstick, not a method of this project."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.optimizer import Evaluator, Problem, StepReport


class AdamW:
    """``torch.optim.AdamW`` over the searched tensors; a step counts as three forward passes.

    Args:
        problem: the space and the budget.
        learning_rate: the step size, constant.
        weight_decay: decoupled decay, on matrices only.
        max_norm: gradients are clipped to this norm.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        max_norm: float = 1.0,
    ) -> None:
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_norm = max_norm
        self._adam: torch.optim.AdamW | None = None
        self._loaded: dict[str, Any] | None = None

    def step(self, evaluator: Evaluator) -> StepReport:
        """One update from one gradient.

        Raises:
            UserError: the loss or its gradient is not finite.
        """
        tensors = evaluator.tensors()
        if self._adam is None:
            self._adam = self._build(tensors)
        loss, gradients = evaluator.gradient()
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(tensors, self.max_norm)
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            raise UserError(
                f"the loss or its gradient is not finite (loss {loss:g}): the run has diverged; "
                f"lower learning_rate (now {self.learning_rate:g})"
            )
        self._adam.step()
        self._adam.zero_grad()
        return StepReport(loss, {"gradient_norm": float(norm)})

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict() if self._adam else self._loaded or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state or None

    def _build(self, tensors: list[torch.Tensor]) -> torch.optim.AdamW:
        matrices = [tensor for tensor in tensors if tensor.dim() > 1]
        others = [tensor for tensor in tensors if tensor.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.learning_rate)
        if self._loaded:
            adam.load_state_dict(self._loaded)
        return adam
