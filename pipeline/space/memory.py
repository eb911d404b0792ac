"""Where searched tensors lie: in few pieces of memory, so that one call perturbs many of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PIECE = 2**20  # elements that are worked on at a time: what a cache holds


@dataclass(frozen=True)
class Searched:
    """A searched tensor.

    ``offset`` is the index of its first element among all searched elements; ``scale`` is how far one unit of
    a coordinate moves an element.
    """

    name: str
    parameter: nn.Parameter
    offset: int
    scale: float = 1.0


@dataclass(frozen=True)
class Segment:
    """Searched tensors that follow each other and have one dtype and scale, in one piece of memory.

    ``flat`` holds their elements one after another; each parameter is a view of its part.
    """

    tensors: Sequence[Searched]
    flat: Tensor

    @property
    def offset(self) -> int:
        """The index of the first element among all searched ones."""
        return self.tensors[0].offset

    @property
    def scale(self) -> float:
        return self.tensors[0].scale

    @classmethod
    def of(cls, tensors: Sequence[Searched]) -> Segment:
        """Moves the tensors into one piece of memory."""
        first = tensors[0].parameter
        device = first.device
        count = sum(searched.parameter.numel() for searched in tensors)
        # through the host, where memory that is not yet written costs nothing: a GPU never holds two copies
        host = cls(tensors, torch.empty(count, dtype=first.dtype))
        for searched in tensors:
            host.part(searched).copy_(searched.parameter.detach())
            searched.parameter.data = host.part(searched)
        segment = cls(tensors, host.flat.to(device))
        for searched in tensors:
            searched.parameter.data = segment.part(searched)
        return segment

    def part(self, searched: Searched) -> Tensor:
        """The elements of one of its tensors."""
        start = searched.offset - self.offset
        return self.flat[start : start + searched.parameter.numel()].view(searched.parameter.shape)

    def moved(self) -> bool:
        """Whether a parameter no longer lies here: its model was sent elsewhere, or its weights replaced."""
        ends = (self.tensors[0], self.tensors[-1])
        return any(self.part(searched).data_ptr() != searched.parameter.data_ptr() for searched in ends)


@dataclass(frozen=True)
class Group:
    """Elements that are perturbed in one go: whole tensors of a segment, from ``start`` (among all) on."""

    segment: Segment
    start: int
    count: int

    @property
    def flat(self) -> Tensor:
        return self.segment.flat[self.start - self.segment.offset :][: self.count]

    def pieces(self) -> Iterator[Group]:
        """Its elements, `PIECE` at a time: what is computed of each needs several times its memory."""
        for low in range(0, self.count, PIECE):
            yield Group(self.segment, self.start + low, min(PIECE, self.count - low))
