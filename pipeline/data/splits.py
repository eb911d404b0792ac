"""Splits that depend on the text alone: no seed, no row order, no duplicate on two sides.

Examples are ordered by the sha256 of their normalised text, and held-out sets are taken from the head of that
order, label by label. Runs of every seed therefore share one test set; a shuffled file gives the same one.
Few shots alone are drawn by the seed, out of the training and validation splits.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

from pipeline.errors import UserError

# Where the sizes asked for would take more than half of the rows, each is cut to this share of them.
SMALL_SHARE = 0.15
MIN_TRAIN = 8

NO_TARGET = ""  # the label of a text without one


class Example(NamedTuple):
    text: str
    label: str


@dataclass
class TaskSplits:
    """Three lists of examples without a common text, and what was dropped to get there."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    # Copies of a text inside the training source.
    duplicates_dropped: int = 0
    # Training rows whose text came with more than one label; all copies go.
    conflicting_dropped: int = 0
    # Training rows found in validation or test, and validation rows found in test.
    overlap_dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def items(self) -> list[tuple[str, list[Example]]]:
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


@dataclass
class CorpusSplits:
    """Two lists of unlabelled texts without a common one, and what was dropped to get there."""

    train: list[str]
    validation: list[str]
    duplicates_dropped: int = 0
    # Texts that are also in the task's validation or test split.
    leakage_dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def items(self) -> list[tuple[str, list[str]]]:
        return [("train", self.train), ("validation", self.validation)]


def normalise(text: str) -> str:
    """What makes two texts the same: case-folded, in Unicode form C, white space collapsed."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def content_hash(texts: Iterable[str], labels: Iterable[str] | None = None) -> str:
    """The sha256 of texts and labels in their order, in hexadecimal."""
    digest = hashlib.sha256()
    rows: Iterable[object] = texts if labels is None else zip(texts, labels, strict=True)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _order(text: str, salt: str = "") -> bytes:
    return hashlib.sha256((salt + normalise(text)).encode()).digest()


def _sorted(examples: Iterable[Example]) -> list[Example]:
    """By the hash; copies of a text that differ in case or spacing come in a fixed order too."""
    return sorted(examples, key=lambda example: (_order(example.text), example))


def split_task(
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    test: Sequence[Example] | None,
    validation_size: int,
    test_size: int,
    *,
    classes: bool = True,
) -> TaskSplits:
    """Three splits; what is not given is held out of ``train``, in proportion to the labels.

    Without ``classes`` a label is a text of its own, of which a text may have several: the first is kept.

    A given test set is used whole, copies included, and a given validation set but for what is in the test
    set: a text found in two splits stays in the test set first, then in validation.

    Raises:
        UserError: fewer than two labels, a label missing from train or test, too few rows.
    """
    pool, duplicates, conflicting = _deduplicated(train, classes)
    splits = TaskSplits(pool, [], [], duplicates, conflicting)
    if test is not None:
        splits.test = _sorted(test)
    if validation is not None:
        splits.validation = _keep_apart(splits, _sorted(validation), splits.test)
    pool = _keep_apart(splits, pool, [*splits.test, *splits.validation])
    wanted = {"test": test_size} if test is None else {}
    wanted |= {"validation": validation_size} if validation is None else {}
    sizes = _sizes(len(pool), wanted, splits.notes)
    if test is None:
        splits.test, pool = _take(pool, sizes["test"], classes)
    if validation is None:
        splits.validation, pool = _take(pool, sizes["validation"], classes)
    splits.train = pool
    if classes:
        _check_labels(splits)
    _check(splits)
    return splits


def few_shot(splits: TaskSplits, shots: int, seed: int) -> TaskSplits:
    """``shots`` examples of each label for training, and as many for validation, drawn by ``seed``.

    The test is the same for every seed. Validation has fewer of a label where there are no more.

    Raises:
        UserError: a label with fewer training examples.
    """
    counts = Counter(example.label for example in splits.train)
    for label, count in sorted(counts.items()):
        if count < shots:
            raise UserError(f"prepare.shots is {shots}, but the label '{label}' has {count} training rows")
    train, validation = (_drawn(each, shots, seed) for each in (splits.train, splits.validation))
    rows = f"{len(splits.train):,} training rows"
    note = f"few-shot: {shots} of each label drawn by the seed {seed}, out of {rows}"
    return replace(splits, train=train, validation=validation, notes=[*splits.notes, note])


def _drawn(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """By a hash of seed and text: other rows beside it do not change whether a text comes before another."""
    left = dict.fromkeys({example.label for example in examples}, shots)
    drawn = []
    for example in sorted(examples, key=lambda example: (_order(example.text, f"shots {seed}\n"), example)):
        if left[example.label]:
            left[example.label] -= 1
            drawn.append(example)
    return drawn


def _deduplicated(examples: Iterable[Example], classes: bool) -> tuple[list[Example], int, int]:
    """In hash order, one copy a text, none of a text in two classes; the counts of copies and conflicts."""
    kept: list[Example] = []
    duplicates = conflicting = 0
    for _, group in groupby(_sorted(examples), key=lambda example: normalise(example.text)):
        copies = list(group)
        if classes and len({example.label for example in copies}) > 1:
            conflicting += len(copies)
        else:
            kept.append(copies[0])
            duplicates += len(copies) - 1
    return kept, duplicates, conflicting


def _keep_apart(splits: TaskSplits, examples: list[Example], others: Iterable[Example]) -> list[Example]:
    taken = {normalise(example.text) for example in others}
    kept = [example for example in examples if normalise(example.text) not in taken]
    splits.overlap_dropped += len(examples) - len(kept)
    return kept


def _sizes(rows: int, wanted: dict[str, int], notes: list[str]) -> dict[str, int]:
    """How many rows to hold out for each split; small data gives less than was wanted, with a note."""
    for name, size in wanted.items():
        if size < 1:
            raise UserError(f"prepare.{name}_size is {size}; at least 1 row must be held out")
    if sum(wanted.values()) <= rows / 2:
        return wanted
    limit = max(1, int(rows * SMALL_SHARE))
    for name, size in wanted.items():
        if size > limit:
            notes.append(f"{name}: {limit} rows held out, not {size}, because there are {rows:,} rows in all")
    return {name: min(size, limit) for name, size in wanted.items()}


def _take(pool: list[Example], size: int, classes: bool) -> tuple[list[Example], list[Example]]:
    """The head of the pool, ``size`` examples, and the rest.

    Of ``classes`` it takes in proportion to the labels, at least one of each.
    """
    if not classes:
        return pool[:size], pool[size:]
    left = _quotas(Counter(example.label for example in pool), size)
    taken: list[Example] = []
    rest: list[Example] = []
    for example in pool:
        (taken if left[example.label] > 0 else rest).append(example)
        left[example.label] -= 1
    return taken, rest


def _quotas(counts: Counter[str], size: int) -> dict[str, int]:
    """Largest remainders; ties go to the label that sorts first."""
    total = counts.total()
    exact = {label: size * counts[label] / total for label in sorted(counts)}
    quotas = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: quotas[label] - exact[label])
    for label in by_remainder[: size - sum(quotas.values())]:
        quotas[label] += 1
    return {label: max(1, quota) for label, quota in quotas.items()}


def _check_labels(splits: TaskSplits) -> None:
    known = {example.label for example in splits.train}
    every = {example.label for _, examples in splits.items() for example in examples}
    if len(every) < 2:
        raise UserError(f"classification needs at least two labels; the rows have {_quoted(every) or 'none'}")
    for name, examples in splits.items()[1:]:
        if unseen := {example.label for example in examples} - known:
            dropped = splits.duplicates_dropped
            why = f" ({dropped} rows repeated a text and were dropped)" if dropped else ""
            raise UserError(
                f"no training row has the label {_quoted(unseen)}, which {name} rows have; "
                f"give more of it{why}"
            )
    if missing := known - {example.label for example in splits.test}:
        raise UserError(f"no test row has the label {_quoted(missing)}; give test rows of every label")


def _check(splits: TaskSplits) -> None:
    if not splits.validation:
        raise UserError("no validation rows are left; give more rows, or other ones than the test's")
    if len(splits.train) < MIN_TRAIN:
        raise UserError(f"{len(splits.train)} rows are left to train on; at least {MIN_TRAIN} are needed")


def _quoted(labels: Collection[str]) -> str:
    return ", ".join(f"'{label}'" for label in sorted(labels)[:5])


def split_corpus(texts: Iterable[str], held_out: Iterable[str], validation_size: int) -> CorpusSplits:
    """Unlabelled texts without copies and without any text of ``held_out``, in two splits.

    The order is salted: by the plain one, the task's own training texts (what its held-out sets left) would
    all come late and be missing from the corpus's validation split.

    Raises:
        UserError: too few texts are left.
    """
    ordered = sorted(texts, key=lambda text: (_order(text, "corpus\n"), text))
    seen, splits, kept = {normalise(text) for text in held_out}, CorpusSplits([], []), []
    leaked = frozenset(seen)
    for text in ordered:
        form = normalise(text)
        splits.leakage_dropped += form in leaked
        splits.duplicates_dropped += form in seen and form not in leaked
        if form not in seen:
            seen.add(form)
            kept.append(text)
    if len(kept) < MIN_TRAIN:
        raise UserError(
            f"the corpus has {len(kept)} texts left; at least {MIN_TRAIN} are needed: see prepare.corpus"
        )
    size = _sizes(len(kept), {"corpus_validation": validation_size}, splits.notes)["corpus_validation"]
    splits.validation, splits.train = kept[:size], kept[size:]
    return splits
