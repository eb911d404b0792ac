"""Questions read, spans found and scored: against hand-made cases, moved weights and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from pipeline import scores
from pipeline.data import questions
from pipeline.data.questions import Question
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models import load_encoder, load_tokenizer
from pipeline.objective import parse
from pipeline.optimizer import LowRank, Seeded
from pipeline.tasks.base import Batch
from pipeline.tasks.spans import SpanData, SpanReader
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
    ["plot", ["plot"], {"text": ["plot"], "answer_start": [35]}, [{"text": "plot", "answer_start": 3}]],
)
def test_columns_are_read(answers: object, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "what", "context": CONTEXT, "answers": answers}) + "\n")
    rows = questions.read(str(path), question=None, answers=None)
    assert Question.of(rows.texts[0], (rows.labels or [""])[0]).starts == (35,)


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


def reader(bert: Path, max_length: int = 24, answerable: bool = True) -> tuple[SpanReader, SpanData]:
    encoder = load_encoder(str(bert))
    model = SpanReader(encoder, 32).eval()
    with torch.no_grad():
        model.span.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    data = SpanData(rows(), load_tokenizer(str(bert)), max_length, answerable=answerable)
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


def test_an_answer_that_is_cut_off_is_not_learnt_and_not_found(bert: Path) -> None:
    short = 8
    _, learnt = reader(bert, short)
    _, held_out = reader(bert, short, answerable=False)
    assert len(learnt) < len(held_out) == 6
    whole = held_out.batch(range(6))
    assert whole.inputs["input_ids"].shape[1] <= short
    assert int(whole.targets.max()) < short
    with pytest.raises(UserError, match="a question leaves no room for its context"):
        reader(bert, 4)


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


def test_a_decoder_answers_in_its_own_words(gpt2: Path, squad: Path, tmp_path: Path) -> None:
    done = pipeline(
        *arguments(gpt2, squad, "-S", "finetune.space=biases", "--forward-passes", "40"), home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    metrics = figures(tmp_path)
    assert {"test/loss", "test/exact_match", "adamw/token_f1", "zero_shot/loss"} <= set(metrics)


def test_several_answers_are_all_right() -> None:
    from pipeline.tasks.base import Asked

    objective = parse("exact_match")
    asked = Asked({}, ("",), (("a plot", "film"),), (2,), 0)
    assert objective.loss(asked, ["the film"]) == -1.0  # type: ignore[union-attr]
    assert isinstance(Batch({}, torch.zeros(0), asked=asked).asked, Asked)
