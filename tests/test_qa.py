"""Questions read, spans found and scored: against hand-made cases, moved weights and whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from pipeline.data import questions
from pipeline.data.questions import Question
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.measuring import scores
from pipeline.models.loading import load_encoder, load_tokenizer
from pipeline.objective import parse
from pipeline.optimizer import LowRank, Seeded
from pipeline.tasks.base import Asked, Batch
from pipeline.tasks.spans import LONGEST, SpanReader
from pipeline.tasks.windows import WITHIN, SpanData, parts
from tests.conftest import ADJECTIVES, OTHERS, sentences
from tests.test_cli import pipeline
from tests.test_engine import reference, searched


@pytest.mark.parametrize(
    ("ours", "theirs", "exact", "f1"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a  black   cat", "the black cat.", 1.0, 1.0),
        ("black cat", "cat", 0.0, 2 / 3),
        ("cat cat dog", "cat dog dog", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
        ("U.S.", "us", 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_squads_script_does(ours: str, theirs: str, exact: float, f1: float) -> None:
    assert scores.exact_match("", ours, theirs) == exact
    assert scores.token_f1("", ours, theirs) == pytest.approx(f1)


CONTEXT = "the good film was not long and the plot was dull"
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "question": "what  was dull",
                            "answers": [
                                {"text": "the plot", "answer_start": 31},
                                {"text": "plot", "answer_start": 35},
                            ],
                        },
                        {"question": "who", "answers": []},
                        {"question": "was it", "answers": [{"text": "the", "answer_start": 31}]},
                    ],
                }
            ]
        }
    ]
}


def test_squads_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(SQUAD))
    rows = questions.read(str(path), question=None, answers=None)
    found = [Question.of(*pair) for pair in zip(rows.texts, rows.labels or [], strict=True)]
    assert found == [
        Question("what was dull", CONTEXT, ("the plot", "plot"), (31, 35)),
        Question("was it", CONTEXT, ("the",), (31,)),
    ]
    assert rows.empty == 1


@pytest.mark.parametrize(
    "answers",
    [
        "plot",
        ["plot"],
        {"text": ["plot"], "answer_start": [35]},
        {"text": "plot", "answer_start": 35},
        {"text": "plot", "answer_start": "n/a"},
        {"text": ["plot"], "answer_start": ["35"]},
        [{"text": "plot", "answer_start": 3}],
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "saved"])
def test_columns_are_read(answers: object, name: str, tmp_path: Path) -> None:
    path, row = tmp_path / name, {"question": "what", "context": CONTEXT, "answers": answers}
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif path.suffix:
        Dataset.from_list([row]).to_parquet(path)
    else:
        Dataset.from_list([row]).save_to_disk(path)
    rows = questions.read(str(path), question=None, answers=None)
    assert Question.of(rows.texts[0], (rows.labels or [""])[0]).starts == (35,)


def test_answers_that_are_no_texts_are_read_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    answers = [
        1945,
        {"text": ["war"], "answer_start": [None]},
        {"answer_start": [3]},
        None,
        {"text": "", "answer_start": 0},
    ]
    rows = [{"question": f"q{i}", "context": "the war of 1945", "answer": a} for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = questions.read(str(path), question=None, answers=None)
    found = [Question.of(*both) for both in zip(read.texts, read.labels, strict=True)]
    assert [(each.answers, each.starts) for each in found] == [(("1945",), (11,)), (("war",), (4,))]
    assert read.empty == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "what", "answers": "x"}\n', "has no column 'context'; qa reads question, context"),
        ('{"question": "what", "context": "a b", "answers": "x"}\n', "no question with an answer"),
        ('{"data": [{"paragraphs": [{}]}]}', "is not SQuAD's JSON: KeyError"),
        ("{", "not well-formed JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        questions.read(str(path), question=None, answers=None)


def rows() -> Dataset:
    contexts = sentences(6, seed=5)[0]
    words = [context.split() for context in contexts]
    return Dataset.from_dict(
        {
            "question": ["what was it", "was it good", "it", "the film is", "was", "and the plot"],
            "context": contexts,
            "answers": [[" ".join(each[-2:]), each[-1]] for each in words],
            "starts": [[len(" ".join(each[:-2])) + 1, len(" ".join(each[:-1])) + 1] for each in words],
        }
    )


def reader(
    bert: Path, max_length: int = 24, *, overlap: int = 128, learn: bool = True
) -> tuple[SpanReader, SpanData]:
    encoder = load_encoder(str(bert))
    model = SpanReader(encoder, 32).eval()
    with torch.no_grad():
        model.span.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    data = SpanData(rows(), load_tokenizer(str(bert)), max_length, overlap, learn=learn)
    return model, data


def test_targets_are_the_answers_tokens_and_the_context_is_all_there_is(bert: Path) -> None:
    model, data = reader(bert)
    batch = data.batch(range(6))
    assert batch.asked
    with torch.inference_mode():
        logits = model(batch)
    assert logits.shape == (12, batch.inputs["input_ids"].shape[1])
    tokenizer = load_tokenizer(str(bert))
    for row in range(6):
        first, last = batch.targets.view(6, 2)[row].tolist()
        assert tokenizer.decode(batch.inputs["input_ids"][row][first : last + 1]) == rows()[row]["answers"][0]
        separators = (batch.inputs["input_ids"][row] == tokenizer.sep_token_id).nonzero().flatten().tolist()
        likely = (logits.view(6, 2, -1)[row] > -1e3).all(0).nonzero().flatten().tolist()
        assert likely == list(range(separators[0] + 1, separators[1]))


def test_what_is_written_is_the_likeliest_span(bert: Path) -> None:
    model, data = reader(bert)
    batch = data.batch(range(6))
    assert batch.asked
    with torch.inference_mode():
        written, logits = model.write(batch), model(batch).view(6, 2, -1)
    for row, (text, context) in enumerate(zip(written, rows()["context"], strict=True)):
        found: dict[str, float] = {}
        first, last = batch.asked.inputs["first"][row].tolist(), batch.asked.inputs["last"][row].tolist()
        length = logits.shape[-1]
        for i in range(length):
            for j in range(i, length):
                found.setdefault(f"{i},{j}", float(logits[row, 0, i] + logits[row, 1, j]))
        i, j = map(int, max(found, key=lambda key: found[key]).split(","))
        assert text == context[first[i] : last[j]]
        assert text in context


@pytest.mark.parametrize(
    ("length", "room", "overlap", "windows"),
    [
        (5, 5, 3, [(0, 5)]),
        (1, 5, 3, [(0, 1)]),
        (10, 4, 0, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, 1, [(0, 4), (3, 7), (6, 10)]),
        (10, 4, 99, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (3, 1, 99, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_cover_a_context_and_overlap(
    length: int, room: int, overlap: int, windows: list[tuple[int, int]]
) -> None:
    assert parts(length, room, overlap) == windows


@pytest.mark.parametrize("max_length", [9, 12, 24])
def test_windows_are_those_of_the_tokenizer(max_length: int, bert: Path) -> None:
    """transformers makes the same ones, with its stride as what they share."""
    data, tokenizer = reader(bert, max_length, overlap=1, learn=False)[1], load_tokenizer(str(bert))
    read = tokenizer(
        list(rows()["question"]),
        list(rows()["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=1,
        return_overflowing_tokens=True,
    )
    ours = [window["input_ids"] for example in data._examples for window in example.windows]
    assert ours == read["input_ids"]
    assert len(ours) > 6 or max_length == 24


def test_each_window_that_holds_the_answer_is_learnt_and_no_other(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    _, learnt = reader(bert, 9)
    _, held_out = reader(bert, 9, learn=False)
    assert len(held_out) == 6
    assert len(learnt) > 0
    batch = learnt.batch(range(len(learnt)))
    assert batch.asked
    assert batch.inputs["input_ids"].shape[1] <= 9
    assert batch.asked.references
    for ids, (first, last), several in zip(
        batch.inputs["input_ids"], batch.targets.view(-1, 2).tolist(), batch.asked.references, strict=True
    ):
        assert tokenizer.decode(ids[first : last + 1]) == several[0]
    whole = []
    for example in held_out._examples:
        answer, start = (rows()[name][example.row][0] for name in ("answers", "starts"))
        for window in example.windows:
            inside = [i for i, within in enumerate(window[WITHIN]) if within]
            low, high = window["first"][inside[0]], window["last"][inside[-1]]
            if low <= start and start + len(answer) <= high:
                whole.append((example.row, window["input_ids"]))
    assert [(each.row, each.windows[0]["input_ids"]) for each in learnt._examples] == whole


def test_an_answer_that_no_window_holds_is_not_learnt_and_not_found(bert: Path) -> None:
    _, learnt = reader(bert, 7)  # room for one token after three of the longest questions
    _, held_out = reader(bert, 7, learn=False)
    assert {each.row for each in learnt._examples} < set(range(6))
    lost = next(each for each in held_out._examples if each.row not in {e.row for e in learnt._examples})
    assert lost.place[0] == len(lost.windows) - 1
    with pytest.raises(UserError, match="a question leaves no room for its context"):
        reader(bert, 4)


def test_a_held_out_question_is_answered_from_all_its_windows(bert: Path) -> None:
    """The best span by the logits of each window on its own, by hand."""
    model, data = reader(bert, 9, learn=False)
    seen = 0
    for batch in data.by_length(8):
        assert batch.asked
        windows = len(batch.inputs["input_ids"]) // len(batch.asked.prompts)
        seen = max(seen, windows)
        with torch.inference_mode():
            written, logits = model.write(batch), model(batch)
            alone = _by_window(model, batch)
        width = batch.inputs["input_ids"].shape[1]
        assert logits.shape == (2 * len(written), windows * width)
        for i, text in enumerate(written):
            own = alone[i * windows : (i + 1) * windows]
            torch.testing.assert_close(logits[2 * i : 2 * i + 2], torch.cat(list(own), -1))
            best, answer = -float("inf"), ""
            for window, (begins, ends) in enumerate(own):
                row = i * windows + window
                first, last = (batch.asked.inputs[name][row].tolist() for name in ("first", "last"))
                for start in range(width):
                    for end in range(start, min(start + LONGEST, width)):
                        if begins[start] + ends[end] > best:
                            best = float(begins[start] + ends[end])
                            answer = batch.asked.prompts[i][first[start] : last[end]]
            assert text == answer
    assert seen > 1


def _by_window(model: SpanReader, batch: Batch) -> torch.Tensor:
    """Logits ``[windows, 2, tokens]``, each window read as an example of its own."""
    assert batch.asked
    count = len(batch.inputs["input_ids"])
    apart = dataclasses.replace(batch.asked, prompts=("",) * count)
    return model(dataclasses.replace(batch, asked=apart)).view(count, 2, -1)


def test_targets_of_a_held_out_question_are_in_the_window_that_holds_them(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    _, data = reader(bert, 9, learn=False)
    later = 0
    for batch in data.by_length(8):
        assert batch.asked
        ids = batch.inputs["input_ids"].view(len(batch.asked.prompts), -1)
        for i, (first, last) in enumerate(batch.targets.view(-1, 2).tolist()):
            later += first >= batch.inputs["input_ids"].shape[1]
            assert batch.asked.references
            assert tokenizer.decode(ids[i][first : last + 1]) == batch.asked.references[i][0]
    assert later


@pytest.mark.parametrize("objective", ["cross_entropy", "token_f1"])
@pytest.mark.parametrize("space", ["head", "full", "biases", "prompt,tokens=2,dimension=10"])
def test_candidates_are_scored_as_moved_weights(space: str, objective: str, bert: Path) -> None:
    model, data = reader(bert)
    batch = data.batch(range(6))
    over = searched(space, model)
    chosen = parse(objective)
    engine = Engine(model, over, 1000, 0, chosen)
    candidates = [Seeded(seed, scale) for seed in (1, 2, 3) for scale in (0.1, -0.1)]
    if space in ("head", "full"):
        candidates += [Seeded(seed, 0.1, "gaussian", LowRank(1)) for seed in (4, 5)]
    engine.losses(batch, candidates)
    losses = engine.losses(batch, candidates)  # the second time several may share a pass
    engine.close()
    for candidate, loss in zip(candidates, losses, strict=True):
        resolved = over.resolved(candidate)
        if objective == "cross_entropy":
            assert loss == pytest.approx(reference(model, over, resolved, batch), rel=1e-4)
            continue
        before = over.snapshot()
        with torch.no_grad():
            for tensor in over.tensors:
                tensor.parameter.copy_(over.value(tensor, resolved))
        assert batch.asked
        with torch.inference_mode():
            assert loss == pytest.approx(chosen.loss(batch.asked, model.write(batch)))  # type: ignore[union-attr]
        over.restore(before)


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answer is the context's adjective."""
    path = tmp_path_factory.mktemp("squad") / "train.json"
    adjectives = {word for words in ADJECTIVES.values() for word in words}
    paragraphs = []
    for text in sentences(120)[0]:
        answer = next(word for word in text.split() if word in adjectives)
        answers = [{"text": answer, "answer_start": text.index(answer)}]
        paragraphs.append({"context": text, "qas": [{"question": f"{OTHERS[2]} was", "answers": answers}]})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def arguments(model: Path, squad: Path, *more: str) -> list[str]:
    given = {
        "pretrain.enabled": "false",
        "finetune.max_length": "24",
        "finetune.max_new_tokens": "4",
        "finetune.batch_size": "16",
        "finetune.evaluate_every": "150",
    }
    sets = [part for key, value in given.items() for part in ("-S", f"{key}={value}")]
    command = ["run", "--name", "mine", "--task", "qa", "--model", str(model), "--train", str(squad)]
    return [*command, *sets, *more]


def figures(home: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((home / "runs" / "mine" / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("objective", ["cross_entropy", "token_f1"])
def test_a_span_head_learns_without_a_gradient(
    objective: str, bert: Path, squad: Path, tmp_path: Path
) -> None:
    rate = ["-S", "finetune.epsilon=0.1", "-S", "finetune.learning_rate=0.3"]
    done = pipeline(
        *arguments(bert, squad, "--objective", objective, *rate, "--forward-passes", "300"),
        *("-S", "evaluate.adamw=false"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = figures(tmp_path)
    assert metrics["test/token_f1"] > metrics["zero_shot/token_f1"] + 0.1
    assert metrics["test/exact_match"] <= metrics["test/token_f1"]
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert "identical" in replayed.stdout, replayed.stderr


def test_an_answer_past_the_first_window_is_learnt_and_found(bert: Path, tmp_path: Path) -> None:
    """Every context is longer than a window, and its answer, an adjective, is its last word."""
    rows = [
        (" ".join([*["the", "plot", "it", "a"] * 4, text]), text.split()[-1]) for text in sentences(120)[0]
    ]
    squad = tmp_path / "long.jsonl"
    lines = [json.dumps({"question": "it was", "context": text, "answers": word}) for text, word in rows]
    squad.write_text("\n".join(lines) + "\n")
    rate = ["-S", "finetune.epsilon=0.1", "-S", "finetune.learning_rate=0.3", "--no-baselines"]
    given = arguments(bert, squad, *rate, "--forward-passes", "300", "-S", "finetune.max_length=15")
    done = pipeline(*given, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path)["test/exact_match"] > 0.5
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert "identical" in replayed.stdout, replayed.stderr


def test_a_decoder_answers_in_its_own_words(gpt2: Path, squad: Path, tmp_path: Path) -> None:
    done = pipeline(
        *arguments(gpt2, squad, "-S", "finetune.space=biases", "--forward-passes", "40"), home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    metrics = figures(tmp_path)
    assert {"test/loss", "test/exact_match", "adamw/token_f1", "zero_shot/loss"} <= set(metrics)


def test_several_answers_are_all_right() -> None:
    objective = parse("exact_match")
    asked = Asked({}, ("",), (("a plot", "film"),), (2,), 0)
    assert objective.loss(asked, ["the film"]) == -1.0  # type: ignore[union-attr]
