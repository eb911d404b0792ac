"""Files of text as named columns: CSV, TSV, JSON Lines, JSON, Parquet, plain text.

Each reader returns a `Table` or raises one `UserError` that names the file and the line. Values of a CSV or
TSV file stay text: a label ``NA`` or ``1`` is never read as a number or as missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """Columns of equal length. ``places[i]`` says where row i stands (``line 7``), for error messages.

    ``nested`` reads columns of lists or records, where the format tells them from plain ones: few tasks do.
    """

    source: str
    columns: dict[str, list[Any]]
    places: list[str]
    nested: dict[str, Callable[[], list[Any]]] = field(default_factory=dict)


def read_file(path: Path) -> Table:
    """The table in a file; its suffix says the format.

    Raises:
        UserError: an unknown suffix, a file that is empty, unreadable or not UTF-8, or rows that do not fit.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has no known format; its name must end in {', '.join(READERS)}")
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"{path} is empty")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _table(path: Path, header: Iterable[str], rows: list[list[Any]], places: list[str]) -> Table:
    names = list(header)
    if not rows:
        raise UserError(f"{path} has no rows")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has more than one column named '{twice[0]}'")
    columns = zip(*rows, strict=True)
    return Table(str(path), dict(zip(names, map(list, columns), strict=True)), places)


def _read_csv(path: Path) -> Table:
    try:
        return _delimited(path, _text(path), ",", csv.QUOTE_MINIMAL)
    except csv.Error as error:
        raise UserError(f"{path} is not well-formed CSV: {error}") from None


def _read_tsv(path: Path) -> Table:
    """Half of all TSV files quote as CSV does, half never quote: there a lone " is text.

    Both readings are tried. Where both fit, the quoted one is right unless a quote swallowed a field's end.
    """
    text = _text(path)
    readings: list[Table] = []
    wrong: Exception | None = None
    for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):
        try:
            readings.append(_delimited(path, text, "\t", quoting))
        except (csv.Error, UserError) as error:
            wrong = wrong or error
    if not readings:
        raise wrong if isinstance(wrong, UserError) else UserError(f"{path} is not well-formed TSV: {wrong}")
    swallowed = any(
        "\n" in field or "\t" in field for column in readings[-1].columns.values() for field in column
    )
    return readings[0] if swallowed else readings[-1]


def _delimited(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Table:
    # The module's limit of 128 KiB a field would refuse a long document.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    places: list[str] = []
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                where = f"{path}, line {reader.line_num}"
                raise UserError(f"{where}: {len(row)} fields where the header has {len(header)}")
            else:
                rows.append(row)
                places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None
    return _table(path, header or [], rows, places)


def _read_json(path: Path) -> Table:
    """A JSON array of objects, or JSON Lines under the suffix ``.json``, as `datasets` writes them."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path, text)
    try:
        records = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not well-formed JSON: {error}") from None
    return _records(path, records, [f"row {i}" for i in range(1, len(records) + 1)])


def _read_jsonl(path: Path) -> Table:
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> Table:
    records, places = [], []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not well-formed JSON: {error}") from None
            places.append(f"line {number}")
    return _records(path, records, places)


def _records(path: Path, records: list[Any], places: list[str]) -> Table:
    names: dict[str, None] = {}
    for record, place in zip(records, places, strict=True):
        if not isinstance(record, dict):
            raise UserError(f'{path}, {place}: not a JSON object such as {{"text": …, "label": …}}')
        names.update(dict.fromkeys(record))
    return _table(path, names, [[record.get(name) for name in names] for record in records], places)


def _read_txt(path: Path) -> Table:
    lines = [line.rstrip("\n") for line in io.StringIO(_text(path), newline=None)]
    return _table(path, ["text"], [[line] for line in lines], [f"line {i}" for i in range(1, len(lines) + 1)])


def _read_parquet(path: Path) -> Table:
    import pyarrow.lib
    import pyarrow.parquet
    from datasets import Dataset

    try:
        content = pyarrow.parquet.read_table(path)
    except pyarrow.lib.ArrowException as error:
        raise UserError(f"{path} is not readable Parquet: {' '.join(str(error).split())}") from None
    # Not Dataset.from_parquet, which would keep a copy in the user's cache.
    return from_dataset(Dataset(content), str(path))


def from_dataset(data: Dataset, source: str) -> Table:
    """The columns of a `datasets.Dataset` that hold text and numbers; a ``ClassLabel`` becomes its name.

    Raises:
        UserError: it has no rows.
    """
    from datasets import ClassLabel, Value

    if not len(data):
        raise UserError(f"{source} has no rows")
    columns: dict[str, list[Any]] = {}
    nested: dict[str, Callable[[], list[Any]]] = {}
    for name, feature in data.features.items():
        if isinstance(feature, ClassLabel):
            columns[name] = [None if i is None or i < 0 else feature.int2str(i) for i in data[name]]
        elif isinstance(feature, Value):
            columns[name] = list(data[name])
        elif _is_plain(feature):
            nested[name] = partial(_column, data, name)
    return Table(source, columns, [f"row {i}" for i in range(1, len(data) + 1)], nested)


def _column(data: Dataset, name: str) -> list[Any]:
    return list(data[name])


def _is_plain(feature: Any) -> bool:
    """Whether it is text and numbers, however deep in lists and records: no picture, no sound."""
    from datasets import LargeList, List, Value

    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    return _is_plain(feature.feature) if isinstance(feature, List | LargeList) else isinstance(feature, Value)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
