"""A layer's weight is perturbed as that layer runs, and dropped after.

The stored weights are never written while candidates are scored, so nothing drifts in any precision, and the
memory above inference is one layer's. An embedding is perturbed only in the rows that the batch reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.optimizer import Candidate, Seeded
from pipeline.space import Searched, Space, ValueAt


def _looks_up_rows(module: nn.Module) -> bool:
    """Whether the output is the weight's rows at the first argument; some subclasses scale or shift them."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None


class OnTheFly:
    """Hooks on every module that owns a searched tensor; tied tensors are perturbed alike in each owner."""

    def __init__(self, model: nn.Module, space: Space) -> None:
        self._space = space
        self._candidate: Candidate | None = None
        self._value: ValueAt | None = None
        self._scratch: Tensor | None = None
        self._unread = {searched.name for searched in space.tensors}
        self._checked = False
        by_parameter = {id(searched.parameter): searched for searched in space.tensors}
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            owned = [
                (attribute, by_parameter[id(parameter)])
                for attribute, parameter in module._parameters.items()
                if parameter is not None and id(parameter) in by_parameter
            ]
            if owned:
                self._hook(module, owned)

    @contextmanager
    def at(self, candidate: Candidate) -> Iterator[None]:
        """Within it, the model's forward pass is that of ``candidate``.

        Raises:
            UserError: a searched tensor is read by no module's own forward pass, so scoring cannot see it.
        """
        self._candidate, self._value = candidate, self._space.at(candidate)
        try:
            yield
        finally:
            self._candidate, self._value = None, None
        if not self._checked and self._unread:
            raise UserError(
                f"the forward pass reads {len(self._unread)} searched tensors through no module of theirs, "
                f"such as {min(self._unread)}: leave them out of the space"
            )
        self._checked = True

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, owned: list[tuple[str, Searched]]) -> None:
        if _looks_up_rows(module):
            self._handles.append(module.register_forward_hook(self._add_rows(owned[0][1])))
            return
        stored: dict[str, Any] = {attribute: searched.parameter for attribute, searched in owned}

        # its output is a product: nothing else looks at the weight once it has run
        reused = isinstance(module, nn.Linear | Conv1D)
        # a plain tensor may stand where a Parameter is declared
        parameters: dict[str, Any] = module._parameters

        def perturb(module: nn.Module, args: Any) -> None:
            if self._value is None:
                return
            for attribute, searched in owned:
                self._unread.discard(searched.name)
                out = self._scratch_for(searched) if reused and attribute == "weight" else None
                parameters[attribute] = self._value(searched, out)

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            parameters.update(stored)

        self._handles.append(module.register_forward_pre_hook(perturb))
        self._handles.append(module.register_forward_hook(drop, always_call=True))

    def _scratch_for(self, searched: Searched) -> Tensor:
        """Memory for one weight, the same for all: to get fresh memory cleared costs as much again."""
        parameter = searched.parameter
        scratch = self._scratch
        if scratch is None or scratch.numel() < parameter.numel() or scratch.dtype != parameter.dtype:
            scratch = self._scratch = torch.empty(
                parameter.numel(), dtype=parameter.dtype, device=parameter.device
            )
        return scratch[: parameter.numel()].view(parameter.shape)

    def _add_rows(self, searched: Searched) -> Any:
        def add(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._value is None:
                return None
            self._unread.discard(searched.name)
            if isinstance(self._candidate, Seeded):
                added = self._space.rows(searched, args[0], self._candidate)
                if added is not None:
                    return (output + added).to(output.dtype)
            return nn.functional.embedding(args[0], self._value(searched))

        return add
