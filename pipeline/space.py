"""Which parameters are searched, and the coordinates an optimizer sees them in.

``full``        every parameter
``biases``      every bias, and the head (BitFit, Ben Zaken et al. 2022)
``head``        what sits on top of the encoder
``lora``        low-rank factors on every linear layer of the encoder, and the head (Hu et al. 2022)
``projection``  a random subspace of ``full``: each parameter follows one of k coordinates, with a random
                sign (a sparse embedding, Clarkson & Woodruff 2013; random subspaces: Li et al. 2018)

In all but the last, coordinates are the parameters' own elements, one tensor after another. With
``encoder_scale=s`` a coordinate of the encoder moves its element by s: a fresh head can then learn at its own
pace without shaking what is already trained under it (discriminative rates: Howard & Ruder 2018).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline import noise
from pipeline.errors import UserError, nearest, unknown
from pipeline.optimizer import Candidate, Explicit, Seeded
from pipeline.registry import Spec
from pipeline.tasks.base import TaskModel

_RADII_KEPT = 1024  # lengths of sphere directions: a step asks for each several times

OPTIONS: dict[str, dict[str, int | float]] = {
    "full": {"encoder_scale": 1.0},
    "biases": {"encoder_scale": 1.0},
    "head": {},
    "lora": {"rank": 8, "encoder_scale": 1.0},
    "projection": {"dimension": 1000},
}


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


def parse(text: str) -> Spec:
    """A space's spec with its defaults filled in.

    Raises:
        UserError: unknown space or option, or an option that is not a positive whole number.
    """
    spec = Spec.parse(text)
    if spec.backend not in OPTIONS or spec.name:
        raise unknown("space", spec.backend + (f":{spec.name}" if spec.name else ""), OPTIONS)
    known = OPTIONS[spec.backend]
    for key in spec.options:
        if key not in known:
            hint = nearest(key, known) or f"; it takes {', '.join(known) or 'no options'}"
            raise UserError(f"space '{spec.backend}' has no option '{key}'{hint}")
    options = {
        key: _option(spec.backend, key, value, type(known[key])) for key, value in spec.options.items()
    }
    return Spec(spec.backend, None, {**known, **options})


def _option(space: str, key: str, value: Any, wanted: type) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (wanted is int and value != int(value)):
        kind = "whole number" if wanted is int else "number"
        raise UserError(f"option '{key}' of space '{space}' takes a positive {kind}, not '{value}'")
    return int(value) if wanted is int else float(value)


class ValueAt(Protocol):
    """What a searched tensor is at a candidate: of its shape and dtype, in ``out`` if that is given."""

    def __call__(self, searched: Searched, out: Tensor | None = None) -> Tensor: ...


class Space:
    """The searched tensors of a model, and every way to read, perturb and move them.

    ``fused`` asks for compiled noise: the same bits, sooner, after a compilation of some seconds.
    """

    def __init__(self, kind: str, tensors: Iterable[tuple[str, nn.Parameter, float]]) -> None:
        self.kind = kind
        self.tensors: list[Searched] = []
        offset = 0
        for name, parameter, scale in tensors:
            self.tensors.append(Searched(name, parameter, offset, scale))
            offset += parameter.numel()
        self.elements = offset
        self._start: list[Tensor] | None = None
        self._radii: dict[int, float] = {}
        self.fused = False
        if not offset:
            raise UserError(
                f"the space '{kind}' has no parameters in this model; choose another, such as full"
            )
        if offset > noise.MAX_ELEMENTS:
            raise UserError(
                f"the space '{kind}' has {offset:,} elements; at most {noise.MAX_ELEMENTS:,} are supported"
            )

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.elements

    def only_in(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether nothing but ``parameters`` is searched."""
        allowed = {id(parameter) for parameter in parameters}
        return all(id(searched.parameter) in allowed for searched in self.tensors)

    @cached_property
    def small(self) -> list[Searched]:
        """The tensors of few elements."""
        return [searched for searched in self.tensors if searched.parameter.numel() <= _Shifted.SMALL]

    @cached_property
    def small_indices(self) -> Tensor:
        """The indices of their elements among all, one tensor after another."""
        parts = [torch.arange(s.offset, s.offset + s.parameter.numel()) for s in self.small]
        return torch.cat(parts).to(self.device)

    @property
    def elementwise(self) -> bool:
        """Whether a coordinate is an element itself."""
        return all(searched.scale == 1.0 for searched in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].parameter.device

    def at(self, candidate: Candidate) -> ValueAt:
        """What searched tensors are at ``candidate``; nothing is written but the ``out`` that is given."""
        if isinstance(candidate, Explicit):
            return lambda searched, out=None: self._displaced(searched, candidate.coordinates)
        return _Shifted(self, candidate)

    def stacked(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """Every searched tensor at each of ``candidates``, by name: ``[candidates, *shape]``."""
        seeded = [candidate for candidate in candidates if isinstance(candidate, Seeded)]
        if len(seeded) < len(candidates) or len({candidate.distribution for candidate in seeded}) > 1:
            values = [self.at(candidate) for candidate in candidates]
            return {s.name: torch.stack([value(s) for value in values]) for s in self.tensors}
        place = {seed: i for i, seed in enumerate(dict.fromkeys(candidate.seed for candidate in seeded))}
        laws = [self._law(candidate.seed, candidate.distribution) for candidate in seeded]
        z = noise.directions(list(place), self.elements, laws[0][0], self.device)
        scales = [candidate.scale * law[1] for candidate, law in zip(seeded, laws, strict=True)]
        shifts = z[[place[candidate.seed] for candidate in seeded]] * torch.tensor(
            scales, device=self.device
        ).unsqueeze(1)
        return {
            s.name: torch.add(
                s.parameter.detach(),
                shifts[:, s.offset : s.offset + s.parameter.numel()].view(-1, *s.parameter.shape),
                alpha=s.scale,
            ).to(s.parameter.dtype)
            for s in self.tensors
        }

    def rows(self, searched: Searched, rows: Tensor, candidate: Seeded) -> Tensor | None:
        """What a seeded candidate adds to ``rows`` (int64) of a matrix: ``[*rows.shape, columns]``.

        None where rows cannot be had on their own.
        """
        law, factor = self._law(candidate.seed, candidate.distribution)
        z = noise.rows(candidate.seed, searched.offset, rows, searched.parameter.shape[1], law)
        return z.mul_(candidate.scale * factor * searched.scale)

    def move(
        self, seeds: Sequence[int], coefficients: Sequence[float], distribution: str, decay: float
    ) -> None:
        """θ ← (1 − decay) θ + Σ coefficientᵢ z(seedᵢ), summed in float32 before it touches the weights."""
        for searched in self.tensors:
            weight = searched.parameter.data
            if len(seeds) == 1 and not decay:  # nothing to sum
                self._add(searched, weight, seeds[0], coefficients[0], distribution, weight)
                continue
            change = self._combined(searched, seeds, coefficients, distribution)
            if decay and weight.dim() > 1:
                change.add_(weight, alpha=-decay)
            weight.add_(change.to(weight.dtype))

    def place(self, coordinates: Tensor) -> None:
        """θ ← start + coordinates (float32 ``[size]``)."""
        values = [self._displaced(searched, coordinates) for searched in self.tensors]
        for searched, value in zip(self.tensors, values, strict=True):
            searched.parameter.data.copy_(value)

    def snapshot(self) -> list[Tensor]:
        """Copies of the searched tensors."""
        return [searched.parameter.detach().clone() for searched in self.tensors]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Writes a `snapshot` back."""
        for searched, value in zip(self.tensors, snapshot, strict=True):
            searched.parameter.data.copy_(value)

    def digest(self) -> str:
        """sha256 of the searched tensors' names, dtypes and bytes."""
        total = hashlib.sha256()
        for searched in self.tensors:
            total.update(f"{searched.name} {searched.parameter.dtype}".encode())
            flat = searched.parameter.detach().cpu().contiguous().flatten()
            total.update(flat.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def _combined(
        self, searched: Searched, seeds: Sequence[int], coefficients: Sequence[float], distribution: str
    ) -> Tensor:
        parameter = searched.parameter
        change = torch.zeros(parameter.numel(), device=parameter.device)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            self._add(searched, change, seed, coefficient, distribution, change)
        return change.view(parameter.shape)

    def _add(
        self, searched: Searched, values: Tensor, seed: int, scale: float, distribution: str, out: Tensor
    ) -> Tensor:
        """``out`` ← ``values``, like ``searched``, plus its part of ``scale`` · z(seed)."""
        law, factor = self._law(seed, distribution)
        scale *= factor * searched.scale
        return noise.add(values, seed, searched.offset, law, scale, out=out, fused=self.fused)

    def _displaced(self, searched: Searched, coordinates: Tensor) -> Tensor:
        start = self._start_of(searched)
        part = coordinates[searched.offset : searched.offset + start.numel()]
        return torch.add(start, part.view(start.shape), alpha=searched.scale).to(start.dtype)

    def _law(self, seed: int, distribution: str) -> tuple[str, float]:
        """The law of the elements of a direction, and what scales it as a whole."""
        if distribution != "sphere":
            return distribution, 1.0
        if seed not in self._radii:
            if len(self._radii) >= _RADII_KEPT:
                self._radii.clear()
            self._radii[seed] = noise.radius(seed, self.size, self.device)
        return "gaussian", math.sqrt(self.size) / self._radii[seed]

    def _start_of(self, searched: Searched) -> Tensor:
        """The tensor as it was when coordinates were first used: what they displace."""
        if self._start is None:
            self._start = self.snapshot()
        return self._start[self.tensors.index(searched)]


class _Shifted:
    """The tensors of a space at a seeded candidate.

    Those of few elements, of which a model has many, get their noise all at once: each on its own would cost
    more in calls than in arithmetic.
    """

    SMALL = 2**14

    def __init__(self, space: Space, candidate: Seeded) -> None:
        self._space = space
        self._candidate = candidate
        self._small: dict[str, Tensor] = {}
        if candidate.distribution == "rademacher" and space.small:
            z = noise.direction_at(candidate.seed, space.small_indices, "rademacher")
            parts = torch.split(z, [searched.parameter.numel() for searched in space.small])
            self._small = {s.name: part for s, part in zip(space.small, parts, strict=True)}

    def __call__(self, searched: Searched, out: Tensor | None = None) -> Tensor:
        weight, candidate = searched.parameter.detach(), self._candidate
        z = self._small.get(searched.name)
        if z is not None:
            shift = candidate.scale * searched.scale
            return torch.add(weight, z.view(weight.shape), alpha=shift).to(weight.dtype)
        out = torch.empty_like(weight) if out is None else out
        return self._space._add(
            searched, weight, candidate.seed, candidate.scale, candidate.distribution, out
        )


class Projection(Space):
    """A random k-dimensional subspace: θ = start + S c, S sparse with one ±√(k/d) in each row.

    The columns of S are orthogonal, and of unit length on average: a step of length r in coordinates is a
    step of about length r in the weights.
    """

    def __init__(self, tensors: Iterable[tuple[str, nn.Parameter, float]], dimension: int, seed: int) -> None:
        super().__init__("projection", tensors)
        self.dimension = min(dimension, self.elements)
        self._seed = seed
        self._point = torch.zeros(self.dimension, device=self.device)

    @property
    def size(self) -> int:
        return self.dimension

    @property
    def elementwise(self) -> bool:
        return False

    def rows(self, searched: Searched, rows: Tensor, candidate: Seeded) -> Tensor | None:
        return None

    def move(
        self, seeds: Sequence[int], coefficients: Sequence[float], distribution: str, decay: float
    ) -> None:
        """As in `Space`, in coordinates; the decay draws them to the start point."""
        point = self._point * (1.0 - decay)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            law, factor = self._law(seed, distribution)
            z = noise.direction(seed, 0, self.dimension, law, point.device)
            point.add_(z, alpha=coefficient * factor)
        self.place(point)

    def place(self, coordinates: Tensor) -> None:
        super().place(coordinates)
        self._point = coordinates.clone()

    def at(self, candidate: Candidate) -> ValueAt:
        if isinstance(candidate, Explicit):
            return super().at(candidate)
        law, factor = self._law(candidate.seed, candidate.distribution)
        z = noise.direction(candidate.seed, 0, self.dimension, law, self._point.device)
        return self.at(Explicit(torch.add(self._point, z, alpha=candidate.scale * factor)))

    def _displaced(self, searched: Searched, coordinates: Tensor) -> Tensor:
        start = self._start_of(searched)
        counters = torch.arange(searched.offset, searched.offset + start.numel(), device=start.device)
        words = noise.words_at(self._seed, counters).long() & 0xFFFFFFFF
        signs = 1.0 - 2.0 * (words & 1)
        scale = (self.dimension / self.elements) ** 0.5
        delta: Tensor = coordinates[(words >> 1) % self.dimension] * (signs * scale)
        return (start + delta.view(start.shape)).to(start.dtype)


def build(spec: Spec, model: TaskModel, seed: int) -> Space:
    """The space a spec names, over a model that `prepare_model` has seen.

    Raises:
        UserError: the model has no such parameters.
    """
    if spec.backend == "projection":
        return Projection(_searched(model, "full", 1.0), spec.options["dimension"], noise.derive(seed, 1))
    return Space(spec.backend, _searched(model, spec.backend, spec.options.get("encoder_scale", 1.0)))


def prepare_model(spec: Spec, model: TaskModel, seed: int) -> None:
    """Adds what a space needs to the model: the factors of ``lora``."""
    if spec.backend == "lora":
        model.add_lora(spec.options["rank"], seed)


def _searched(model: TaskModel, kind: str, encoder_scale: float) -> Iterator[tuple[str, nn.Parameter, float]]:
    head = {id(parameter) for parameter in model.head_parameters()}
    for name, parameter in model.named_parameters():
        wanted = (
            kind == "full"
            or id(parameter) in head
            or (kind == "biases" and name.endswith("bias"))
            or (kind == "lora" and ".lora_" in name)
        )
        if wanted and parameter.is_floating_point():
            yield name, parameter, 1.0 if id(parameter) in head else encoder_scale
