"""Several candidates in one forward pass: the batch is repeated, and each copy, a *lane*, meets its own.

What a candidate of a small search costs one by one is calls, not arithmetic. Low-rank directions ride along
the layers' products, which all lanes share; of a small space every candidate's weights are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.engine.matmul import linear, linear_plus
from pipeline.engine.modules import (
    Arguments,
    Owned,
    normalises,
    read_by_children,
    read_of,
    swapped,
    weight_of,
)
from pipeline.optimizer import Candidate, Seeded
from pipeline.space import Searched, Space
from pipeline.space.factors import Factors
from pipeline.tasks.base import Batch


class CannotBatch(Exception):
    """A module's inputs do not show which lane they are of."""


def repeated(batch: Batch, lanes: int) -> Batch:
    """The batch's inputs ``lanes`` times over, one copy after another; targets, the same in each, once."""
    positions = batch.positions
    if positions is not None:
        tokens = batch.inputs["input_ids"].numel()
        offsets = tokens * torch.arange(lanes, device=positions.device)
        positions = (offsets[:, None] + positions).flatten()
    inputs = {name: tensor.repeat(lanes, *[1] * (tensor.dim() - 1)) for name, tensor in batch.inputs.items()}
    return replace(batch, inputs=inputs, positions=positions)


class Source(Protocol):
    """What searched tensors are in each lane."""

    def stacked(self, searched: Searched) -> Tensor:
        """The tensor in every lane: ``[lanes, *shape]``."""
        ...

    def product(self, searched: Searched, module: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """inputs · weightᵀ + bias: ``[lanes, rows, in]`` gives ``[lanes, rows, out]``."""
        ...

    def rows(self, searched: Searched, ids: Tensor) -> Tensor:
        """The rows of a matrix at ids ``[lanes, …]``, each lane's of its own: ``[lanes, …, columns]``."""
        ...

    def only(self, lane: int) -> Source:
        """The source of one of the lanes."""
        ...


class ManyPoints:
    """The `Point` of several candidates, a lane each of a batch that is repeated for them.

    ``sizes`` are the leading dimensions of its inputs before that; ``ids`` is the shape of the repeated ids.

    Raises:
        CannotBatch: from a forward pass, when a module's inputs cannot be told apart by lane.
    """

    def __init__(self, source: Source, lanes: int, sizes: set[int], ids: torch.Size | None) -> None:
        self._source = source
        self._lanes = lanes
        self._leading = {lanes * size for size in sizes}
        self._ids = ids
        self._running: ManyPoints | None = None  # what a module that runs lane by lane gives its own modules

    def product(self, module: nn.Module, owned: Owned, inputs: Tensor) -> Tensor:
        if self._running:
            return self._running.product(module, owned, inputs)
        lanes = self._split(inputs).flatten(1, -2)
        read = read_of(module)
        bias = read["bias"]
        if "bias" in owned:
            bias = self._source.stacked(owned["bias"])[:, None]
        if "weight" in owned:
            product = self._source.product(owned["weight"], module, lanes, bias)
        else:
            product = linear(lanes, weight_of(module, read["weight"]), None).add_(bias)
        return product.view(*inputs.shape[:-1], product.shape[-1])

    def rows(self, module: nn.Module, searched: Searched, ids: Tensor) -> Tensor:
        if self._running:
            return self._running.rows(module, searched, ids)
        if self._lanes > 1 and ids.shape[0] == 1:  # positions: the same for every example
            found = self._source.rows(searched, ids.expand(self._lanes, -1)[:, None])
            if self._ids is None or ids.shape[1:] != self._ids[1:]:
                raise CannotBatch
            return found.expand(-1, self._ids[0] // self._lanes, -1, -1).flatten(0, 1)
        if self._lanes > 1 and ids.shape[0] not in self._leading:
            raise CannotBatch
        return self._source.rows(searched, ids.view(self._lanes, -1, *ids.shape[1:])).flatten(0, 1)

    def run(self, module: nn.Module, owned: Owned, forward: Callable[..., Any], arguments: Arguments) -> Any:
        if self._running:
            return self._running.run(module, owned, forward, arguments)
        if self._lanes > 1 and read_by_children(module, owned):
            return forward(module, *arguments[0], **arguments[1])
        values = {attribute: self._source.stacked(searched) for attribute, searched in owned.items()}
        args, kwargs = arguments
        if normalises(module) and args:
            return self._normalised(module, values, args[0])
        if self._lanes == 1:
            with swapped(module, {name: value[0] for name, value in values.items()}):
                return forward(module, *args, **kwargs)
        if len(args) != 1 or kwargs:
            raise CannotBatch
        return torch.cat(list(self._lane_by_lane(module, values, forward, args[0])))

    def _lane_by_lane(
        self, module: nn.Module, values: dict[str, Tensor], forward: Callable[..., Any], inputs: Tensor
    ) -> Iterator[Tensor]:
        try:
            for lane, part in enumerate(self._split(inputs)):
                self._running = ManyPoints(self._source.only(lane), 1, set(), None)
                with swapped(module, {name: value[lane] for name, value in values.items()}):
                    yield forward(module, part)
        finally:
            self._running = None

    def _normalised(self, module: nn.Module, values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        parameters: dict[str, Any] = {**module._parameters, **values}
        shape, eps = cast(nn.LayerNorm, module).normalized_shape, cast(nn.LayerNorm, module).eps
        plain = nn.functional.layer_norm(inputs, shape, None, None, eps)
        lanes = self._split(plain).flatten(1, -2)  # a view
        for attribute, apply in (("weight", lanes.mul_), ("bias", lanes.add_)):
            if parameters[attribute] is not None:
                apply(parameters[attribute][:, None] if attribute in values else parameters[attribute])
        return lanes.view(inputs.shape)

    def _split(self, inputs: Tensor) -> Tensor:
        if self._lanes > 1 and inputs.shape[0] not in self._leading:
            raise CannotBatch
        return inputs.reshape(self._lanes, -1, *inputs.shape[1:])


class Stacked:
    """The `Source` of a small space: every candidate's tensors at once."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    @classmethod
    def at(cls, space: Space, candidates: Sequence[Candidate]) -> Stacked:
        return cls(space.stacked(candidates))

    def only(self, lane: int) -> Stacked:
        return Stacked({name: value[lane : lane + 1] for name, value in self._values.items()})

    def stacked(self, searched: Searched) -> Tensor:
        return self._values[searched.name]

    def product(self, searched: Searched, module: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._values[searched.name]
        weight = weight if isinstance(module, Conv1D) else weight.mT
        return torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias, inputs, weight)

    def rows(self, searched: Searched, ids: Tensor) -> Tensor:
        weight = self._values[searched.name]
        lane = torch.arange(len(weight), device=ids.device).view(-1, *[1] * (ids.dim() - 1))
        return weight[lane, ids]


class LowRankSource:
    """The `Source` of low-rank directions: no perturbed matrix is built."""

    def __init__(self, factors: Factors, places: Tensor, scales: Tensor) -> None:
        self._factors = factors
        self._places = places
        self._scales = scales

    @classmethod
    def at(cls, space: Space, candidates: Sequence[Seeded]) -> LowRankSource:
        first = candidates[0]
        assert first.low_rank is not None
        seeds = list(dict.fromkeys(candidate.seed for candidate in candidates))
        factors = space.factors(seeds, first.distribution, first.low_rank)
        places = [seeds.index(candidate.seed) for candidate in candidates]
        scales = [candidate.scale for candidate in candidates]
        return cls(
            factors, torch.tensor(places, device=space.device), torch.tensor(scales, device=space.device)
        )

    def only(self, lane: int) -> LowRankSource:
        return LowRankSource(self._factors, self._places[lane : lane + 1], self._scales[lane : lane + 1])

    def stacked(self, searched: Searched) -> Tensor:
        weight, left = searched.parameter.detach(), self._left(searched)
        shift = left @ self._right(searched).mT if weight.dim() == 2 else left
        return (weight + shift).to(weight.dtype)

    def product(self, searched: Searched, module: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b + s (x V) Uᵀ."""
        weight = searched.parameter.detach()
        out, into = self._left(searched).to(inputs.dtype), self._right(searched).to(inputs.dtype)
        if isinstance(module, Conv1D):
            out, into = into, out
        inner, out = inputs @ into, out.expand(len(inputs), -1, -1)
        if bias is not None and bias.dim() == 3:  # of each lane: it rides along too
            inner = torch.cat((inner, inner.new_ones(*inner.shape[:2], 1)), -1)
            out, bias = torch.cat((out, bias.mT), -1), None
        ridden = torch.bmm(inner, out.mT).flatten(0, 1)
        product = linear_plus(inputs.flatten(0, 1), weight_of(module, weight), bias, ridden)
        return product.view(*inputs.shape[:2], -1)

    def rows(self, searched: Searched, ids: Tensor) -> Tensor:
        weight, flat = searched.parameter.detach(), ids.flatten(1)
        left = self._factors.left(searched.name)[self._places[:, None], flat]
        left *= (self._scales * searched.scale)[:, None, None]
        found = nn.functional.embedding(flat, weight) + left @ self._right(searched).mT
        return found.to(weight.dtype).view(*ids.shape, -1)

    def _left(self, searched: Searched) -> Tensor:
        """Scaled, ``[lanes, …]``."""
        left = self._factors.left(searched.name)[self._places]
        return left.mul_((self._scales * searched.scale).view(-1, *[1] * (left.dim() - 1)))

    def _right(self, searched: Searched) -> Tensor:
        """``[lanes or 1, columns, rank]``."""
        right = self._factors.right(searched.name)
        return right if len(right) == 1 else right[self._places]
