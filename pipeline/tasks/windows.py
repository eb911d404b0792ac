"""Questions and contexts as batches for a model that points at answers: what is long is read in windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tasks.base import Asked, Batch
from pipeline.tasks.batching import pad

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase

WITHIN = "context_mask"  # beside what the encoder reads: which tokens are the context's


def windows_in(batch: Batch) -> int:
    """Of each of the batch's examples: as many of all."""
    assert batch.asked
    return len(batch.asked.inputs["first"]) // len(batch.asked.prompts)


@dataclass(frozen=True)
class _Example:
    """A question's ``row`` with windows of its context, each as a column's name to its tokens' values.

    ``place`` is where the first answer is: the window, and its first and last token there.
    """

    row: int
    windows: list[dict[str, list[int]]]
    place: tuple[int, int, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(len(each["input_ids"]) for each in self.windows)


class SpanData:
    """One split of questions, tokenized once. A context too long is read in windows that overlap.

    To learn from, each window that holds the whole answer is an example, and the others are left out. Held
    out, a question is one example with all its windows: the answer is looked for in all of them. Where none
    holds it, the last token of the context stands for it, so that it counts as not found.
    """

    def __init__(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, overlap: int, *, learn: bool
    ) -> None:
        read = tokenizer(
            list(rows["question"]), list(rows["context"]), return_offsets_mapping=True, verbose=False
        )
        self._pad = tokenizer.pad_token_id
        self._names = [name for name in ("token_type_ids",) if name in read]
        self._contexts, self._answers = list(rows["context"]), list(rows["answers"])
        starts = list(rows["starts"])
        self._examples: list[_Example] = []
        for row in range(len(rows)):
            windows = self._windows(read, row, max_length, overlap)
            first = starts[row][0]
            places = [_place(each, first, first + len(self._answers[row][0])) for each in windows]
            found = [(i, *place) for i, place in enumerate(places) if place]
            if learn:
                self._examples += [_Example(row, [windows[i]], (0, low, high)) for i, low, high in found]
            else:
                self._examples.append(_Example(row, windows, found[0] if found else _last(windows)))

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The batch of those examples, of as many windows each, which lie one after another in its inputs."""
        examples = [self._examples[i] for i in numbers]
        windows = [window for each in examples for window in each.windows]
        inputs = pad([window["input_ids"] for window in windows], self._pad)

        def column(name: str) -> Tensor:
            return pad([window[name] for window in windows], 0)["input_ids"]

        inputs |= {name: column(name) for name in (*self._names, WITHIN)}
        width = inputs["input_ids"].shape[1]
        places = [window * width + token for each in examples for window, token in _ends(each.place)]
        asked = Asked(
            {name: column(name) for name in ("first", "last")},
            tuple(self._contexts[each.row] for each in examples),
            tuple(tuple(self._answers[each.row]) for each in examples),
            (2,) * len(examples),
            0,
        )
        return Batch(inputs, torch.tensor(places), asked=asked)

    def by_length(self, batch_size: int) -> list[Batch]:
        """Every example once, those of like length together; a batch has ``batch_size`` windows at most, or
        those of one example.
        """
        batches = []
        numbers = sorted(range(len(self)), key=self._size)
        for count, alike in itertools.groupby(numbers, key=lambda i: len(self._examples[i].windows)):
            order, few = list(alike), max(1, batch_size // count)
            batches += [self.batch(order[i : i + few]) for i in range(0, len(order), few)]
        return batches

    def _size(self, number: int) -> tuple[int, int]:
        example = self._examples[number]
        return len(example.windows), example.longest

    def _windows(
        self, read: BatchEncoding, row: int, max_length: int, overlap: int
    ) -> list[dict[str, list[int]]]:
        """The question with each part of its context, as the tokenizer puts them together.

        Raises:
            UserError: the question leaves no room.
        """
        within = [int(part == 1) for part in read.sequence_ids(row)]
        offsets: list[tuple[int, int]] = read["offset_mapping"][row]
        columns = {name: list(read[name][row]) for name in ("input_ids", *self._names)} | {
            WITHIN: within,
            "first": [first for first, _ in offsets],
            "last": [last for _, last in offsets],
        }
        count, begin = sum(within), within.index(1)
        room = max_length - (len(within) - count)
        if room < 1:
            raise UserError(
                f"finetune.max_length is {max_length}: a question leaves no room for its context; raise it"
            )
        return [
            {
                name: values[:begin] + values[begin + low : begin + high] + values[begin + count :]
                for name, values in columns.items()
            }
            for low, high in parts(count, room, overlap)
        ]


def parts(length: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Where windows of ``room`` tokens begin and end that cover ``length`` of them.

    Neighbours share ``overlap`` tokens, at most half a window (Devlin et al. 2019, in SQuAD's reading).
    """
    step = room - min(overlap, room // 2)
    count = 1 + max(0, math.ceil((length - room) / step))
    return [(i * step, min(i * step + room, length)) for i in range(count)]


def _place(window: dict[str, list[int]], start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of the context's characters ``start`` to ``end``; None where they are cut."""
    offsets = list(zip(window["first"], window["last"], window[WITHIN], strict=True))
    tokens = [i for i, (first, last, within) in enumerate(offsets) if within and first < end and last > start]
    whole = tokens and offsets[tokens[-1]][1] >= end and offsets[tokens[0]][0] <= start
    return (tokens[0], tokens[-1]) if whole else None


def _last(windows: list[dict[str, list[int]]]) -> tuple[int, int, int]:
    last = max(i for i, within in enumerate(windows[-1][WITHIN]) if within)
    return len(windows) - 1, last, last


def _ends(place: tuple[int, int, int]) -> list[tuple[int, int]]:
    window, first, last = place
    return [(window, first), (window, last)]
