"""Scores of texts: against their libraries, by hand, summed, from a user's file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from pipeline.errors import UserError
from pipeline.measuring import scores
from pipeline.measuring.text_evaluation import TextExaminer
from pipeline.models.loading import load_tokenizer
from pipeline.objective import TextObjective, parse
from pipeline.tasks.base import Asked, Batch, TaskModel
from tests.test_engine import classifier
from tests.test_prompted import completing_model


def test_scores_are_those_of_their_libraries() -> None:
    ours, theirs = "the cat sat on a mat .", "the cat lay on the mat ."
    assert scores.chrf("", ours, theirs) == pytest.approx(sacrebleu.sentence_chrf(ours, [theirs]).score / 100)
    assert scores.bleu("", ours, theirs) == pytest.approx(sacrebleu.sentence_bleu(ours, [theirs]).score / 100)
    rouge = RougeScorer(["rougeL"]).score(theirs, ours)["rougeL"].fmeasure
    assert scores.rouge_l("", ours, theirs) == pytest.approx(rouge)
    both = [ours, "yes"], [theirs, "yes"]
    assert scores.corpus_bleu(*both) == pytest.approx(sacrebleu.corpus_bleu(both[0], [both[1]]).score / 100)
    assert scores.corpus_chrf(*both) == pytest.approx(sacrebleu.corpus_chrf(both[0], [both[1]]).score / 100)


class Fixed(TaskModel):
    """Writes the same texts whatever it is asked, and gives the logits that a batch holds."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(1, 1)
        self._texts = list(texts)

    def features(self, batch: Batch) -> torch.Tensor:
        return batch.inputs["logits"]

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def write(self, batch: Batch) -> list[str]:
        return self._texts


def test_figures_of_what_is_written_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]).log()
    references = (("a b", "c"), ("d",))
    asked = Asked({}, ("p", "q"), references, (2, 1), 0)  # targets of two tokens and of one
    batch = Batch({"logits": logits}, torch.tensor([0, 1, 0]), asked=asked)
    length = parse("length,words=1")
    assert isinstance(length, TextObjective)
    examiner = TextExaminer(("exact_match", "chrf"), "token_f1", lambda: length)
    found = examiner.test(Fixed("the c", "x y z"), [batch])
    tokens = [-math.log(0.75), -math.log(0.5), -math.log(0.1)]
    assert found.losses == pytest.approx([(tokens[0] + tokens[1]) / 2, tokens[2]])
    assert found.written == ["the c", "x y z"]
    assert found.scores == [1.0, 0.0]  # the reference that fits best counts, articles do not
    assert found.figures == pytest.approx(
        {
            "loss": sum(tokens) / 3,  # over tokens, not over texts
            "score": 0.0,
            "score_sd": 0.0,
            "exact_match": 0.5,
            "chrf": sacrebleu.corpus_chrf(["the c", "x y z"], [["a b", "d"]]).score / 100,
            "words": 2.5,
        }
    )
    bare = replace(batch, asked=replace(asked, references=None))
    found = examiner.test(Fixed("c", "x y"), [bare])
    assert found.figures == {"loss": -0.5, "score": 0.5, "score_sd": 0.5, "words": 1.5}
    assert found.losses == [-1.0, 0.0]


def test_rewards_by_hand() -> None:
    assert scores.regex("", "it costs 12 euros", pattern=r"\d{2}") == 1.0
    assert scores.regex("", "it costs nothing", pattern=r"\d{2}") == 0.0
    assert scores.length("", "a b c", words=4) == 0.75
    assert scores.length("", "a " * 9, words=4) == 0.0
    assert scores.distinct("", "a b a b a", n=2) == 0.5
    assert scores.distinct("", "a", n=2) == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("regex", "needs a pattern"),
        ("regex,pattern=(", "is none"),
        ("length,words=0", "takes words above 0"),
        ("classifier,model=nowhere", "no model at 'nowhere'"),
        ("length+error", "mixes scores of texts with losses of outputs"),
        ("chrf", "the prompts have none: name their column with --label"),
    ],
)
def test_a_score_that_cannot_be_used_is_one_line(text: str, said: str) -> None:
    asked = Asked({}, ("a",), None, (0,), 0)
    with pytest.raises(UserError, match=said):
        parse(text).loss(asked, ["b"])  # type: ignore[union-attr]


def test_scores_are_added_with_their_weights_and_turned() -> None:
    asked = Asked({}, ("a", "a"), None, (0, 0), 0)
    objective = parse("length,words=2+0.5*distinct,n=1")
    assert isinstance(objective, TextObjective)
    assert objective.scores(asked, ["b c", "b"]) == [1.5, 1.0]
    assert objective.loss(asked, ["b c", "b"]) == -1.25


def test_a_classifiers_score(bert: Path, tmp_path: Path) -> None:
    model, _ = classifier(bert)
    model.save(tmp_path, load_tokenizer(str(bert)))
    objective = parse(f"classifier,model={tmp_path},label=up")
    assert isinstance(objective, TextObjective)
    found = objective.scores(Asked({}, ("", ""), None, (0, 0), 0), ["a good film", ""])
    tokens = load_tokenizer(str(bert))("a good film", return_tensors="pt")
    with torch.inference_mode():
        alone = model(Batch(dict(tokens), torch.empty(0))).softmax(-1)[0, 1]
    assert found[0] == pytest.approx(float(alone), abs=1e-5)
    wrong = parse(f"classifier,model={tmp_path},label=upp")
    assert isinstance(wrong, TextObjective)
    with pytest.raises(UserError, match="has no label 'upp'; its labels are down, up"):
        wrong.scores(Asked({}, ("",), None, (0,), 0), ["a"])


def test_a_score_by_a_classifier_in_its_template(gpt2: Path, tmp_path: Path) -> None:
    (model, _), tokenizer = completing_model(gpt2, [" bad", " good"]), load_tokenizer(str(gpt2))
    model.save(tmp_path, tokenizer)
    objective = parse(f"classifier,model={tmp_path},label=up")
    assert isinstance(objective, TextObjective)
    found = objective.scores(Asked({}, ("", ""), None, (0, 0), 0), ["a good film", "the plot"])
    for text, score in zip(("a good film", "the plot"), found, strict=True):
        batch = Batch(dict(tokenizer(f"the film : {text} it was", return_tensors="pt")), torch.empty(0))
        with torch.inference_mode():
            assert score == pytest.approx(float(model(batch).softmax(-1)[0, 1]), abs=1e-5)
    (tmp_path / "prompted.json").unlink()
    with pytest.raises(UserError, match="holds no classifier: it takes a run's models/finetuned"):
        parse(f"classifier,model={tmp_path},label=up")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "float('nan')",
            r"gave nan at the prompt '.+' and the completion '.*'; it must give a finite number",
        ),
        ("1 / 0", r"reward.py, line 2: ZeroDivisionError: division by zero \(at the prompt '.+' and"),
        ("'good'", "gave a str at the prompt .+; it must give one number"),
        ("__import__('torch').zeros(2)", r"gave a tensor of shape \(2,\) at the prompt"),
    ],
)
def test_what_goes_wrong_in_a_reward_names_the_text(body: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(f"def score(prompt, completion):\n    return {body}\n")
    objective = parse(f"{path}:score")
    assert isinstance(objective, TextObjective)
    with pytest.raises(UserError, match=said):
        objective.loss(Asked({}, ("the film",), None, (0,), 0), ["was good"])


@pytest.mark.parametrize("value", ["np.float32(0.5)", "np.int64(1)", "np.bool_(True)", "torch.tensor([0.5])"])
def test_a_reward_may_be_any_number(value: str, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(f"import numpy as np, torch\ndef score(prompt, completion):\n    return {value}\n")
    objective = parse(f"{path}:score")
    assert isinstance(objective, TextObjective)
    assert objective.loss(Asked({}, ("the film",), None, (0,), 0), ["was good"]) in (-0.5, -1.0)


def test_a_function_that_takes_something_else_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def score(completion):\n    return 1\n")
    with pytest.raises(UserError, match=r"takes \(completion\); write \(logits, targets\) for a loss"):
        parse(f"{path}:score")
