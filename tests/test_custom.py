"""A user's own file as an objective or a task: whole runs, and the one line when something is wrong in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pipeline import user_code
from pipeline.errors import UserError
from pipeline.objective import cross_entropy, judge, parse
from pipeline.tasks.base import Batch
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
        ("1 / 0", r"reward.py, line 2: ZeroDivisionError: division by zero \(the objective score, at logits"),
        ("logits", r"gave .* for \d candidates; it must give a tensor of a loss for each"),
        ("0.5", r"the objective gave float for \d candidates"),
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
