"""Scores an optimizer's candidates on one batch, counts what that costs, and notes what it did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline import noise
from pipeline.engine import shared
from pipeline.engine.scorer import Scorer
from pipeline.errors import UserError
from pipeline.objective import AnyObjective, BatchObjective, TextObjective, cross_entropy, judge
from pipeline.optimizer import BudgetSpent, Candidate, Drawn, Explicit, Move, Seeded
from pipeline.space import Space
from pipeline.tasks.base import Batch, TaskModel

NO_GRADIENT = (
    "this optimizer needs a gradient, which the objective has not; "
    "choose the objective cross_entropy or another optimizer"
)


@dataclass
class StepRecord:
    """What is needed to redo a step without the model: its moves along seeds, or the losses it was told.

    ``only_moved`` is false once weights were written in another way.
    """

    losses: list[list[float]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    only_moved: bool = True


class Engine:
    """Binds batches to evaluators for one model, space, budget and objective."""

    def __init__(
        self,
        model: TaskModel,
        space: Space,
        budget: int,
        run_seed: int,
        objective: AnyObjective = cross_entropy,
    ) -> None:
        self.model = model.eval()
        self.objective = objective
        self.space = space
        self.budget = budget
        self.run_seed = run_seed
        self.forward_passes = 0
        space.fused = noise.worth_fusing(space.elements * budget)
        # what is written is written anew at each candidate
        writes = isinstance(objective, TextObjective)
        self._head_only = not writes and space.only_in(model.head_parameters())
        self._scorer = Scorer(model, space, objective)
        self._kept: dict[int, Tensor] = {}
        self._shared: shared.Features | None = None

    @property
    def found(self) -> dict[str, Any]:
        """What was found out on the way about how to score: a run that goes on keeps it.

        It was found at one point and one batch, and the ways to score differ in their last bits.
        """
        return self._scorer.found

    @found.setter
    def found(self, before: dict[str, Any]) -> None:
        self._scorer.found = before

    @torch.inference_mode()
    def recall(self, batches: Iterable[Batch]) -> None:
        """Keeps what is kept of rows, features and what the objective reads, as in the steps of ``batches``.

        It depends, in its last bits, on the rows that a row was first read with. Ends when no batch brings
        another row.
        """
        reads = isinstance(self.objective, BatchObjective)
        if not self._head_only and not reads:
            return
        seen: set[int] = set()
        old = 0  # rows in turn that were there already
        for batch in batches:
            if batch.examples is None:
                return
            moved = batch.to(self.space.device)
            if reads:
                judge(self.objective, moved)
            if self._head_only:
                self._features(moved)
            old = old + len(batch.examples) if seen.issuperset(batch.examples) else 0
            seen.update(batch.examples)
            if old >= len(seen):
                return

    def bind(self, batch: Batch, step: int) -> BatchEvaluator:
        """An evaluator for one step's batch."""
        return BatchEvaluator(self, batch.to(self.space.device), step)

    def close(self) -> None:
        """Leaves the model as it was found, at its current weights."""
        self._scorer.close()

    def spend(self, passes: int) -> None:
        """Counts forward passes before they are made.

        Raises:
            BudgetSpent: more than are left.
        """
        if self.forward_passes + passes > self.budget:
            raise BudgetSpent
        self.forward_passes += passes

    @torch.inference_mode()
    def losses(self, batch: Batch, candidates: Sequence[Candidate]) -> list[float]:
        """The objective at each candidate. A search of the head alone computes the features once."""
        self.spend(len(candidates))
        features = self._features(batch) if self._head_only else None
        return self._scorer.losses(batch, features, candidates).tolist()

    def gradient(self, batch: Batch, step: int) -> tuple[float, list[Tensor]]:
        """The loss and its gradient, with dropout as in training; counts as three forward passes.

        Raises:
            UserError: the objective has none.
        """
        if isinstance(self.objective, TextObjective):
            raise UserError(NO_GRADIENT)
        self.spend(3)
        tensors = [searched.parameter for searched in self.space.tensors]
        cuda = [self.space.device] if self.space.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(noise.derive(self.run_seed, 4, step))
            self.model.train()
            try:
                loss = judge(self.objective, batch)(self.model(batch))
                if not loss.requires_grad:
                    raise UserError(NO_GRADIENT)
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
            finally:
                self.model.eval()
        return float(loss.detach()), list(gradients)

    def _features(self, batch: Batch) -> Tensor:
        """What the head reads. Rows of a data set are computed once and kept; drawn inputs are not kept."""
        if batch.examples is None:
            return self.model.features(batch)
        missing = [i for i, example in enumerate(batch.examples) if example not in self._kept]
        if missing:
            if not self._kept:
                self._shared = shared.store(self.model, f"{self.run_seed}x{len(batch.examples)}")
            missing = self._taken_over(batch, missing)
        if missing:
            rows = torch.tensor(missing, device=batch.targets.device)
            inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
            examples = tuple(batch.examples[i] for i in missing)
            computed = self.model.features(Batch(inputs, batch.targets[rows], examples=examples))
            self._kept.update(zip(examples, computed, strict=True))
            if self._shared is not None:
                self._shared.update(
                    {shared.content(batch, [i]): self._kept[batch.examples[i]] for i in missing}
                )
        return torch.stack([self._kept[example] for example in batch.examples])

    def _taken_over(self, batch: Batch, missing: list[int]) -> list[int]:
        """Keeps what another run has computed of those rows; the rows that are missing still."""
        if self._shared is None or batch.examples is None:
            return missing
        still = []
        for i in missing:
            found = self._shared.get(shared.content(batch, [i]))
            if found is None:
                still.append(i)
            else:
                self._kept[batch.examples[i]] = found.to(batch.targets.device)
        return still


class BatchEvaluator:
    """The `Evaluator` of one step."""

    def __init__(self, engine: Engine, batch: Batch, step: int) -> None:
        self._engine = engine
        self._batch = batch
        self._step = step
        self.record = StepRecord()

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        for candidate in candidates:
            self._check(candidate)
        losses = self._engine.losses(self._batch, candidates)
        self.record.losses.append(losses)
        return losses

    def move(self, move: Move) -> None:
        self._engine.space.move(move)
        plain = replace(move, seeds=list(move.seeds), coefficients=[float(c) for c in move.coefficients])
        self.record.moves.append(plain)

    def _check(self, candidate: Candidate) -> None:
        """Raises UserError for what an optimizer cannot mean: another size would be scored without a word."""
        if isinstance(candidate, Drawn):
            return  # to read its coordinates here would draw them twice: the space checks them
        if isinstance(candidate, Explicit):
            shape, size = tuple(candidate.coordinates.shape), self._engine.space.size
            if shape != (size,):
                raise UserError(f"a candidate has coordinates of shape {shape}; the space has {size:,}")
        elif not isinstance(candidate, Seeded):
            raise UserError(f"a candidate is a {type(candidate).__name__}; it must be Seeded or Explicit")

    def place(self, coordinates: Tensor) -> None:
        self._check(Explicit(coordinates))
        self.record.only_moved = False
        self._engine.space.place(coordinates)

    def gradient(self) -> tuple[float, list[Tensor]]:
        return self._engine.gradient(self._batch, self._step)

    def tensors(self) -> list[Tensor]:
        self.record.only_moved = False
        if not self._engine.space.elementwise:
            raise UserError(
                f"the space '{self._engine.space.kind}' has coordinates other than the weights' elements, "
                "which this method writes to: leave out encoder_scale, or choose full, biases, norms, head "
                "or lora"
            )
        half = [s.parameter.dtype for s in self._engine.space.tensors if s.parameter.dtype != torch.float32]
        if half:
            raise UserError(
                f"this method adds its steps to the weights itself, and {half[0]} would lose them: "
                "set dtype=float32".replace("torch.", "")
            )
        return [searched.parameter for searched in self._engine.space.tensors]
