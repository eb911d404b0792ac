"""One word to rows of text: a package, a file, a saved ``datasets`` directory, or a hub id.

Files are data: nothing is unpickled and no code of a data set is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import packages
from pipeline.data.splits import content_hash
from pipeline.data.tables import Table, from_dataset, read_file
from pipeline.errors import UserError, nearest, unknown

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class Rows:
    """Text as read from one source, before any splitting.

    ``texts`` are stripped and never empty; ``labels`` run beside them, None where no label was asked for;
    ``sha256`` is that of both, whatever the format; ``empty`` counts rows left out for want of text.
    """

    source: str
    texts: list[str]
    labels: list[str] | None
    sha256: str
    empty: int
    licence: str
    description: str
    citation: str


def read(source: str, *, text: str | None, label: str | None, labelled: bool) -> Rows:
    """The rows of ``source``.

    ``source`` is ``package:NAME``, a file (.csv, .tsv, .jsonl, .json, .parquet, .txt), a directory saved by
    `datasets`, or a hub id; the last two may end in ``@SPLIT`` (default: ``train``, or the only one).
    ``text`` and ``label`` name the columns; None finds them (see `select`).

    Raises:
        UserError: no such source or column, or rows that cannot be used; the line says which.
    """
    return select(load(source), text=text, label=label, labelled=labelled)


def load(source: str) -> Table:
    """All plain columns of ``source``, unchecked. Raises: see `read`."""
    if source.startswith(packages.PREFIX):
        return _from_package(source)
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    must_exist(source)
    place, _, split = source.partition("@") if not path.exists() else (source, "", "")
    folder = Path(place).expanduser()
    if folder.is_dir():
        return _from_folder(folder, split, source)
    return _from_hub(place, split, source)


def must_exist(source: str) -> None:
    """Raises UserError for what can only be a path and leads to nothing."""
    if source.startswith(packages.PREFIX) or Path(source).expanduser().exists():
        return
    place = source.partition("@")[0]
    if _looks_like_a_path(place) and not Path(place).expanduser().is_dir():
        raise UserError(f"no such file: {source}")


def _from_package(source: str) -> Table:
    rows = packages.rows(source.removeprefix(packages.PREFIX))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Table(source, columns, [f"row {i}" for i in range(1, len(rows) + 1)])


def _from_folder(folder: Path, split: str, source: str) -> Table:
    from datasets import load_from_disk

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UserError(f"{folder} is a folder but not a data set saved by datasets; name one of its files")
    try:
        data = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is not a readable saved data set: {_one_line(error)}") from error
    return from_dataset(_one_split(data, split, source), source)


def _from_hub(name: str, split: str, source: str) -> Table:
    from datasets import load_dataset

    try:
        # No trust_remote_code: data sets that come with a script of their own are refused.
        data = load_dataset(name)
    except Exception as error:
        raise UserError(
            f"'{source}' is no file or folder, and no data set of that name could be loaded from the hub: "
            f"{_one_line(error)}"
        ) from error
    return from_dataset(_one_split(data, split, source), source)


def _one_split(data: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    from datasets import DatasetDict

    if not isinstance(data, DatasetDict):
        if split:
            raise UserError(f"{source} has no splits; leave out '@{split}'")
        return data
    split = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
    if split not in data:
        error = unknown("split", split, data)
        raise UserError(f"{source}: {error}") from None
    return data[split]


def _looks_like_a_path(source: str) -> bool:
    # Hub ids may hold a dot, as in model-v1.5; a suffix of a file begins with a letter.
    suffix = re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{1,7}", Path(source).suffix)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or suffix is not None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def select(table: Table, *, text: str | None, label: str | None, labelled: bool) -> Rows:
    """The text column and, if ``labelled``, the label column of a table.

    ``text=None`` takes the column ``text``, else the only column of text that is not the label;
    ``label=None`` takes ``label``, else the only other column. A numeric label's name is its digits.

    Raises:
        UserError: an unknown column, no single choice, a text that is no text, no text at all, or an empty
            label.
    """
    text, label = _choose(table, text, label, labelled)
    texts, labels, empty = [], [], 0
    for row, place in enumerate(table.places):
        value = _as_text(table, text, row, place)
        if not value:
            empty += 1
            continue
        texts.append(value)
        if labelled:
            labels.append(_as_label(table, label, row, place))
    if not texts:
        raise UserError(f"{table.source}: column '{text}' is empty in every row")
    told = about(table.source)
    kept = labels if labelled else None
    return Rows(table.source, texts, kept, content_hash(texts, kept), empty, **told)


def about(source: str) -> dict[str, str]:
    """Licence, description and citation of a source, as far as they are known."""
    if source.startswith(packages.PREFIX):
        entry = packages.PACKAGES[source.removeprefix(packages.PREFIX)]
        described = f"{entry.description}; from {entry.archive}, sha256 {entry.archive.sha256}"
        return {"licence": entry.licence, "description": described, "citation": entry.citation}
    return {"licence": "not stated; it is the user's own", "description": "", "citation": ""}


def _choose(table: Table, text: str | None, label: str | None, labelled: bool) -> tuple[str, str]:
    """The names of the text and label columns; the latter means nothing unless ``labelled``."""
    columns = table.columns
    _check_columns(table, [text, label] if labelled else [text], labelled)
    if label is None and text != "label" and "label" in columns:
        label = "label"
    if text is None:
        others = [name for name in columns if name != label and _is_text(columns[name])]
        text = "text" if "text" in columns and label != "text" else _only(others)
    if labelled and label is None and text is not None:
        label = _only([name for name in columns if name != text])
    if text is None or (labelled and label in (None, text)):
        flags = "--text COLUMN --label COLUMN" if labelled else "--text COLUMN"
        raise UserError(f"{table.source} has the columns {_listed(columns)}; say which to use with {flags}")
    return text, label or ""


def _check_columns(table: Table, named: list[str | None], labelled: bool) -> None:
    columns = table.columns
    for name in named:
        if name is not None and name not in columns:
            hint = nearest(name, columns) or f"; it has {_listed(columns)}"
            raise UserError(f"{table.source} has no column '{name}'{hint}")
    if labelled and len(columns) < 2:
        raise UserError(f"{table.source} has one column, {_listed(columns)}; a task needs a text and a label")


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _listed(names: dict[str, list[Any]]) -> str:
    shown = [f"'{name}'" for name in list(names)[:12]]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def _is_text(values: list[Any]) -> bool:
    """Strings, and not all of them numbers. An empty column passes: it is refused by name later."""
    given = [value for value in values if value not in (None, "")]
    return all(isinstance(value, str) for value in given) and not (given and all(map(_is_number, given)))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _as_text(table: Table, column: str, row: int, place: str) -> str:
    value = table.columns[column][row]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{table.source}, {place}: column '{column}' holds {value!r:.40}, which is not text")
    return _unicode(table, value or "", place).strip()


def _as_label(table: Table, column: str, row: int, place: str) -> str:
    value = table.columns[column][row]
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{table.source}, {place}: column '{column}' holds {value!r:.40}, which is no label")
    label = "" if value is None else _unicode(table, str(value), place).strip()
    if not label or value != value:  # not a number is how pandas writes an empty cell
        raise UserError(
            f"{table.source}, {place}: column '{column}' (the label) is empty; write one or drop the row"
        )
    return label


def _unicode(table: Table, value: str, place: str) -> str:
    """``value``, unless it holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{table.source}, {place}: not valid Unicode: {error.reason}") from None
    return value
