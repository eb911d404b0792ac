"""The prepare stage: sources to ``data/prepared``, and reading it back.

``task/`` is a saved `datasets.DatasetDict` of train, validation and test with the columns ``text`` (string)
and ``label`` (ClassLabel, names sorted), or, where a task's labels are texts, ``target`` (string);
``corpus/`` one of train and validation with ``text``. ``card.json`` and ``card.md`` describe both.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import user_code
from pipeline.config import Config, PrepareConfig
from pipeline.data import card as cards
from pipeline.data import questions
from pipeline.data.sources import Rows, load, must_exist, read, select
from pipeline.data.splits import (
    NO_TARGET,
    CorpusSplits,
    Example,
    TaskSplits,
    few_shot,
    split_corpus,
    split_task,
)
from pipeline.entry_points import installed
from pipeline.entry_points import load as load_plugin
from pipeline.errors import UserError, unknown
from pipeline.layout import Layout
from pipeline.user_code import Reference

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# The word among the sources of the corpus that stands for the task's own training texts.
OWN_TEXT = "task"

LABELS = "labels"  # texts and their classes
PAIRS = "pairs"  # texts and the texts they become
QUESTIONS = "questions"  # about a context, with answers that are spans of it
PROMPTS = "prompts"  # texts to go on from, and perhaps how
OWN = "own"  # no texts: rows that the task gives

_Read = list[tuple[str, Rows]]
_Save = Callable[[Path], None]


def prepare(config: Config, layout: Layout) -> dict[str, Any]:
    """Reads, cleans, splits and saves what ``config.prepare`` names, and returns the data card.

    The result depends on the texts alone, not on the order of rows, and on ``config.seed`` only where
    ``shots`` are drawn. It replaces an earlier one only when it is complete. ``notes`` in the card are
    for the user's eyes.

    Raises:
        UserError: an unknown task, a source that cannot be read, or splits that cannot be made.
    """
    wanted = config.prepare
    check_sources(config)
    read_so_far: _Read = []
    data = "" if wanted.task == "none" else data_of(wanted.task)
    if data == OWN:
        return _prepare_own(config, layout)
    task = _task(wanted, data, read_so_far) if data else None
    corpus = _corpus(wanted, task, read_so_far)
    if wanted.shots is not None and data != LABELS:
        raise UserError(
            f"prepare.shots draws examples of each label, and {wanted.task} has none; "
            "set prepare.shots to null and give fewer rows in prepare.train"
        )
    if task and wanted.shots is not None:  # the corpus needs no labels: it has all training texts
        task = few_shot(task, wanted.shots, config.seed)
    if task is None and corpus is None:
        raise UserError("nothing to prepare: prepare.task is none and prepare.corpus is empty")
    card = cards.card(read_so_far, task, corpus, wanted.task if data != LABELS else "classification")
    parts: dict[str, _Save] = {}
    if task:
        save = {LABELS: _save_task, QUESTIONS: _save_questions}.get(data, _save_texts)
        parts["task"] = partial(save, task)
    if corpus:
        parts["corpus"] = partial(_save_corpus, corpus)
    _replace(layout.prepared, parts, card)
    return card


def _prepare_own(config: Config, layout: Layout) -> dict[str, Any]:
    """Saves the rows that the task gives, as it gives them.

    Raises:
        UserError: there is a corpus too, or a split is missing.
    """
    name = config.prepare.task
    if config.prepare.corpus:
        raise UserError(f"the rows of {name} are no text to pretrain on: set prepare.corpus=[]")
    from datasets import DatasetDict

    if config.prepare.shots is not None:
        raise UserError(f"{name} chooses its own rows: prepare.shots does not hold there; set it to null")
    with user_code.watched(user_code.Reference.parse(name), "its rows"):
        made = load_plugin("task", name)()
        if not hasattr(made, "rows"):
            raise UserError(
                f'the task {name} has data = "{OWN}" and no method rows(config): see docs/plugins.md'
            )
        rows = made.rows(config)
    if not isinstance(rows, DatasetDict):
        raise UserError(f"the task {name} gives a {type(rows).__name__}; it must give a datasets.DatasetDict")
    if set(rows) != {"train", "validation", "test"}:
        raise UserError(f"the task {name} gives {', '.join(rows)}; it must give train, validation and test")
    card = cards.own(name, rows)
    _replace(layout.prepared, {"task": lambda folder: rows.save_to_disk(str(folder))}, card)
    return card


def data_of(task: str) -> str:
    """What rows a task reads, the attribute ``data`` of its class: `LABELS`, `PAIRS`, `PROMPTS` and so on.

    Raises:
        UserError: no such task, or one that reads something else.
    """
    kind = getattr(load_plugin("task", task), "data", LABELS)
    known = (LABELS, PAIRS, PROMPTS, QUESTIONS, OWN)
    if kind not in known:
        raise unknown("data of a task", str(kind), known)
    return str(kind)


def check_sources(config: Config) -> None:
    """What can be told of the sources without reading them.

    Raises:
        UserError: an unknown task, or a file that is not there.
    """
    wanted = config.prepare
    tasks = ["none", *(plugin.name for plugin in installed(["task"]))]
    if wanted.task not in tasks and not Reference.parse(wanted.task):
        user_code.check_named("task", wanted.task)
        raise unknown("task", wanted.task, tasks)
    for source in _sources(config):
        must_exist(source)


def digests(config: Config) -> dict[str, str]:
    """The sha256 of each file that is read, by its path; packages and hub data have versions of their own."""
    paths = [path for path in map(Path, _sources(config)) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_unchanged(before: dict[str, str], now: dict[str, str], root: Path) -> None:
    """Raises UserError where a file has another digest than when what lies in ``root`` was begun.

    Files that are only in one of the two are parameters that differ, or were not noted then.
    """
    for name in now:
        if before.get(name, now[name]) != now[name]:
            raise UserError(f"{name} was changed since {root} began; put it back, or use another --name")


def _sources(config: Config) -> list[str]:
    wanted = config.prepare
    files = [wanted.train, wanted.validation, wanted.test] if wanted.task != "none" else []
    return [source for source in [*files, *wanted.corpus] if source is not None and source != OWN_TEXT]


def load_task(layout: Layout) -> DatasetDict:
    """The prepared task: train, validation, test; ``text`` string, ``label`` ClassLabel or ``target`` string.

    Prompts that come without a target have no such column. Questions have ``question``, ``context``,
    ``answers`` and ``starts``. Rows of a task's own have the columns it gave them.

    Raises:
        UserError: prepare has not run, or it ran with task none.
    """
    return _load(layout.prepared / "task", "task")


def load_corpus(layout: Layout) -> DatasetDict:
    """The prepared corpus: train, validation; ``text`` string.

    Raises:
        UserError: prepare has not run, or it ran without a corpus.
    """
    return _load(layout.prepared / "corpus", "corpus")


def _load(folder: Path, what: str) -> DatasetDict:
    from datasets import load_from_disk

    if not folder.is_dir():
        raise UserError(
            f"no prepared {what} at {folder}; run the prepare stage first, with prepare.{what} set"
        )
    # In memory: a map() over files would leave its cache beside them, among the outputs of the stage.
    return load_from_disk(str(folder), keep_in_memory=True)


def _task(wanted: PrepareConfig, data: str, read_so_far: _Read) -> TaskSplits:
    examples: dict[str, list[Example] | None] = {}
    for role, source in (("train", wanted.train), ("validation", wanted.validation), ("test", wanted.test)):
        examples[role] = None
        if source is not None:
            rows = _rows(source, wanted, data)
            read_so_far.append((role, rows))
            labels = rows.labels or [NO_TARGET] * len(rows.texts)
            examples[role] = [Example(*pair) for pair in zip(rows.texts, labels, strict=True)]
    return split_task(
        examples["train"] or [],
        examples["validation"],
        examples["test"],
        wanted.validation_size,
        wanted.test_size,
        classes=data == LABELS,
    )


def _rows(source: str, wanted: PrepareConfig, data: str) -> Rows:
    if data == QUESTIONS:
        return questions.read(source, question=wanted.text, answers=wanted.label)
    labelled = data != PROMPTS or wanted.label is not None
    return read(source, text=wanted.text, label=wanted.label, labelled=labelled)


def _corpus(wanted: PrepareConfig, task: TaskSplits | None, read_so_far: _Read) -> CorpusSplits | None:
    if not wanted.corpus:
        return None
    texts: list[str] = []
    for source in wanted.corpus:
        if source != OWN_TEXT:
            rows = _unlabelled(source, wanted)
            read_so_far.append(("corpus", rows))
            texts += rows.texts
        elif task is None:
            raise UserError(
                "prepare.corpus names 'task' but prepare.task is none; name a source of text instead"
            )
        else:
            texts += [example.text for example in task.train]
    held_out = [example.text for example in (*task.validation, *task.test)] if task else []
    return split_corpus(texts, held_out, wanted.corpus_validation_size)


def _unlabelled(source: str, wanted: PrepareConfig) -> Rows:
    """Texts of a corpus source. Beside a task, prepare.text names the task's column: a corpus may lack it."""
    table = load(source)
    named = wanted.text if wanted.task == "none" or wanted.text in table.columns else None
    return select(table, text=named, label=wanted.label, labelled=False)


def _replace(folder: Path, parts: dict[str, _Save], card: dict[str, Any]) -> None:
    """Builds the whole folder beside ``folder``, then swaps the two by renames."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prepare-") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        with _no_progress_bars():
            for name, save in parts.items():
                save(built / name)
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        (built / "card.json").write_text(text, encoding="utf-8")
        (built / "card.md").write_text(cards.markdown(card), encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "earlier")
        built.rename(folder)


def _save_task(task: TaskSplits, folder: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    names = sorted({example.label for example in task.train})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})

    def dataset(examples: list[Example]) -> Dataset:
        labels = [names.index(example.label) for example in examples]
        columns = {"text": [example.text for example in examples], "label": labels}
        return Dataset.from_dict(columns, features=features)

    DatasetDict({name: dataset(examples) for name, examples in task.items()}).save_to_disk(str(folder))


def _save_texts(task: TaskSplits, folder: Path) -> None:
    """Texts and their target texts; where there are none, the texts alone."""
    from datasets import Dataset, DatasetDict

    def dataset(examples: list[Example]) -> Dataset:
        columns = {"text": [example.text for example in examples]}
        if any(example.label for example in examples):
            columns["target"] = [example.label for example in examples]
        return Dataset.from_dict(columns)

    DatasetDict({name: dataset(examples) for name, examples in task.items()}).save_to_disk(str(folder))


def _save_questions(task: TaskSplits, folder: Path) -> None:
    """The columns ``question``, ``context``, ``answers`` and where they begin, ``starts``."""
    from datasets import Dataset, DatasetDict

    def dataset(examples: list[Example]) -> Dataset:
        return Dataset.from_list([asdict(questions.Question.of(*example)) for example in examples])

    DatasetDict({name: dataset(examples) for name, examples in task.items()}).save_to_disk(str(folder))


def _save_corpus(corpus: CorpusSplits, folder: Path) -> None:
    from datasets import Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string")})
    splits = {name: Dataset.from_dict({"text": texts}, features=features) for name, texts in corpus.items()}
    DatasetDict(splits).save_to_disk(str(folder))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Saving is over before a bar is read; the caller's setting comes back."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
