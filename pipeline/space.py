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
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import noise
from pipeline.errors import UserError, nearest, unknown
from pipeline.factors import Factors, Layout
from pipeline.optimizer import Candidate, Explicit, LowRank, Move, Seeded
from pipeline.registry import Spec
from pipeline.tasks.base import TaskModel

_RADII_KEPT = 1024  # lengths of sphere directions: a step asks for each several times
_STACKED = 2**20  # elements of a space whose candidates may be stacked
_GROUP = 2**21  # elements perturbed in one call
_ROUNDING = 9  # the path to the seeds of random rounding
_SMALL = 2**12  # elements of a piece whose directions are drawn for many moves at once
_PIECE = 2**20  # elements of a sum of directions: what a cache holds

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
        count = sum(searched.parameter.numel() for searched in tensors)
        flat = torch.empty(count, dtype=first.dtype, device=first.device)
        segment = cls(tensors, flat)
        for searched in tensors:
            part = segment.part(searched)
            part.copy_(searched.parameter.detach())
            searched.parameter.data = part
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


class Space:
    """The searched tensors of a model, and every way to read, perturb and move them.

    Their memory becomes the space's (see `Segment`): build it when the model is on its device.
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
        self._start: dict[int, Tensor] = {}
        self._radii: dict[int, float] = {}
        self._layouts: dict[int, Layout] = {}
        self._moves = 0
        self.fused = False
        if not offset:
            raise UserError(
                f"the space '{kind}' has no parameters in this model; choose another, such as full"
            )
        if offset > noise.MAX_ELEMENTS:
            raise UserError(
                f"the space '{kind}' has {offset:,} elements; at most {noise.MAX_ELEMENTS:,} are supported"
            )
        alike = itertools.groupby(self.tensors, lambda s: (s.parameter.dtype, s.parameter.device, s.scale))
        self.segments = [Segment.of(list(tensors)) for _, tensors in alike]
        self.group_of = {s.name: group for group, members in self._grouped() for s in members}

    def _grouped(self) -> Iterator[tuple[Group, list[Searched]]]:
        """Tensors in groups of up to ``_GROUP`` elements: a call for each would cost more than its noise."""
        for segment in self.segments:
            members: list[Searched] = []
            for searched in [*segment.tensors, None]:
                count = sum(member.parameter.numel() for member in members)
                if members and (searched is None or count + searched.parameter.numel() > _GROUP):
                    yield Group(segment, members[0].offset, count), members
                    members = []
                if searched is not None:
                    members.append(searched)

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.elements

    @property
    def stackable(self) -> bool:
        """Whether all candidates of a step can be held at once."""
        return self.elements <= _STACKED

    def only_in(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether nothing but ``parameters`` is searched."""
        allowed = {id(parameter) for parameter in parameters}
        return all(id(searched.parameter) in allowed for searched in self.tensors)

    @property
    def elementwise(self) -> bool:
        """Whether a coordinate is an element itself."""
        return all(searched.scale == 1.0 for searched in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].parameter.device

    def resolved(self, candidate: Candidate) -> Candidate:
        """The candidate in the form in which its elements are had soonest."""
        return candidate

    def write(self, candidate: Candidate, group: Group, out: Tensor) -> None:
        """``out`` (flat, of the group's count and dtype) ← the group's elements at ``candidate``.

        Raises:
            RuntimeError: the parameters were moved out of the space's memory.
        """
        if group.segment.moved():
            raise RuntimeError("the model was moved, or its weights replaced, after its space was built")
        if isinstance(candidate, Explicit):
            self._displace(group, candidate.coordinates, out)
        else:
            self._add(
                group.flat,
                candidate.seed,
                group.start,
                group.segment.scale * candidate.scale,
                candidate.distribution,
                out,
            )

    def value(self, searched: Searched, candidate: Candidate) -> Tensor:
        """One searched tensor at ``candidate``, in memory of its own."""
        if isinstance(candidate, Seeded) and candidate.low_rank:
            factors = self.factors([candidate.seed], candidate.distribution, candidate.low_rank)
            z = factors.left(searched.name)[0]
            if searched.parameter.dim() == 2:
                z = z @ factors.right(searched.name)[0].T
            weight = searched.parameter.detach()
            return torch.add(weight, z, alpha=candidate.scale * searched.scale).to(weight.dtype)
        whole = self.group_of[searched.name]
        group = Group(whole.segment, searched.offset, searched.parameter.numel())
        out = torch.empty_like(group.flat)
        self.write(self.resolved(candidate), group, out)
        return out.view(searched.parameter.shape)

    def stacked(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """Every searched tensor at each of ``candidates``, by name: ``[candidates, *shape]``."""
        seeded = [candidate for candidate in candidates if isinstance(candidate, Seeded)]
        if len(seeded) < len(candidates) or len({(c.distribution, c.low_rank) for c in seeded}) > 1:
            return {s.name: torch.stack([self.value(s, each) for each in candidates]) for s in self.tensors}
        place = {seed: i for i, seed in enumerate(dict.fromkeys(candidate.seed for candidate in seeded))}
        laws = [self._law(candidate.seed, candidate.distribution) for candidate in seeded]
        z = noise.directions(list(place), 0, self.elements, laws[0][0], self.device)
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

    def factors(self, seeds: Sequence[int], distribution: str, low_rank: LowRank) -> Factors:
        """The factors of low-rank directions.

        Raises:
            UserError: a space or a distribution that has none.
        """
        if distribution not in noise.LAWS:
            raise UserError(f"low-rank directions are {' or '.join(noise.LAWS)}, not {distribution}")
        if low_rank.rank not in self._layouts:
            shapes = {searched.name: searched.parameter.shape for searched in self.tensors}
            self._layouts[low_rank.rank] = Layout(shapes, low_rank.rank)
        return Factors(self._layouts[low_rank.rank], seeds, distribution, low_rank, self.device)

    def rows(self, searched: Searched, rows: Tensor, candidate: Seeded) -> Tensor:
        """What a seeded candidate adds to ``rows`` (int64) of a matrix: float32 [*rows.shape, columns]."""
        law, factor = self._law(candidate.seed, candidate.distribution)
        z = noise.rows(candidate.seed, searched.offset, rows, searched.parameter.shape[1], law)
        return z.mul_(candidate.scale * factor * searched.scale)

    def move(self, *moves: Move) -> None:
        """Makes the moves one after another. Each is summed in float32 before it touches the weights.

        Weights of half precision are rounded at random (`noise.round_to`), by the number of the move. Many at
        once cost less than each alone, and give the same bits.
        """
        for (_, low_rank), alike in itertools.groupby(moves, lambda move: (move.distribution, move.low_rank)):
            if low_rank:
                for move in alike:
                    self._moves += 1
                    factors = self.factors(move.seeds, move.distribution, low_rank)
                    self._move_factors(factors, move.coefficients, move.decay)
            else:
                self._move_along(list(alike))

    def _move_along(self, moves: list[Move]) -> None:
        """Moves of one law: a piece of the weights meets them all while a cache holds it."""
        memory = torch.empty(min(_PIECE, self.elements), device=self.device)  # fresh memory is dear
        first = self._moves + 1
        self._moves += len(moves)
        for part, decays in self._parts(any(move.decay for move in moves)):
            self._move_part(part, decays, moves, first, memory[: part.count])

    def _move_part(self, part: Group, decays: bool, moves: list[Move], first: int, change: Tensor) -> None:
        """Makes the moves, the first of which has the number ``first``, in a part; ``change`` is scratch."""

        def one_sum(numbered: tuple[int, Move]) -> bool:
            """Whether the move is one addition to the weights."""
            move = numbered[1]
            return len(move.seeds) == 1 and not (decays and move.decay) and part.flat.dtype == torch.float32

        flat, law = part.flat, "gaussian" if moves[0].distribution == "sphere" else moves[0].distribution
        for plain, alike in itertools.groupby(enumerate(moves, first), one_sum):
            if plain:
                seeds, scales = self._terms([move for _, move in alike], part)
                noise.add_all(flat, seeds, part.start, law, scales, fused=self.fused)
                continue
            group = list(alike)
            small = part.count <= _SMALL
            if small:
                seeds, scales = self._terms([move for _, move in group], part)
                terms = noise.scaled(seeds, part.start, part.count, law, scales, self.device)
            for number, move in group:
                change.zero_()
                if small:
                    for term in itertools.islice(terms, len(move.seeds)):
                        change.add_(term)
                else:
                    seeds, scales = self._terms([move], part)
                    noise.add_all(change, seeds, part.start, law, scales, fused=self.fused)
                if decays:
                    change.add_(flat, alpha=-move.decay)
                self._step(flat, change, part.start, number)

    def _terms(self, moves: Sequence[Move], part: Group) -> tuple[list[int], list[float]]:
        """The seeds of several moves, and what each one's direction is scaled by."""
        seeds = [seed for move in moves for seed in move.seeds]
        scales = [
            part.segment.scale * coefficient * self._law(seed, move.distribution)[1]
            for move in moves
            for seed, coefficient in zip(move.seeds, move.coefficients, strict=True)
        ]
        return seeds, scales

    def _step(self, weights: Tensor, change: Tensor, start: int, number: int) -> None:
        """``weights`` ← weights + float32 ``change``, of that shape, in move ``number``.

        ``start`` is the first one's index.
        """
        if weights.dtype == torch.float32:
            weights.add_(change)
            return
        moved = change.add_(weights).flatten()
        seed = noise.derive(number, _ROUNDING)
        noise.round_to(weights.flatten(), moved, seed, start, fused=self.fused)

    def _move_factors(self, factors: Factors, coefficients: Sequence[float], decay: float) -> None:
        """The sum is formed in the factors where they share V, and meets the weights once."""
        by = torch.tensor(coefficients, device=self.device)
        for searched in self.tensors:
            weight = searched.parameter.data
            left = torch.tensordot(by, factors.left(searched.name), 1)
            if weight.dim() != 2:
                self._step(weight, left * searched.scale, searched.offset, self._moves)
                continue
            right = factors.right(searched.name)
            if len(right) < len(by):
                change = left @ right[0].T
            else:
                weighted = factors.left(searched.name) * by[:, None, None]
                change = weighted.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).T
            change.mul_(searched.scale).add_(weight, alpha=-decay)
            self._step(weight, change, searched.offset, self._moves)

    def place(self, coordinates: Tensor) -> None:
        """θ ← start + coordinates (float32 ``[size]``)."""
        for segment in self.segments:
            group = Group(segment, segment.offset, len(segment.flat))
            self.write(Explicit(coordinates), group, segment.flat)

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

    def _parts(self, decaying: bool) -> Iterator[tuple[Group, bool]]:
        """All elements in pieces that a cache holds, and whether decay draws at them: matrices only."""
        for segment in self.segments:
            pieces = [(segment.offset, len(segment.flat), False)]
            if decaying:
                pieces = [(s.offset, s.parameter.numel(), s.parameter.dim() > 1) for s in segment.tensors]
            for start, count, decays in pieces:
                for low in range(0, count, _PIECE):
                    yield Group(segment, start + low, min(_PIECE, count - low)), decays

    def _add(
        self, values: Tensor, seed: int, start: int, scale: float, distribution: str, out: Tensor
    ) -> Tensor:
        """``out`` ← ``values`` plus ``scale`` · z(seed), whose elements begin at ``start``."""
        law, factor = self._law(seed, distribution)
        return noise.add(values, seed, start, law, scale * factor, out=out, fused=self.fused)

    def _displace(self, group: Group, coordinates: Tensor, out: Tensor) -> None:
        part = coordinates[group.start : group.start + group.count]
        out.copy_(torch.add(self._start_of(group), part, alpha=group.segment.scale))

    def _law(self, seed: int, distribution: str) -> tuple[str, float]:
        """The law of the elements of a direction, and what scales it as a whole."""
        if distribution != "sphere":
            return distribution, 1.0
        if seed not in self._radii:
            if len(self._radii) >= _RADII_KEPT:
                self._radii.clear()
            self._radii[seed] = noise.radius(seed, self.size, self.device)
        return "gaussian", math.sqrt(self.size) / self._radii[seed]

    def _start_of(self, group: Group) -> Tensor:
        """The elements as they were when coordinates were first used: what they displace."""
        if not self._start:
            self._start = {segment.offset: segment.flat.clone() for segment in self.segments}
        within = group.start - group.segment.offset
        return self._start[group.segment.offset][within : within + group.count]


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

    def factors(self, seeds: Sequence[int], distribution: str, low_rank: LowRank) -> Factors:
        raise UserError("the space 'projection' has no matrices for low-rank directions; choose full or lora")

    def move(self, *moves: Move) -> None:
        """As in `Space`, in coordinates; the decay draws them to the start point."""
        point = self._point
        for move in moves:
            if move.low_rank:
                self.factors(move.seeds, move.distribution, move.low_rank)
            point = point * (1.0 - move.decay)
            for seed, coefficient in zip(move.seeds, move.coefficients, strict=True):
                law, factor = self._law(seed, move.distribution)
                z = noise.direction(seed, 0, self.dimension, law, point.device)
                point.add_(z, alpha=coefficient * factor)
        self.place(point)

    def place(self, coordinates: Tensor) -> None:
        super().place(coordinates)
        self._point = coordinates.clone()

    def resolved(self, candidate: Candidate) -> Candidate:
        if isinstance(candidate, Explicit):
            return candidate
        law, factor = self._law(candidate.seed, candidate.distribution)
        z = noise.direction(candidate.seed, 0, self.dimension, law, self._point.device)
        return Explicit(torch.add(self._point, z, alpha=candidate.scale * factor))

    def _displace(self, group: Group, coordinates: Tensor, out: Tensor) -> None:
        counters = torch.arange(group.start, group.start + group.count, device=out.device)
        words = noise.words_at(self._seed, counters).long() & 0xFFFFFFFF
        signs = 1.0 - 2.0 * (words & 1)
        scale = (self.dimension / self.elements) ** 0.5
        delta = coordinates[(words >> 1) % self.dimension] * (signs * scale)
        out.copy_(self._start_of(group) + delta)


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
