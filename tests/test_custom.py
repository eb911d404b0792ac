"""A user's own file as an objective or a task: whole runs, and the one line when something is wrong in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pipeline import user_code
from pipeline.errors import UserError
from pipeline.objective import TextObjective, cross_entropy, judge, parse
from pipeline.tasks.base import Asked, Batch
from pipeline.trajectory import Trajectory
from tests.test_cli import pipeline, small

LOSS = """\
def score(logits, targets, *, threshold: float = 0.5):
    probability = logits.softmax(-1).gather(-1, targets.expand(logits.shape[:-1])[..., None]).squeeze(-1)
    return (probability < threshold).float().mean(-1)
"""
TASK = """\
from pipeline.tasks.kinds import Classification


class MyTask(Classification):
    def yardsticks(self, start):
        return {"zero_shot": {"loss": 0.5, "accuracy": 0.25}}
"""
BATCH = Batch({}, torch.tensor([0, 1]))
LOGITS = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])


def written(folder: Path, text: str, name: str = "reward.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_with_a_task_and_an_objective_of_ones_own(bert: Path, table: Path, tmp_path: Path) -> None:
    reward, _ = written(tmp_path, LOSS), written(tmp_path, TASK, "my_task.py")
    done = pipeline(
        *("run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--task", "./my_task.py:MyTask", "--objective", "cross_entropy+0.5*./reward.py:score"),
        *(*small(bert), "-S", "pretrain.enabled=false", "-S", "evaluate.adamw=false"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    assert json.loads((run / "metrics.json").read_text())["zero_shot/accuracy"] == 0.25
    header = Trajectory.read(run / "models" / "finetuned" / "trajectory.jsonl").header
    assert header.config["finetune"]["objective"] == f"cross_entropy+0.5*{reward}:score"
    assert header.code == user_code.digests(f"{reward}:score", f"{tmp_path}/my_task.py:MyTask")
    assert len(header.code) == 2

    reward.unlink()  # a replay calls no objective
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    assert "identical" in replayed.stdout


def test_options_and_sums_reach_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, LOSS)
    assert judge(parse(f"{path}:score"), BATCH)(LOGITS.clone()).tolist() == [0.5]
    assert judge(parse(f"{path}:score,threshold=0.9"), BATCH)(LOGITS.clone()).tolist() == [1.0]
    summed = judge(parse(f"2*{path}:score+cross_entropy"), BATCH)(LOGITS.clone())
    torch.testing.assert_close(summed, 1.0 + cross_entropy(LOGITS.clone(), BATCH.targets))
    with pytest.raises(UserError, match="has no option 'treshold'; did you mean 'threshold'"):
        parse(f"{path}:score,treshold=1")


@pytest.mark.parametrize(
    "text", ["./reward.py:score", "cross_entropy + 0.5 * ./reward.py:score", "0.5 *./reward.py:score+ error"]
)
def test_a_file_is_found_in_any_sum(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, LOSS)
    monkeypatch.chdir(tmp_path)
    whole = user_code.absolute(text)
    assert whole == text.replace("./reward.py", str(path))
    assert list(user_code.digests(whole)) == [str(path)]
    parse(whole)


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, LOSS)
    before = user_code.digests(f"error+{path}:score")
    parse(f"{path}:score")
    written(tmp_path, LOSS.replace("probability <", "probability >"))
    assert judge(parse(f"{path}:score,threshold=0.9"), BATCH)(LOGITS.clone()).tolist() == [0.0]
    assert user_code.digests(f"error+{path}:score") != before


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "score", "no such file: .*reward.py"),
        (LOSS, "scor", r"reward.py has no objective 'scor'; did you mean 'score'"),
        ("score = 1", "score", "is a int, which cannot be called"),
        ("def score(:\n", "score", r"reward.py, line 1: SyntaxError"),
        ("\nimport nowhere_at_all\n", "score", r"reward.py, line 2: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "score", "reward.py, line 1: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    text: str | None, name: str, said: str, tmp_path: Path
) -> None:
    path = written(tmp_path, text) if text is not None else tmp_path / "reward.py"
    with pytest.raises(UserError, match=said) as caught:
        parse(f"{path}:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("logits.mean() / 0 + float('nan') + logits.mean((-1, -2))", "gave NaN at finite logits"),
        ("1 / 0", r"reward.py, line 2: ZeroDivisionError: division by zero \(score at logits"),
        ("logits", r"reward.py:score gave .* a tensor of a loss for each of \d candidates, of the shape"),
    ],
)
def test_what_goes_wrong_while_it_runs_is_one_line(
    body: str, said: str, bert: Path, table: Path, tmp_path: Path
) -> None:
    written(tmp_path, f"def score(logits, targets):\n    return {body}\n")
    done = pipeline(
        *("run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--objective", "./reward.py:score", "--optimizer", "spsa,directions=2", *small(bert)),
        *("-S", "pretrain.enabled=false", "--no-baselines"),
        home=tmp_path,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(said, done.stderr), done.stderr


CANDIDATES = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])


@pytest.mark.parametrize("text", ["{}", "cross_entropy+0.5*{}", "0.5*{}"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "0.5",
            r"reward.py:score gave float at logits .*; it must give a tensor of a loss for each",
        ),
        ("logits.mean()", r"reward.py:score gave \(\) at logits"),
        ("logits", r"reward.py:score gave \(2, 2, 2\) at logits"),
        ("logits.mean((-1, -2)) / 0 * 0", "reward.py:score gave NaN at finite logits"),
        ("logits.sum((-1, -2)) / 0", "reward.py:score gave an infinite loss at finite logits"),
        ("{}[1]", r"reward.py, line 2: KeyError: 1 \(score at logits"),
    ],
)
def test_what_a_function_gives_is_looked_at_in_sums_too(
    body: str, said: str, text: str, tmp_path: Path
) -> None:
    path = written(tmp_path, f"def score(logits, targets):\n    return {body}\n")
    with pytest.raises(UserError, match=said):
        judge(parse(text.format(f"{path}:score")), BATCH)(CANDIDATES.clone())


def test_with_a_gradient_one_loss_is_wanted(tmp_path: Path) -> None:
    path = written(tmp_path, "def score(logits, targets):\n    return logits.sum((-1, -2))\n")
    assert judge(parse(f"{path}:score"), BATCH)(LOGITS[0].clone()).shape == ()
    path = written(tmp_path, "def score(logits, targets):\n    return logits.sum(-1)\n")
    with pytest.raises(UserError, match=r"gave \(2,\) at .* give a tensor of one loss, of the shape \(\)"):
        judge(parse(f"{path}:score"), BATCH)(LOGITS[0].clone())


OF_OUTPUTS = """\
class Mine:
    def __init__(self, load):
        {made}

    def on(self, batch):
        {on}
        return lambda logits: logits.sum((-1, -2))
"""
OF_TEXTS = """\
class Mine:
    def __init__(self, load):
        pass

    def scores(self, asked, completions):
        return {scores}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            OF_OUTPUTS.format(made="1 / 0", on="pass"),
            r"line 3: ZeroDivisionError: .* \(Mine when made\)",
        ),
        (
            OF_OUTPUTS.format(made="pass", on="batch.none"),
            r"line 6: AttributeError: .* \(Mine at a batch",
        ),
        ("class Mine:\n    def on(self, batch):\n        pass\n", r"reward.py: TypeError: .*takes no argu"),
        (OF_TEXTS.format(scores="[1.0]"), "reward.py:Mine gave 1 scores of 2 completions"),
        (
            OF_TEXTS.format(scores="[1.0, float('nan')]"),
            "Mine gave the score nan; each must be finite",
        ),
        (OF_TEXTS.format(scores="[1.0, None]"), "reward.py: TypeError: .* at 2 completions"),
        (OF_TEXTS.format(scores="{}[1]"), r"reward.py, line 6: KeyError: 1 \(Mine at 2 completions\)"),
    ],
)
def test_a_class_that_fails_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)

    def use() -> None:
        made = parse(f"{path}:Mine")
        if isinstance(made, TextObjective):
            made.loss(Asked({}, ("a", "b"), None, (), 0), ["c", "d"])
        else:
            judge(made, BATCH)(LOGITS.clone())

    with pytest.raises(UserError, match=said) as caught:
        use()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def start(self, config, layout, folder):\n        1 / 0", "my_task.py, line 5: ZeroDivisionError"),
        ("def __init__(self):\n        1 / 0", "my_task.py, line 5: ZeroDivisionError"),
        ("data = 'own'\n    def rows(self, config):\n        1 / 0", "my_task.py, line 6: ZeroDivisionError"),
        (
            "data = 'own'\n    def rows(self, config):\n        return {}",
            "gives a dict; it must",
        ),
        (
            "def start(self, *given):\n        return None",
            "gave a NoneType from start(); it must give a Start",
        ),
        (
            "def start(self, *given):\n        made = super().start(*given)\n"
            "        made.test = []\n        return made",
            "gave a Start without batches to measure on: test is empty",
        ),
        (
            "def start(self, *given):\n        made = super().start(*given)\n"
            "        made.model.outputs = lambda features: features.sum(-1)\n        return made",
            "it must give logits [outputs, classes]",
        ),
        (
            "def start(self, *given):\n        made = super().start(*given)\n"
            "        made.model.outputs = lambda features: features[:, :1]\n        return made",
            "targets lie between 0 and 1, and the model tells 1 classes apart: 0 to 0",
        ),
        (
            "def start(self, *given):\n        made = super().start(*given)\n"
            "        made.batch = lambda step: 1 / 0\n        return made",
            "my_task.py, line 6: ZeroDivisionError",
        ),
        (
            "def start(self, *given):\n        made = super().start(*given)\n"
            "        made.validation[0] = type(made.validation[0])({}, [1, 2])\n        return made",
            "a batch's targets are list; they must be int64 [outputs]",
        ),
        ("def load(self, folder):\n        1 / 0", "my_task.py, line 5: ZeroDivisionError"),
        ("def yardsticks(self, start):\n        1 / 0", "my_task.py, line 5: ZeroDivisionError"),
        ("def yardsticks(self, start):\n        return None", "gave a NoneType from yardsticks(); it must"),
        (
            "def yardsticks(self, start):\n        return {'a': {'accuracy': 'high'}}",
            "gave accuracy, a str, from yardsticks(); it must",
        ),
    ],
)
def test_a_task_that_fails_is_one_line(body: str, said: str, bert: Path, table: Path, tmp_path: Path) -> None:
    head = "from pipeline.tasks.kinds import Classification\n\nclass MyTask(Classification):\n"
    written(tmp_path, f"{head}    {body}\n", "my_task.py")
    given = ["--train", str(table), "--text", "review", "--label", "verdict"] if "own" not in body else []
    done = pipeline(
        *("run", "--name", "mine", "--task", "./my_task.py:MyTask", *given, *small(bert)),
        *("-S", "pretrain.enabled=false", "-S", "prepare.corpus=[]", "-S", "evaluate.adamw=false"),
        home=tmp_path,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr


def test_what_is_wrong_is_said_before_anything_is_computed(table: Path, bert: Path, tmp_path: Path) -> None:
    common = ("run", "--name", "mine", "--train", str(table), *small(bert))
    for option, said in (
        (("--objective", "./none.py:score"), "no such file"),
        (("--task", "./none.py:MyTask"), "no such file"),
    ):
        done = pipeline(*common, *option, home=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "runs" / "mine").exists()


def test_a_run_is_not_resumed_with_another_file(bert: Path, table: Path, tmp_path: Path) -> None:
    written(tmp_path, LOSS)
    done = pipeline(
        *("run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--objective", "./reward.py:score,threshold=0.6", *small(bert), "-S", "pretrain.enabled=false"),
        *("--no-baselines", "-S", "finetune.epsilon=1", "--to", "finetune"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    models = tmp_path / "runs" / "mine" / "models"
    (models / "finetuned").rename(models / ".finetuned.partial")
    written(tmp_path, LOSS + "# another\n")
    refused = pipeline("run", "--resume", "mine", home=tmp_path)
    assert refused.returncode == 2
    assert "reward.py was changed since the run began" in refused.stderr
    written(tmp_path, LOSS)
    assert pipeline("run", "--resume", "mine", home=tmp_path).returncode == 0


def test_a_run_whose_file_failed_at_the_first_step_goes_on_once_it_is_mended(
    bert: Path, table: Path, tmp_path: Path
) -> None:
    written(tmp_path, LOSS.replace(".mean(-1)", "[1 / 0]"))
    done = pipeline(
        *("run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--objective", "./reward.py:score", *small(bert), "-S", "pretrain.enabled=false"),
        *("--no-baselines", "-S", "finetune.epsilon=1", "--to", "finetune"),
        home=tmp_path,
    )
    assert done.returncode == 2
    assert "reward.py, line 3: ZeroDivisionError" in done.stderr
    written(tmp_path, LOSS)
    again = pipeline("run", "--resume", "mine", home=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("objective", ["length", "chrf"])
def test_a_score_of_texts_does_not_suit_a_classifier(
    objective: str, bert: Path, table: Path, tmp_path: Path
) -> None:
    done = pipeline(
        *("run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--objective", objective, *small(bert)),
        home=tmp_path,
    )
    assert done.returncode == 2
    assert "this task's model writes none" in done.stderr
    assert not (tmp_path / "runs" / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--task", "./mine.py"],
            "task './mine.py' is a file: write the name in it after a colon, ./mine.py:NAME",
        ),
        (["--objective", "./mine.py"], "objective './mine.py' is a file: write the name in it after a colon"),
        (["--task", "./mine.py:Bare"], "is a Bare, which lacks reads, start, load, yardsticks of a Task"),
        (["--task", "./mine.py:Rowless"], 'has data = "own" and no method rows(config)'),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], said: str, bert: Path, table: Path, tmp_path: Path
) -> None:
    rowless = 'class Rowless(Classification):\n    data = "own"\n'
    bare = "class Bare:\n    pass\n"
    written(tmp_path, f"from pipeline.tasks.kinds import Classification\n\n\n{bare}\n\n{rowless}", "mine.py")
    common = ["--text", "review", "--label", "verdict", *small(bert), "-S", "prepare.corpus=[]"]
    done = pipeline(
        "run", "--train", str(table), *arguments, *common, "-S", "pretrain.enabled=false", home=tmp_path
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
