"""What the engine and the trainer ask of any task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config import Config
    from pipeline.layout import Layout

WRITES_NONE = (
    "the objective scores texts, and this task's model writes none: choose a task that does, such as "
    "generation, or an objective on outputs, such as cross_entropy"
)


@dataclass(frozen=True)
class Asked:
    """What a model answers in its own words, where a task has it write.

    ``inputs`` are what it reads before the first word, the end of each text at the end of its row;
    ``references`` are what it may write, of one answer or several, and None where nothing is known;
    ``lengths`` are how many targets each example has; ``seed`` is what drawing starts from.
    """

    inputs: dict[str, Tensor]
    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...] | None
    lengths: tuple[int, ...]
    seed: int

    def to(self, device: torch.device) -> Asked:
        """The same on another device."""
        return replace(self, inputs={name: tensor.to(device) for name, tensor in self.inputs.items()})


@dataclass(frozen=True)
class Batch:
    """Model inputs and what they should give.

    ``inputs`` maps the model's argument names to tensors ``[examples, …]``: of texts, ``input_ids`` is
    ``[examples, tokens]`` and an ``attention_mask`` says which are none. ``targets`` is int64
    ``[outputs]``. ``positions`` are the flat token positions that have a target, int64 ``[outputs]``, or None
    where each example has one. ``examples`` are row numbers in the data set, or None where the inputs change
    each time they are drawn and nothing computed from them can be kept. ``asked`` is set where the model is
    to write texts.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    positions: Tensor | None = None
    examples: tuple[int, ...] | None = None
    asked: Asked | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            self.targets.to(device),
            None if self.positions is None else self.positions.to(device),
            self.examples,
            None if self.asked is None else self.asked.to(device),
        )


class TaskModel(nn.Module):
    """A model in two parts: ``features`` (the encoder) and ``outputs`` (the head).

    The split lets a search of the head alone compute the features once, and logits be computed only where
    there is a target.
    """

    encoder: nn.Module
    computed = 0
    """Logits that are computed for an output, where they are more than its classes."""

    @property
    def whole(self) -> nn.Module:
        """What ``from_pretrained`` loads of what `save` wrote."""
        return self.encoder

    def read_shape(self, batch: Batch) -> torch.Size:
        """The shape of the ids that the encoder is given."""
        return batch.inputs["input_ids"].shape

    def features(self, batch: Batch) -> Tensor:
        """Hidden states below the head: ``[outputs, hidden]``."""
        raise NotImplementedError

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[outputs, classes]``."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[outputs, classes]``."""
        return self.outputs(self.features(batch))

    def write(self, batch: Batch) -> list[str]:
        """What the model writes for each example that is ``asked``.

        Raises:
            UserError: it is not one that writes.
        """
        raise UserError(WRITES_NONE)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that only ``outputs`` reads."""
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Writes what `Task.load` and the tools of the ecosystem read; ``tokenizer`` is that of `Start`."""
        raise NotImplementedError

    def add_lora(self, rank: int, seed: int) -> None:
        """Adds low-rank factors to every linear layer of the encoder; the output is unchanged by it."""
        from pipeline.models.loading import with_lora

        with_lora(self.encoder, rank, seed)

    def save_adapter(self, folder: Path, base: str, rank: int) -> None:
        """Writes what `add_lora` added as a PEFT adapter of the model in ``base``."""
        from pipeline.models.adapter import save

        save(self, folder, base, rank)

    def add_prompt(self, tokens: int, seed: int) -> None:
        """Has the encoder read a prompt before each text: words, drawn from ``seed``."""
        from pipeline.models.prompt import with_prompt

        with_prompt(self.encoder, tokens, seed)


class BatchSource(Protocol):
    """Batches by number: the same number gives the same batch, whatever came before."""

    def __call__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Tested:
    """Held-out ``figures``, and of each test example its loss and how well it was answered, from 0 to 1.

    ``written`` has what a model wrote, where it writes.
    """

    figures: dict[str, float]
    losses: list[float]
    scores: list[float]
    written: list[str] = field(default_factory=list)


class Examiner(Protocol):
    """Measures a task whose figures are not loss and accuracy over targets."""

    def measure(self, model: TaskModel, batches: Sequence[Batch]) -> dict[str, float]:
        """``loss``, and the task's own figures."""
        ...

    def test(self, model: TaskModel, batches: Sequence[Batch]) -> Tested:
        """`measure`, with what each example came to."""
        ...


@dataclass
class Start:
    """Where a stage's training starts: a model on its device in eval mode, and batches.

    ``batch`` gives the batches to train on; ``train``, ``validation`` and ``test`` every example once, the
    first and last empty where nothing is measured on them. ``examiner`` measures; without one, the figures of
    `pipeline.measuring.predictions` are taken over the targets. ``tokenizer`` is None where no text is read.
    """

    model: TaskModel
    tokenizer: PreTrainedTokenizerBase | None
    batch: BatchSource
    validation: list[Batch]
    train: list[Batch] = field(default_factory=list)
    test: list[Batch] = field(default_factory=list)
    examiner: Examiner | None = None


@runtime_checkable
class Task(Protocol):
    """A kind of task, behind the entry-point group ``pipeline.tasks``: a class, called without arguments.

    ``reads`` is what of the prepared data it starts from: ``task``, labelled text, for the finetune stage;
    ``corpus``, unlabelled text, for pretraining. A class with ``data = "own"`` has rows of another kind, and
    a method that gives them: ``rows(config) -> DatasetDict`` of train, validation and test.
    """

    reads: ClassVar[str]

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """The model, its data and its head; the same for the same arguments.

        What must not be computed again on another machine is kept in ``folder``, and taken from there.

        Raises:
            UserError: an earlier stage has not run, or parameters that do not fit.
        """
        ...

    def load(self, folder: Path) -> TaskModel:
        """The finished model that `TaskModel.save` wrote, in eval mode."""
        ...

    def yardsticks(self, start: Start) -> dict[str, dict[str, float]]:
        """What the result stands beside, by name: figures on the test, made without training by steps."""
        ...
