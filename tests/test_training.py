"""The loop, its record, and the record replayed: whole, torn, damaged, with other weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import objective as objectives
from pipeline import registry
from pipeline.errors import UserError
from pipeline.measuring.evaluation import measure
from pipeline.models.loading import load_tokenizer
from pipeline.objective import AnyObjective, margin
from pipeline.optimizer import Evaluator, Explicit, Move, Problem, Seeded, StepReport
from pipeline.registry import Spec
from pipeline.space import parse
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import pad, shuffled
from pipeline.trainer import Result, Training, train
from pipeline.trajectory import Trajectory
from tests.conftest import sentences
from tests.test_engine import SPACES, classifier, language_model, searched


def run(
    folder: Path,
    spec: str,
    space: str,
    passes: int,
    path: Path | None = None,
    patience: int = 0,
    resume: bool = False,
    dtype: str = "float32",
) -> tuple[Result, Any]:
    model, batch = classifier(folder, dtype)
    over = searched(space, model)
    training = Training(Spec.parse(spec), parse(space), passes, max(1, passes // 4), 5, patience)
    result = train(
        training,
        model,
        over,
        lambda step: batch,
        lambda: measure(model, [batch]),
        trajectory=path,
        resume=resume,
    )
    return result, over


class OnePlusOne:
    """A (1+1) evolution strategy of the test's own."""

    def __init__(self, problem: Problem, *, sigma: float = 0.3) -> None:
        self.best, self.loss, self.sigma = torch.zeros(problem.size), math.inf, sigma
        self.random = torch.Generator().manual_seed(problem.run_seed)

    def ask(self) -> list[Explicit]:
        return [Explicit(self.best + self.sigma * torch.randn(self.best.shape, generator=self.random))]

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        if losses[0] < self.loss:
            self.best, self.loss = candidates[0].coordinates, losses[0]

    def recommend(self) -> torch.Tensor:
        return self.best

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


@pytest.mark.parametrize("space", SPACES)
def test_replay_of_seeds_gives_the_same_bits(space: str, bert: Path, tmp_path: Path) -> None:
    spec = "spsa,directions=2,epsilon=0.01,learning_rate=0.05,distribution=gaussian,weight_decay=0.1"
    result, after = run(bert, spec, space, 40, tmp_path / "t.jsonl")
    assert result.forward_passes == 40
    again = searched(space, classifier(bert)[0])
    assert again.digest() != after.digest()
    assert Trajectory.read(tmp_path / "t.jsonl").replay(again) == after.digest()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "spec",
    ["spsa,directions=2,weight_decay=0.1", "spsa:LazyLowRank,directions=2,momentum=0.5", "cmaes:SepCMA"],
)
def test_half_precision_replays_and_resumes_to_the_same_bits(
    spec: str, dtype: str, bert: Path, tmp_path: Path
) -> None:
    path, cut = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    _, after = run(bert, spec, "full", 80, path, dtype=dtype)
    assert Trajectory.read(path).replay(searched("full", classifier(bert, dtype)[0])) == after.digest()
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, resumed = run(bert, spec, "full", 80, cut, resume=True, dtype=dtype)
    assert resumed.digest() == after.digest()


@pytest.mark.parametrize("spec", ["cmaes", "cmaes:SepCMA,sigma=0.3", "nevergrad:OnePlusOne", "mine"])
def test_replay_of_told_losses_gives_the_same_bits(
    spec: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda kind, name: OnePlusOne if name == "mine" else load(kind, name)
    )
    result, after = run(bert, spec, "head", 150, tmp_path / "t.jsonl")
    assert result.curve[-1][1]["loss"] < result.curve[0][1]["loss"]
    again = searched("head", classifier(bert)[0])
    assert Trajectory.read(tmp_path / "t.jsonl").replay(again) == after.digest()


def test_a_language_model_learns_and_replays(gpt2: Path, tmp_path: Path) -> None:
    model, batch = language_model(gpt2, "clm")
    space = searched("full", model)
    training = Training(
        Spec.parse("spsa,epsilon=0.01,learning_rate=0.002,directions=4"), parse("full"), 400, 400, 0
    )
    path = tmp_path / "t.jsonl"
    result = train(
        training, model, space, lambda step: batch, lambda: measure(model, [batch]), trajectory=path
    )
    assert result.curve[-1][1]["loss"] < result.curve[0][1]["loss"] - 0.05
    again = searched("full", language_model(gpt2, "clm")[0])
    assert Trajectory.read(path).replay(again) == space.digest()


def test_two_equal_runs_are_equal_to_the_byte(bert: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(bert, "spsa,directions=2", "biases", 40, tmp_path / name)
    first, second = (re.sub(r'"seconds":[^}]*', "", (tmp_path / name).read_text()) for name in "ab")
    assert first == second


def test_a_run_that_was_cut_off_replays_to_its_last_whole_step(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    run(bert, "spsa,directions=2", "head", 40, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])
    cut = Trajectory.read(path)
    assert cut.end is None
    assert len(cut.steps) == 3
    replayed, whole = searched("head", classifier(bert)[0]), searched("head", classifier(bert)[0])
    cut.replay(replayed)
    for line in lines[2:5]:
        whole.move(Move(**json.loads(line)["moves"][0]))
    assert replayed.digest() == whole.digest()


RESUMABLE = [
    "spsa,directions=2,distribution=gaussian",
    "spsa:OneSided,directions=3",
    "spsa:CurvatureClipped,directions=1,distribution=sphere,schedule=cosine",
    "spsa:LazyLowRank,directions=2,refresh=5",
    "spsa:LazyLowRank,directions=2,refresh=5,momentum=0.9",
    "es,population_size=6",
    "es:LowRank,population_size=4,rank=2,shaping=z_score",
    "cmaes",
    "cmaes:SepCMA,sigma=0.3",
    "nevergrad:OnePlusOne",
    "nevergrad:DE",
]


def _epochs(folder: Path) -> Callable[[int], Batch]:
    """Batches of 16 from 60 texts of unequal length: a row is met beside others each time."""
    texts, labels = sentences(60)
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer(texts)["input_ids"]
    targets = torch.tensor([label == "up" for label in labels]).long()

    def batch(step: int) -> Batch:
        rows = shuffled(60, 16, 1, step)
        inputs = pad([tokens[i] for i in rows], tokenizer.pad_token_id)
        return Batch(inputs, targets[rows], examples=tuple(rows))

    return batch


def _over_epochs(
    folder: Path, path: Path, *, resume: bool = False, over: str = "head", objective: AnyObjective = margin
) -> str:
    model, _ = classifier(folder)
    batch, space = _epochs(folder), searched(over, model)
    training = Training(Spec.parse("spsa,directions=2"), parse(over), 120, 40, 5, objective=objective)
    held_out = [batch(0)]
    train(training, model, space, batch, lambda: measure(model, held_out), trajectory=path, resume=resume)
    return space.digest()


def test_a_run_goes_on_with_the_features_that_it_kept(bert: Path, tmp_path: Path) -> None:
    """The last bits of a row's features depend on the rows it was first encoded with."""
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = _over_epochs(bert, path)
    content = path.read_bytes()
    for share in (0.1, 0.3, 0.5, 0.8):
        cut.write_bytes(content[: int(len(content) * share)])
        assert _over_epochs(bert, cut, resume=True) == expected


class Moody(TaskModel):
    """A teacher whose opinion of a text depends, somewhat, on the texts it is read with."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = self.inner = classifier(folder)[0]

    def features(self, batch: Batch) -> torch.Tensor:
        return self.inner.features(batch)

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        logits = self.inner.outputs(features)
        return logits + logits.mean() + features.mean() * torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("over", ["head", "biases"])
def test_a_run_goes_on_with_what_its_teacher_said(over: str, bert: Path, tmp_path: Path) -> None:
    """What it says of a row depends, in its last bits, on the rows it was first read with."""
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    def made(path: Path, *, resume: bool = False) -> str:
        objective = objectives.parse(f"cross_entropy+kl,teacher={tmp_path}", lambda folder: Moody(bert))
        return _over_epochs(bert, path, resume=resume, over=over, objective=objective)

    expected = made(path)
    content = path.read_bytes()
    for share in (0.3, 0.8):
        cut.write_bytes(content[: int(len(content) * share)])
        assert made(cut, resume=True) == expected


class Twice:
    """Two moves a step, a loss before each: a budget may end between them."""

    def __init__(self) -> None:
        self._step = 0

    def step(self, evaluator: Evaluator) -> StepReport:
        for half in range(2):
            [loss] = evaluator.losses([Seeded(2 * self._step + half, 0.1)])
            evaluator.move(Move([2 * self._step + half], [-0.1 * loss], "rademacher"))
        self._step += 1
        return StepReport(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def test_a_step_that_the_budget_ends_after_a_move_is_in_the_record(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trainer", "trajectory"):
        monkeypatch.setattr(f"pipeline.{module}.create", lambda *given: Twice())
    path = tmp_path / "t.jsonl"
    result, space = run(bert, "spsa", "head", 5, path)
    assert (result.steps, result.forward_passes, result.curve[-1][0]) == (3, 5, 5)
    assert Trajectory.read(path).replay(searched("head", classifier(bert)[0])) == space.digest()
    lines = path.read_text().splitlines(keepends=True)
    for kept in (len(lines) - 1, len(lines) - 2, len(lines) - 3):
        path.write_text("".join(lines[:kept]))
        again, other = run(bert, "spsa", "head", 5, path, resume=True)
        assert other.digest() == space.digest()
        assert (again.steps, again.forward_passes) == (3, 5)


def test_a_run_goes_on_with_as_many_candidates_a_pass(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.scorer._LOGITS", 3 * 8 * 2)  # three lanes of 8 texts and 2 labels
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    spec = "es:LowRank,population_size=8"
    _, after = run(bert, spec, "full", 80, path)
    assert [step["found"] for step in Trajectory.read(path).steps if "found" in step] == [
        {"together": True, "classes": 2}
    ]
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, resumed = run(bert, spec, "full", 80, cut, resume=True)
    assert resumed.digest() == after.digest()


def test_a_run_that_has_nothing_left_to_learn_keeps_what_it_has(bert: Path, tmp_path: Path) -> None:
    model, batch = classifier(bert)
    space = searched("head", model)
    spec = Spec.parse("spsa,learning_rate=2,epsilon=0.1,directions=4,schedule=constant")
    training = Training(spec, parse("head"), 4000, 4000, 5, objective=margin)
    path = tmp_path / "t.jsonl"
    with pytest.warns(UserWarning, match=r"training ends after .* stayed at exactly 0 for 10 steps"):
        result = train(
            training, model, space, lambda step: batch, lambda: measure(model, [batch]), trajectory=path
        )
    assert result.forward_passes < 4000
    assert result.curve[-1][1]["accuracy"] == 1.0
    again = searched("head", classifier(bert)[0])
    assert Trajectory.read(path).replay(again) == space.digest()


def test_a_loss_that_is_not_finite_at_the_start_stops_before_a_step(bert: Path) -> None:
    model, batch = classifier(bert)
    training = Training(Spec.parse("spsa"), parse("head"), 100, 50, 0, patience=1)
    with pytest.raises(UserError, match="held-out loss is nan before the first step"):
        train(training, model, searched("head", model), lambda step: batch, lambda: {"loss": math.nan})


def test_a_run_goes_on_with_its_own_number_of_threads(bert: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "t.jsonl", []
    run(bert, "spsa,directions=2", "head", 40, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0].replace('"threads":1', '"threads":2') + "".join(lines[1:4]))
    model, batch = classifier(bert)
    training = Training(Spec.parse("spsa,directions=2"), parse("head"), 40, 10, 5)

    def measured() -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return {"loss": 1.0}

    train(
        training, model, searched("head", model), lambda step: batch, measured, trajectory=path, resume=True
    )
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_a_run_that_goes_on_elsewhere_says_so(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    run(bert, "spsa,directions=2", "head", 40, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0].replace('"torch":"', '"torch":"0.') + "".join(lines[1:4]))
    with pytest.warns(UserWarning, match="goes on elsewhere"):
        run(bert, "spsa,directions=2", "head", 40, path, resume=True)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("spec", RESUMABLE)
def test_a_run_cut_anywhere_goes_on_to_the_same_weights(
    spec: str, patience: int, bert: Path, tmp_path: Path
) -> None:
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    result, after = run(bert, spec, "head", 150, path, patience)
    content = path.read_bytes()
    for share in (0.02, 0.3, 0.7, 0.99, 1.0):
        cut.write_bytes(content[: int(len(content) * share)])
        resumed, space = run(bert, spec, "head", 150, cut, patience, resume=True)
        assert space.digest() == after.digest()
        assert resumed.curve == result.curve
        assert (resumed.steps, resumed.forward_passes) == (result.steps, result.forward_passes)
        kept = content[: int(len(content) * share)].rpartition(b"\n")[0].splitlines()
        measured = [i for i, line in enumerate(kept) if b'"measured"' in line]
        end = measured[-1] + 1 if len(measured) > 1 else 0  # before the first step it begins anew
        assert cut.read_bytes().splitlines()[:end] == kept[:end]  # seconds too: nothing is made again


def test_damage_is_one_line(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    run(bert, "spsa,directions=2", "head", 40, path)
    lines = path.read_text().splitlines()

    def broken(number: int, text: str) -> Path:
        other = tmp_path / "broken.jsonl"
        other.write_text("\n".join([*lines[:number], text, *lines[number + 1 :]]) + "\n")
        return other

    with pytest.raises(UserError, match="line 3 is not JSON"):
        Trajectory.read(broken(2, "{"))
    header = json.loads(lines[0])
    with pytest.raises(UserError, match="noise 99"):
        Trajectory.read(broken(0, json.dumps({**header, "noise": 99})))
    with pytest.raises(UserError, match="start weights"):
        Trajectory.read(broken(0, json.dumps({**header, "start": "0"}))).replay(
            searched("head", classifier(bert)[0])
        )
    step = json.loads(lines[2])
    step["moves"][0]["coefficients"][0] += 1e-3
    with pytest.raises(UserError, match="not the same"):
        Trajectory.read(broken(2, json.dumps(step))).replay(searched("head", classifier(bert)[0]))
    with pytest.raises(UserError, match="no trajectory"):
        Trajectory.read(tmp_path / "absent")


def test_adamw_learns_and_says_that_it_cannot_be_replayed(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result, _ = run(bert, "adamw,learning_rate=0.01", "full", 61, path)
    assert result.forward_passes == 60
    assert result.curve[-1][1]["loss"] < 0.5 * result.curve[0][1]["loss"]
    with pytest.raises(UserError, match="used gradients"):
        Trajectory.read(path).replay(searched("full", classifier(bert)[0]))


def test_a_budget_below_one_step_is_refused(bert: Path) -> None:
    with pytest.raises(UserError, match="fewer than one step"):
        run(bert, "spsa,directions=4", "head", 7)


def test_patience_keeps_the_best_weights_and_replay_stops_there(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    spec = "spsa,directions=1,epsilon=0.1,learning_rate=5"  # far too fast: it gets worse
    result, after = run(bert, spec, "head", 400, path, patience=1)
    end = Trajectory.read(path).end
    losses = [figures["loss"] for _, figures in result.curve]
    assert end is not None
    assert min(losses) < losses[-1]
    assert end["kept_step"] < result.steps
    again = searched("head", classifier(bert)[0])
    assert Trajectory.read(path).replay(again) == after.digest()
