"""Questions about a text, as SQuAD keeps them: a question, its context, and answers that are spans of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.sources import Rows, about, load
from pipeline.data.splits import content_hash
from pipeline.errors import UserError


@dataclass(frozen=True)
class Question:
    """``starts`` are where the answers begin in the context, in characters."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def text(self) -> str:
        """What tells questions apart: a line with the question, then the context."""
        return f"{self.question}\n{self.context}"

    @property
    def label(self) -> str:
        """The answers with their places, as one text."""
        return json.dumps([self.answers, self.starts], ensure_ascii=False)

    @classmethod
    def of(cls, text: str, label: str) -> Question:
        """From its `text` and `label`."""
        question, _, context = text.partition("\n")
        answers, starts = json.loads(label)
        return cls(question, context, tuple(answers), tuple(starts))


def read(source: str, *, question: str | None, answers: str | None) -> Rows:
    """The questions of ``source`` as rows of `Question.text` and `Question.label`.

    ``source`` is SQuAD's JSON, or a table with the columns ``question``, ``context``, and ``answers`` or
    ``answer``: a text, several, or ``{"text": […], "answer_start": […]}``. Rows whose answer is not in their
    context are left out and counted as empty.

    Raises:
        UserError: no such source or column, or no row with an answer.
    """
    records = _squad(Path(source)) or _table(source, question or "question", answers)
    found = [_question(*record) for record in records]
    kept = [each for each in found if each]
    if not kept:
        raise UserError(f"{source} has no question with an answer that its context holds word for word")
    texts, labels = [each.text for each in kept], [each.label for each in kept]
    empty = len(found) - len(kept)
    return Rows(source, texts, labels, content_hash(texts, labels), empty, **about(source))


def _squad(path: Path) -> list[tuple[str, str, Any]] | None:
    """The records of a file in SQuAD's own form; None where it is another."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "data" not in content:
            return None
        return [
            (asked["question"], paragraph["context"], asked["answers"])
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not SQuAD's JSON: {type(error).__name__}: {error}") from None
    except ValueError:
        return None  # JSON Lines, or no JSON: the table's reader says which


def _table(source: str, question: str, answers: str | None) -> list[tuple[str, str, Any]]:
    table = load(source)
    known = {**table.columns, **table.nested}
    column = answers or ("answers" if "answers" in known else "answer")
    for name in (question, "context", column):
        if name not in known:
            raise UserError(
                f"{source} has no column '{name}'; qa reads question, context and answers (--text and --label"
                f" name the first and the last); it has {', '.join(known)}"
            )
    columns = [known[name] for name in (question, "context", column)]
    return list(zip(*(each() if callable(each) else each for each in columns), strict=True))


def _question(question: Any, context: Any, answers: Any) -> Question | None:
    if not isinstance(question, str) or not isinstance(context, str):
        return None
    spans = {text: start for text, start in _spans(answers, context) if start >= 0}
    if not spans or not question.strip():
        return None
    return Question(" ".join(question.split()), context, tuple(spans), tuple(spans.values()))


def _spans(answers: Any, context: str) -> list[tuple[str, int]]:
    """Answers and where they begin: as stated, else where they are first found, -1 where nowhere."""
    if isinstance(answers, dict):
        texts, starts = _several(answers.get("text")), _several(answers.get("answer_start"))
        answers = [
            {"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=False)
        ] or texts
    spans = []
    for each in _several(answers):
        span = each if isinstance(each, dict) else {"text": each}
        text, start = span.get("text"), span.get("answer_start")
        text = "" if text is None else str(text)
        place = _place(start)
        if not text or place < 0 or not context.startswith(text, place):
            place = context.find(text) if text else -1
        spans.append((text, place))
    return spans


def _place(value: Any) -> int:
    """A whole number from 0 on, as text too; -1 for anything else."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() else -1
    return int(value) if isinstance(value, int | float) and value >= 0 and value % 1 == 0 else -1


def _several(value: Any) -> list[Any]:
    """A list of one where it is one, of none where there is none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
