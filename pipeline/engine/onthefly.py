"""A layer's weight is perturbed as that layer runs, and dropped after.

The stored weights are never written while candidates are scored, so nothing drifts in any precision, and the
memory above inference is one group of weights (`pipeline.space.Group`). An embedding is perturbed only in the
rows that the batch reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from pipeline.engine.matmul import linear
from pipeline.errors import UserError
from pipeline.optimizer import Candidate, Seeded
from pipeline.space import Group, Searched, Space


def _looks_up_rows(module: nn.Module) -> bool:
    """Whether the output is the weight's rows at the first argument; some subclasses scale or shift them."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None


def _multiplies(module: nn.Module) -> bool:
    """Whether the output is the plain product of the first argument and the weight."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


class OnTheFly:
    """Every module that owns a searched tensor reads it at the candidate; tied ones alike in each owner."""

    def __init__(self, model: nn.Module, space: Space) -> None:
        self._space = space
        self._candidate: Candidate | None = None
        self._held: Group | None = None
        self._scratch = torch.empty(0)
        self._unread = {searched.name for searched in space.tensors}
        self._checked = False
        by_parameter = {id(searched.parameter): searched for searched in space.tensors}
        self._handles: list[RemovableHandle] = []
        self._products: list[nn.Module] = []
        for module in model.modules():
            owned = {
                attribute: by_parameter[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if parameter is not None and id(parameter) in by_parameter
            }
            if _multiplies(module):
                module.forward = MethodType(self._product(module, owned), module)
                self._products.append(module)
            elif owned and _looks_up_rows(module):
                self._handles.append(module.register_forward_hook(self._rows(owned["weight"])))
            elif owned:
                self._handles += self._swap(module, owned)

    @contextmanager
    def at(self, candidate: Candidate) -> Iterator[None]:
        """Within it, the model's forward pass is that of ``candidate``.

        Raises:
            UserError: a searched tensor is read by no module's own forward pass, so scoring cannot see it.
        """
        self._candidate, self._held = self._space.resolved(candidate), None
        try:
            yield
        finally:
            self._candidate = None
        if not self._checked and self._unread:
            raise UserError(
                f"the forward pass reads {len(self._unread)} searched tensors through no module of theirs, "
                f"such as {min(self._unread)}: leave them out of the space"
            )
        self._checked = True

    def close(self) -> None:
        """Takes the model's modules back to what they were."""
        for handle in self._handles:
            handle.remove()
        for module in self._products:
            del module.forward

    def _product(self, module: nn.Module, owned: dict[str, Searched]) -> Callable[..., Tensor]:
        """The forward pass of a linear layer, whose weight and bias need not outlive it."""
        across = isinstance(module, Conv1D)  # its weight is [in, out]

        def forward(module: nn.Module, inputs: Tensor) -> Tensor:
            read: dict[str, Any] = module._parameters
            if self._candidate is not None and owned:
                read = {**read, **self._values(owned)}
            weight: Tensor = read["weight"]
            return linear(inputs, weight.T if across else weight, read["bias"])

        return forward

    def _rows(self, searched: Searched) -> Any:
        """A hook on an embedding."""

        def add(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._candidate is None:
                return None
            self._unread.discard(searched.name)
            if isinstance(self._candidate, Seeded):
                added = self._space.rows(searched, args[0], self._candidate)
                return added.add_(output).to(output.dtype)
            return nn.functional.embedding(args[0], self._values({"weight": searched})["weight"])

        return add

    def _swap(self, module: nn.Module, owned: dict[str, Searched]) -> list[RemovableHandle]:
        """Hooks on any other module: its tensors are replaced while it runs."""
        # a plain tensor may stand where a Parameter is declared
        parameters: dict[str, Any] = module._parameters
        stored = {attribute: parameters[attribute] for attribute in owned}

        def perturb(module: nn.Module, args: Any) -> None:
            if self._candidate is not None:
                # its output may be the tensor itself, or a view of it
                parameters.update({name: value.clone() for name, value in self._values(owned).items()})

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            parameters.update(stored)

        return [
            module.register_forward_pre_hook(perturb),
            module.register_forward_hook(drop, always_call=True),
        ]

    def _values(self, owned: dict[str, Searched]) -> dict[str, Tensor]:
        """A module's tensors at the candidate; what is asked for next may overwrite them."""
        groups = {attribute: self._space.group_of[searched.name] for attribute, searched in owned.items()}
        # the largest group last: it stays where it was written, parts of others are copied out
        last = max(groups.values(), key=lambda group: group.count)
        values: dict[str, Tensor] = {}
        for attribute in sorted(owned, key=lambda attribute: groups[attribute] is last):
            value = self._value(owned[attribute], groups[attribute])
            values[attribute] = value if groups[attribute] is last else value.clone()
        return values

    def _value(self, searched: Searched, group: Group) -> Tensor:
        self._unread.discard(searched.name)
        if group is not self._held:
            assert self._candidate is not None
            self._space.write(self._candidate, group, self._memory(group))
            self._held = group
        start = searched.offset - group.start
        return self._scratch[start : start + searched.parameter.numel()].view(searched.parameter.shape)

    def _memory(self, group: Group) -> Tensor:
        """Memory for one group, the same for all: to get fresh memory cleared costs as much again."""
        like = group.flat
        if len(self._scratch) < group.count or self._scratch.dtype != like.dtype:
            self._scratch = torch.empty_like(like)
        return self._scratch[: group.count]
