"""Splits follow from the texts alone, and no text, however spelt, is in two of them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pipeline.data.splits import (
    Example,
    TaskSplits,
    content_hash,
    few_shot,
    normalise,
    split_corpus,
    split_task,
)
from pipeline.errors import UserError

Rows = list[Example]


def rows(count: int, labels: str = "ab", start: int = 0) -> Rows:
    return [Example(f"Text {i}", labels[i % len(labels)]) for i in range(start, start + count)]


def messy(count: int) -> Rows:
    """Every fifth text comes again in another spelling that is the same once normalised."""
    again = [Example(f" tEXT \t {e.text.split()[1]}\n", e.label) for e in rows(count)[::5]]
    return rows(count) + again


def forms(examples: Rows) -> set[str]:
    return {normalise(example.text) for example in examples}


def assert_apart(splits: TaskSplits) -> None:
    every = [form for _, examples in splits.items() for form in forms(examples)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("one", "other"),
    [("Straße", "STRASSE"), ("a  b", "A\tb\n"), ("caf\u00e9", "cafe\u0301"), ("a\u00a0b", "a b")],
)
def test_normalised_forms_meet(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_shuffled_rows_give_the_same_splits() -> None:
    shuffled = messy(300)
    random.Random(0).shuffle(shuffled)
    assert split_task(messy(300), None, None, 40, 50) == split_task(shuffled, None, None, 40, 50)


def test_held_out_rows_stay_when_rows_are_added() -> None:
    """The share of the old test set that is in the new one falls with the data's growth, not to chance."""
    small = split_task(rows(1000), None, None, 100, 100)
    grown = split_task(rows(1100), None, None, 100, 100)
    assert len(set(small.test) & set(grown.test)) >= 75


def test_sizes_and_balance_are_as_asked() -> None:
    skewed = rows(700, "a") + rows(300, "b", start=700)
    splits = split_task(skewed, None, None, 100, 200)
    assert Counter(e.label for e in splits.test) == {"a": 140, "b": 60}
    assert Counter(e.label for e in splits.validation) == {"a": 70, "b": 30}
    assert len(splits.train) == 700
    assert splits.notes == []


def test_quotas_add_up_for_uneven_labels() -> None:
    splits = split_task(rows(1000, "abc"), None, None, 101, 100)
    assert (len(splits.validation), len(splits.test)) == (101, 100)


def test_copies_are_dropped_and_no_text_is_in_two_splits() -> None:
    splits = split_task(messy(300), None, None, 40, 50)
    assert splits.duplicates_dropped == 60
    assert sum(len(examples) for _, examples in splits.items()) == 300
    assert_apart(splits)


def test_a_text_with_two_labels_goes_with_all_its_copies() -> None:
    splits = split_task([*rows(100), Example("TEXT 3", "a"), Example("text 4", "a")], None, None, 10, 10)
    assert splits.conflicting_dropped == 2
    assert splits.duplicates_dropped == 1
    assert "text 3" not in {form for _, examples in splits.items() for form in forms(examples)}


def test_given_files_keep_test_first_then_validation() -> None:
    test = [*rows(20), Example("TEXT 1", "b")]
    validation = [Example("text  2", "a"), *rows(20, start=100)]
    splits = split_task(rows(150), validation, test, 0, 1000)
    assert splits.notes == []
    assert Counter(splits.test) == Counter(test)
    assert Counter(splits.validation) == Counter(validation[1:])
    assert splits.overlap_dropped == 41
    assert len(splits.train) == 110
    assert_apart(splits)


def test_validation_is_held_out_beside_a_given_test_file() -> None:
    splits = split_task(rows(200), None, rows(20), 30, 1000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (150, 30, 20)
    assert_apart(splits)


def test_small_data_holds_out_less_and_says_so() -> None:
    splits = split_task(rows(40), None, None, 1000, 1000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (28, 6, 6)
    assert splits.notes == [
        "test: 6 rows held out, not 1000, because there are 40 rows in all",
        "validation: 6 rows held out, not 1000, because there are 40 rows in all",
    ]


def test_a_rare_label_is_in_every_split() -> None:
    splits = split_task(rows(200, "a") + rows(3, "b", start=200), None, None, 20, 20)
    for _, examples in splits.items():
        assert {e.label for e in examples} == {"a", "b"}


@pytest.mark.parametrize(
    ("train", "validation", "test", "message"),
    [
        (rows(40, "a"), None, None, "at least two labels; the rows have 'a'"),
        ([Example("x", "a"), Example("X", "b")], None, None, "at least two labels; the rows have none"),
        (rows(8), None, None, "4 rows are left to train on; at least 8"),
        (rows(40), None, [Example("x", "c")], "no training row has the label 'c', which test rows have"),
        (
            rows(40),
            [Example("x", "c")],
            None,
            "no training row has the label 'c', which validation rows have",
        ),
        (rows(40), None, [Example("x", "a")], "no test row has the label 'b'"),
        (rows(40), rows(4), rows(4), "no validation rows are left"),
        ([*rows(40), Example("x", "c")], None, None, "no training row has the label 'c'.*give more of it"),
    ],
)
def test_splits_that_cannot_be_made(
    train: Rows, validation: Rows | None, test: Rows | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        split_task(train, validation, test, 1000, 1000)


def test_nothing_to_hold_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"prepare\.test_size is 0"):
        split_task(rows(40), None, None, 10, 0)


def test_corpus_has_no_copy_and_nothing_held_out() -> None:
    texts = [example.text for example in messy(200)]
    corpus = split_corpus(texts, ["text\u00a07", "TEXT 5"], 20)
    assert (corpus.leakage_dropped, corpus.duplicates_dropped) == (3, 39)
    every = [normalise(text) for text in corpus.train + corpus.validation]
    assert len(every) == len(set(every)) == 198
    assert not {"text 7", "text 5"} & set(every)
    assert len(corpus.validation) == 20
    assert split_corpus(reversed(texts), ["TEXT 5", "text 7"], 20) == corpus


def test_corpus_validation_is_drawn_from_the_task_too() -> None:
    """By the task's own order the task's training texts would come last, and none would be held out."""
    task = split_task(rows(1000), None, None, 250, 250)
    own = [example.text for example in task.train]
    others = [f"Paragraph {i}" for i in range(500)]
    held_out = split_corpus(own + others, [], 200).validation
    assert 70 <= sum(text in own for text in held_out) <= 130


def test_a_corpus_of_a_few_texts_is_refused() -> None:
    with pytest.raises(UserError, match="the corpus has 7 texts left"):
        split_corpus([f"text {i}" for i in range(8)], ["text 1"], 1)


def test_content_hash_sees_order_and_borders() -> None:
    hashes = [content_hash(x) for x in (["ab", "c"], ["a", "bc"], ["c", "ab"])]
    hashes += [content_hash(["ab", "c"], x) for x in (["1", "2"], ["2", "1"])]
    assert len(set(hashes)) == 5


def test_few_shots_are_so_many_of_each_label_and_the_test_stays() -> None:
    whole = split_task(rows(600, "abb"), None, None, 90, 90)
    drawn = few_shot(whole, 16, seed=3)
    for examples, pool in ((drawn.train, whole.train), (drawn.validation, whole.validation)):
        assert Counter(example.label for example in examples) == {"a": 16, "b": 16}
        assert set(examples) <= set(pool)
    assert drawn.test == whole.test
    assert_apart(drawn)
    assert few_shot(whole, 16, seed=3) == drawn
    other = few_shot(whole, 16, seed=4)
    assert other.test == drawn.test
    assert len(set(other.train) & set(drawn.train)) < 16
    # more shots with the same seed hold the fewer
    assert set(drawn.train) < set(few_shot(whole, 20, seed=3).train)
    assert "few-shot: 16 of each label drawn by the seed 3, out of 420 training rows" in drawn.notes


def test_more_shots_than_rows_is_one_line_and_validation_takes_what_there_is() -> None:
    whole = split_task(rows(600, "abb"), None, None, 30, 90)
    with pytest.raises(UserError, match=r"prepare\.shots is 200, but the label 'a' has 160 training rows"):
        few_shot(whole, 200, seed=0)
    assert Counter(e.label for e in few_shot(whole, 16, seed=0).validation) == {"a": 10, "b": 16}
