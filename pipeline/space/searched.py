"""The searched tensors of a model: read at a candidate, perturbed, moved."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline import noise
from pipeline.errors import UserError
from pipeline.optimizer import Candidate, Drawn, Explicit, LowRank, Move, Seeded
from pipeline.space.factors import Factors, Layout
from pipeline.space.memory import PIECE, Group, Searched, Segment

_RADII_KEPT = 1024  # lengths of sphere directions: a step asks for each several times
_STACKED = 2**20  # elements of a space whose candidates may be stacked
_GROUP = 2**21  # elements perturbed in one call
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = 9  # the path to the seeds of random rounding
_SMALL = 2**12  # elements of a piece whose directions are drawn for many moves at once


class Space:
    """The searched tensors of a model, and every way to read, perturb and move them.

    Their memory becomes the space's (see `Segment`): build it when the model is on its device.
    ``seed`` is the experiment's. ``fused`` asks for compiled noise: the same bits, sooner, after a
    compilation of some seconds.
    """

    def __init__(self, kind: str, tensors: Iterable[tuple[str, nn.Parameter, float]], seed: int) -> None:
        self.kind = kind
        self._seed = seed
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
        for searched in self.tensors:
            if searched.parameter.dtype not in _DTYPES:
                dtype = str(searched.parameter.dtype).removeprefix("torch.")
                raise UserError(f"{searched.name} is {dtype}, which is not searched: set dtype=float32")
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
        """The candidate in the form in which its elements are had soonest.

        Raises:
            UserError: its coordinates are of another size.
        """
        return self._read(candidate) if isinstance(candidate, Drawn) else candidate

    def _read(self, candidate: Drawn) -> Explicit:
        coordinates = candidate.coordinates
        if coordinates.shape != (self.size,):
            shape = tuple(coordinates.shape)
            raise UserError(f"a candidate has coordinates of shape {shape}; the space has {self.size:,}")
        return Explicit(coordinates)

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
            resolved = [self.resolved(each) for each in candidates]
            return {s.name: torch.stack([self.value(s, each) for each in resolved]) for s in self.tensors}
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
        memory = torch.empty(min(PIECE, self.elements), device=self.device)  # fresh memory is dear
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
                    change.sub_(flat * move.decay)  # a fused product and sum would round as the machine does
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
        seed = noise.derive(self._seed, _ROUNDING, number)
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
        for group, _ in self._parts(False):
            self.write(Explicit(coordinates), group, group.flat)

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
                for piece in Group(segment, start, count).pieces():
                    yield piece, decays

    def _add(
        self, values: Tensor, seed: int, start: int, scale: float, distribution: str, out: Tensor
    ) -> Tensor:
        """``out`` ← ``values`` plus ``scale`` · z(seed), whose elements begin at ``start``."""
        law, factor = self._law(seed, distribution)
        return noise.add(values, seed, start, law, scale * factor, out=out, fused=self.fused)

    def _displace(self, group: Group, coordinates: Tensor, out: Tensor) -> None:
        part = coordinates[group.start : group.start + group.count]
        out.copy_(self._start_of(group) + part * group.segment.scale)

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
