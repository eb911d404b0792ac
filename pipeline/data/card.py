"""The data card: what was prepared, out of what, under which licence, and what was left out."""

from __future__ import annotations

import hashlib
import html
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeline.data.sources import Rows
from pipeline.data.splits import CorpusSplits, TaskSplits, content_hash

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

EXAMPLES = 3
EXAMPLE_CHARACTERS = 200


def card(
    read: list[tuple[str, Rows]], task: TaskSplits | None, corpus: CorpusSplits | None, kind: str
) -> dict[str, Any]:
    """Plain values for ``card.json``. ``read`` pairs a source with its role: train, …, corpus.

    ``kind`` is ``classification``, or the task's name where its labels are texts.

    ``hash`` covers every text and label of every split, so two cards with one hash describe the same data.
    """
    task_card, corpus_card = task and _task(task, kind), corpus and _corpus(corpus)
    parts = [
        f"{kind}/{split}/{about['sha256']}"
        for kind, described in (("task", task_card), ("corpus", corpus_card))
        if described
        for split, about in described["splits"].items()
    ]
    notes = [*(task.notes if task else []), *(corpus.notes if corpus else [])]
    return {
        "hash": content_hash(parts),
        "sources": [_source(role, rows) for role, rows in read],
        "task": task_card,
        "corpus": corpus_card,
        "notes": notes,
    }


def own(kind: str, rows: DatasetDict) -> dict[str, Any]:
    """The card of rows that a task gives itself; their description is that of the training split."""
    splits = {name: {"rows": len(split), "sha256": _content(split)} for name, split in rows.items()}
    about = {"kind": kind, "columns": rows["train"].column_names, "splits": splits}
    return {
        "hash": content_hash([f"{name}/{split['sha256']}" for name, split in splits.items()]),
        "sources": [],
        "task": {**about, "description": rows["train"].info.description},
        "corpus": None,
        "notes": [],
    }


def _content(rows: Dataset) -> str:
    """Of every cell, as it is stored."""
    said = hashlib.sha256()
    for table in rows.with_format("arrow").iter(1000):
        said.update(repr(table.to_pylist()).encode())
    return said.hexdigest()


def _source(role: str, rows: Rows) -> dict[str, Any]:
    return {
        "role": role,
        "source": rows.source,
        "licence": rows.licence,
        "description": rows.description,
        "citation": rows.citation,
        "sha256": rows.sha256,
        "rows": len(rows.texts),
        "empty_dropped": rows.empty,
    }


def _task(task: TaskSplits, kind: str) -> dict[str, Any]:
    splits = {}
    classes = kind == "classification"
    for name, examples in task.items():
        texts, labels = [e.text for e in examples], [e.label for e in examples]
        about = {"labels": dict(sorted(Counter(labels).items())) if classes else {}, **_lengths(texts)}
        splits[name] = {"rows": len(texts), "sha256": content_hash(texts, labels), **about}
    names = sorted({example.label for example in task.train}) if classes else []
    shown = {label: [e.text for e in task.train if e.label == label][:EXAMPLES] for label in names}
    if not classes:
        shown = {"": [f"{e.text} → {e.label}" if e.label else e.text for e in task.train[:EXAMPLES]]}
    return {
        "kind": kind,
        "labels": names,
        "splits": splits,
        "duplicates_dropped": task.duplicates_dropped,
        "conflicting_dropped": task.conflicting_dropped,
        "overlap_dropped": task.overlap_dropped,
        "examples": {label: [_shortened(text) for text in texts] for label, texts in shown.items()},
    }


def _corpus(corpus: CorpusSplits) -> dict[str, Any]:
    return {
        "splits": {
            name: {"rows": len(texts), "sha256": content_hash(texts), **_lengths(texts)}
            for name, texts in corpus.items()
        },
        "duplicates_dropped": corpus.duplicates_dropped,
        "leakage_dropped": corpus.leakage_dropped,
    }


def _lengths(texts: list[str]) -> dict[str, dict[str, int]]:
    return {
        "words": _spread([len(text.split()) for text in texts]),
        "characters": _spread([len(text) for text in texts]),
    }


def _spread(counts: list[int]) -> dict[str, int]:
    import numpy as np

    low, median, p95, high = np.percentile(counts, [0, 50, 95, 100], method="lower")
    return {"min": int(low), "median": int(median), "p95": int(p95), "max": int(high)}


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[:EXAMPLE_CHARACTERS].rstrip() + " …"


def markdown(card: dict[str, Any]) -> str:
    """The card for a reader: ``card.md``."""
    lines = ["# Data card", "", f"Content sha256: `{card['hash']}`", ""]
    lines += [f"> Note: {note}" for note in card["notes"]] + ([""] if card["notes"] else [])
    lines += ["## Sources", ""]
    for source in card["sources"]:
        lines += _source_lines(source)
    if card["task"]:
        lines += _own_lines(card["task"]) if "columns" in card["task"] else _task_lines(card["task"])
    if card["corpus"]:
        lines += _corpus_lines(card["corpus"])
    return "\n".join(lines).rstrip() + "\n"


def _source_lines(source: dict[str, Any]) -> list[str]:
    lines = [f"### {source['role']}: {_escaped(source['source'])}", ""]
    lines += [
        f"- {key}: {_escaped(source[key])}" for key in ("description", "licence", "citation") if source[key]
    ]
    lines.append(f"- rows: {source['rows']:,} ({source['empty_dropped']:,} without text dropped)")
    return [*lines, f"- sha256 of the rows: `{source['sha256']}`", ""]


def _task_lines(task: dict[str, Any]) -> list[str]:
    names = task["labels"]
    lines = [f"## Task: {_escaped(task['kind'])}", "", *_split_table(task["splits"], names)]
    lines += [
        f"- duplicates dropped: {task['duplicates_dropped']:,}",
        *([f"- rows of a text with two labels dropped: {task['conflicting_dropped']:,}"] if names else []),
        f"- rows found in two splits dropped (the test keeps, then validation): {task['overlap_dropped']:,}",
        "",
        "### Examples",
        "",
    ]
    for label in names or [""]:
        lines += [
            *([f"**{_escaped(label)}**", ""] if label else []),
            *(f"- {_escaped(text)}" for text in task["examples"][label]),
            "",
        ]
    return lines


def _own_lines(task: dict[str, Any]) -> list[str]:
    lines = [f"## Task: {_escaped(task['kind'])}", ""]
    lines += [_escaped(task["description"]), ""] if task["description"] else []
    lines += [_table_line(["split", "rows"]), _table_line(["---", "---"])]
    lines += [_table_line([name, f"{about['rows']:,}"]) for name, about in task["splits"].items()]
    return [*lines, "", f"- columns: {', '.join(map(_escaped, task['columns']))}", ""]


def _corpus_lines(corpus: dict[str, Any]) -> list[str]:
    return [
        "## Corpus, for pretraining",
        "",
        *_split_table(corpus["splits"], []),
        f"- duplicates dropped: {corpus['duplicates_dropped']:,}",
        f"- texts of the task's validation or test split dropped: {corpus['leakage_dropped']:,}",
        "",
    ]


def _split_table(splits: dict[str, Any], labels: list[str]) -> list[str]:
    """One line a split: rows, the share of each label, lengths as min / median / p95 / max."""
    head = ["split", "rows", *map(_escaped, labels), "words", "characters"]
    lines = [_table_line(head), _table_line(["---"] * len(head))]
    for name, about in splits.items():
        shares = [f"{about['labels'].get(label, 0) / about['rows']:.1%}" for label in labels]
        lengths = [" / ".join(f"{n:,}" for n in about[unit].values()) for unit in ("words", "characters")]
        lines.append(_table_line([name, f"{about['rows']:,}", *shares, *lengths]))
    return [*lines, "", "Lengths are min / median / 95th percentile / max.", ""]


def _table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """The user's text, unable to become markup of the card."""
    line = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|#":
        line = line.replace(mark, "\\" + mark)
    return line
