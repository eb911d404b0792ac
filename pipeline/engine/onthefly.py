"""One candidate: a layer's weight is perturbed as that layer runs, and dropped after.

The stored weights are never written while candidates are scored, so nothing drifts in any precision, and the
memory above inference is one group of weights (`pipeline.space.Group`). An embedding is perturbed only in the
rows that the batch reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.matmul import linear
from pipeline.engine.modules import Arguments, Owned, read_of, swapped, weight_of
from pipeline.optimizer import Candidate, Seeded
from pipeline.space import Group, Searched, Space


class Scratch:
    """Memory for one group, the same for all: to get fresh memory cleared costs as much as the noise."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, group: Group) -> Tensor:
        """Memory of the group's size and dtype; what was asked for before may be overwritten."""
        flat, memory = group.flat, self._memory
        if len(memory) < group.count or (memory.dtype, memory.device) != (flat.dtype, flat.device):
            self._memory = torch.empty_like(flat)
        return self._memory[: group.count]


class OnePoint:
    """The `Point` of one candidate of full rank."""

    def __init__(self, space: Space, candidate: Candidate, scratch: Scratch) -> None:
        self._space = space
        self._candidate = space.resolved(candidate)
        self._scratch = scratch
        self._held: Group | None = None
        self._memory = torch.empty(0)

    def product(self, module: nn.Module, owned: Owned, inputs: Tensor) -> Tensor:
        read = {**read_of(module), **self._values(owned)}
        return linear(inputs, weight_of(module, read["weight"]), read["bias"])

    def rows(self, module: nn.Module, searched: Searched, ids: Tensor) -> Tensor:
        if not isinstance(self._candidate, Seeded):
            return nn.functional.embedding(ids, self._values({"weight": searched})["weight"])
        weight = searched.parameter.detach()
        added = self._space.rows(searched, ids, self._candidate)
        return added.add_(nn.functional.embedding(ids, weight)).to(weight.dtype)

    def run(self, module: nn.Module, owned: Owned, forward: Callable[..., Any], arguments: Arguments) -> Any:
        # its output may be the tensor itself, or a view of it
        values = {name: value.clone() for name, value in self._values(owned).items()}
        with swapped(module, values):
            return forward(module, *arguments[0], **arguments[1])

    def _values(self, owned: Owned) -> dict[str, Tensor]:
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
        if group is not self._held:
            self._memory = self._scratch.like(group)
            self._space.write(self._candidate, group, self._memory)
            self._held = group
        return _part(self._memory, searched, group)


class HeldPoint(OnePoint):
    """One candidate that is read many times, a token at a time: what is perturbed once is held.

    The memory above inference is that of the searched tensors.
    """

    def __init__(self, space: Space, candidate: Candidate) -> None:
        super().__init__(space, candidate, Scratch())
        self._written: dict[int, Tensor] = {}

    def _value(self, searched: Searched, group: Group) -> Tensor:
        if id(group) not in self._written:
            memory = self._written[id(group)] = torch.empty_like(group.flat)
            self._space.write(self._candidate, group, memory)
        return _part(self._written[id(group)], searched, group)


def _part(memory: Tensor, searched: Searched, group: Group) -> Tensor:
    """The tensor's own part of its group."""
    start = searched.offset - group.start
    return memory[start : start + searched.parameter.numel()].view(searched.parameter.shape)
