"""Chooses how candidates are scored: one by one, or several in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.batched import CannotBatch, LowRankSource, ManyPoints, Source, Stacked, repeated
from pipeline.engine.modules import Point, SearchedModules
from pipeline.engine.onthefly import HeldPoint, OnePoint, Scratch
from pipeline.errors import UserError
from pipeline.models.prompt import tokens_in
from pipeline.objective import AnyObjective, TextObjective, cross_entropy, judge
from pipeline.optimizer import Candidate, Seeded
from pipeline.space import Space
from pipeline.tasks.base import Batch, TaskModel

_STACKED = 2**24  # elements of weights and features held at once for several candidates
_LOGITS = 2**25  # elements of their logits
_TOKENS = {"cpu": 2**11}  # of one forward pass: with more, a CPU loses what its caches hold
_TOKENS_ELSEWHERE = 2**15
_ALIKE = {torch.float32: 1e-4}  # how far two ways to score a probe may differ, relatively
_ALIKE_IN_HALF = 2e-2
_APART = 10  # how far apart two probes must be, in that
_PROBES = 6  # pairs, each four times as far apart as the one before


class Scorer:
    """Scores candidates of ``space`` with forward passes of ``model``; weights are not written.

    Several share a forward pass where they have low rank or the space is small, and the model is one whose
    layers keep the lanes apart: what that gives is held, once, against one by one.
    """

    def __init__(self, model: TaskModel, space: Space, objective: AnyObjective) -> None:
        self._model = model
        self._objective = objective
        self._judged: Callable[[Tensor], Tensor] = lambda logits: logits  # set by `losses`, for its batch
        self._space = space
        self._prompt = tokens_in(model)
        self._modules = SearchedModules(model, space)
        self._scratch = Scratch()
        self.together: bool | None = None
        """Whether candidates may share a forward pass; None until it was tried."""
        self._classes: int | None = None  # until a forward pass has shown them

    @property
    def found(self) -> dict[str, Any]:
        """What forward passes have shown: plain data, empty before the first."""
        known = {"together": self.together, "classes": self._classes}
        return {key: value for key, value in known.items() if value is not None}

    @found.setter
    def found(self, before: dict[str, Any]) -> None:
        self.together, self._classes = before.get("together"), before.get("classes")

    def close(self) -> None:
        """Leaves the model as it was found."""
        self._modules.close()

    def losses(self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]) -> Tensor:
        """The objective at each candidate, float32 ``[candidates]`` on the CPU.

        ``features``, where given, are what the head reads.
        """
        if isinstance(self._objective, TextObjective):
            return torch.tensor([self._written(batch, each, self._objective) for each in candidates])
        self._judged = judge(self._objective, batch)
        parts = [
            self._scored(batch, features, candidates[start : start + count])
            for start, count in self._lanes(batch, features, candidates)
        ]
        return torch.cat(parts).cpu()

    def _written(self, batch: Batch, candidate: Candidate, objective: TextObjective) -> float:
        """The objective of what is written at a candidate: one by one, since texts end where they end."""
        point: Point = HeldPoint(self._space, candidate)
        if isinstance(candidate, Seeded) and candidate.low_rank:
            point = ManyPoints(self._source([candidate]), 1, set(), None)
        with self._modules.at(point):
            texts = self._model.write(batch)
        assert batch.asked
        return objective.loss(batch.asked, texts)

    def _scored(self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]) -> Tensor:
        if len(candidates) > 1:
            if self.together is None:
                self.together = self._proven(batch, features, candidates)
            if self.together:
                return self._together(batch, features, candidates)
        return torch.cat([self._alone(batch, features, candidate) for candidate in candidates])

    def _alone(self, batch: Batch, features: Tensor | None, candidate: Candidate) -> Tensor:
        if isinstance(candidate, Seeded) and candidate.low_rank:
            return self._together(batch, features, [candidate])
        return self._forward(batch, features, 1, OnePoint(self._space, candidate, self._scratch))

    def _together(self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]) -> Tensor:
        lanes = len(candidates)
        ids = None
        sizes = {len(batch.targets)}
        if features is None:
            if "input_ids" in batch.inputs:
                ids = self._model.read_shape(batch)
                sizes |= {ids[0], ids.numel()}
                ids = torch.Size((lanes * ids[0], *ids[1:]))
            batch = repeated(batch, lanes) if lanes > 1 else batch
        else:
            sizes.add(len(features))
            features = features.repeat(lanes, *[1] * (features.dim() - 1))
        point = ManyPoints(self._source(candidates), lanes, sizes, ids)
        return self._forward(batch, features, lanes, point)

    def _source(self, candidates: Sequence[Candidate]) -> Source:
        seeded = [candidate for candidate in candidates if isinstance(candidate, Seeded)]
        if seeded and seeded[0].low_rank:
            return LowRankSource.at(self._space, seeded)
        return Stacked.at(self._space, candidates)

    def _forward(self, batch: Batch, features: Tensor | None, lanes: int, point: Point) -> Tensor:
        """The objective in each lane: float32 ``[lanes]``."""
        with self._modules.at(point):
            logits = self._model(batch) if features is None else self._model.outputs(features)
        self._classes = logits.shape[-1]
        losses = self._judged(logits.reshape(lanes, -1, logits.shape[-1]))
        if not isinstance(losses, Tensor) or losses.shape != (lanes,):
            made = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"the objective gave {made} for {lanes} candidates; it must give a tensor of a loss for each"
            )
        return losses.float()

    def _lanes(
        self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[int, int]]:
        """Where runs of candidates that may share a forward pass begin, and how many they are."""
        start = 0
        while start < len(candidates):
            count, most = 1, self._most(batch, features, candidates[start])
            law = _law(candidates[start])
            while count < min(most, len(candidates) - start) and _law(candidates[start + count]) == law:
                count += 1
            yield start, count
            start += count

    def _most(self, batch: Batch, features: Tensor | None, candidate: Candidate) -> int:
        """How many candidates like this one may share a forward pass."""
        low_rank = isinstance(candidate, Seeded) and candidate.low_rank is not None
        if self._classes is None or self.together is False or not (low_rank or self._space.stackable):
            return 1
        most = _LOGITS // (len(batch.targets) * max(self._classes, self._model.computed))
        if not low_rank:
            most = min(most, _STACKED // self._space.elements)
        if features is not None:
            return max(1, min(most, _STACKED // features.numel()))
        # of rows of two lengths, or of no tokens, a module's input does not show whose it is
        if "decoder_input_ids" in batch.inputs or "input_ids" not in batch.inputs:
            return 1
        examples, length = self._model.read_shape(batch)
        tokens = self._prompt + length
        most = min(most, _TOKENS.get(self._space.device.type, _TOKENS_ELSEWHERE) // (examples * tokens))
        # an input of one token, or of as many as there are examples, does not show which is which
        return 1 if length == 1 else max(1, most - (most * examples == tokens))

    def _proven(self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]) -> bool:
        """Whether two candidates score together as they do alone; they must be far enough apart to tell.

        By cross-entropy whatever the objective: one of few values may agree by chance.
        """
        judged, self._judged = self._judged, judge(cross_entropy, batch)
        try:
            return self._alike(batch, features, candidates)
        finally:
            self._judged = judged

    def _alike(self, batch: Batch, features: Tensor | None, candidates: Sequence[Candidate]) -> bool:
        segment = self._space.segments[0]
        scale = float(segment.flat.float().square().mean().sqrt()) / segment.scale or 1.0
        tolerance = _ALIKE.get(segment.flat.dtype, _ALIKE_IN_HALF)
        for _ in range(_PROBES):
            probe = Seeded(1, scale)
            if isinstance(candidates[0], Seeded):
                probe = replace(candidates[0], scale=scale)
            probes = [probe, replace(probe, seed=probe.seed + 1, scale=-scale)]
            alone = torch.cat([self._alone(batch, features, each) for each in probes])
            if not abs(alone[0] - alone[1]) > _APART * tolerance * alone.abs().max():
                scale *= 4.0
                continue
            try:
                together = self._together(batch, features, probes)
            except CannotBatch:
                return False
            return torch.allclose(together, alone, rtol=tolerance, atol=0.0)
        return False


def _law(candidate: Candidate) -> object:
    """What candidates of one forward pass must share."""
    return (candidate.distribution, candidate.low_rank) if isinstance(candidate, Seeded) else None
