"""Objectives by their definitions, and a run that minimises one without a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.objective import (
    AnyObjective,
    cosine,
    cross_entropy,
    error,
    f1,
    judge,
    margin,
    parse,
    squared_error,
)
from pipeline.optimizer import LowRank, Seeded
from pipeline.tasks.base import Batch
from pipeline.tasks.classification import TextClassifier
from tests.test_engine import classifier, searched

LOGITS = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 0.2, -0.1]], [[0.0, 0.0, 3.0], [1.0, -1.0, 0.0]]])
TARGETS = torch.tensor([0, 2])


@pytest.mark.parametrize("objective", [cross_entropy, error, squared_error, margin, cosine, f1])
def test_candidates_are_scored_apart(objective: object) -> None:
    assert callable(objective)
    together = objective(LOGITS.clone(), TARGETS)
    assert together.shape == (2,)
    torch.testing.assert_close(together, torch.stack([objective(each.clone(), TARGETS) for each in LOGITS]))


def test_each_is_what_its_definition_says() -> None:
    first = LOGITS[0]
    probabilities, one_hot = first.softmax(-1), torch.nn.functional.one_hot(TARGETS, 3)
    assert float(cross_entropy(first.clone(), TARGETS)) == pytest.approx(
        float(-(one_hot * probabilities.log()).sum(-1).mean())
    )
    assert error(LOGITS, TARGETS).tolist() == [0.5, 1.0]
    assert float(squared_error(first, TARGETS)) == pytest.approx(
        float((probabilities - one_hot).square().sum(-1).mean())
    )
    assert float(margin(first, TARGETS)) == pytest.approx((0.0 + (1.0 + 0.2 + 0.1)) / 2)
    assert float(loss("margin,width=2", first)) == pytest.approx((0.5 + (2.0 + 0.2 + 0.1)) / 2)
    similarity = torch.nn.functional.cosine_similarity(probabilities, one_hot, dim=-1)
    assert float(cosine(first, TARGETS)) == pytest.approx(float((1.0 - similarity).mean()))


def test_f1_is_scikit_learns() -> None:
    logits = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 5] -= 10.0  # a class that is neither predicted nor a target does not count
    targets = torch.arange(40) % 5
    for each, loss_of in zip(logits, f1(logits, targets).tolist(), strict=True):
        theirs = f1_score(targets, each.argmax(-1), average="macro")
        assert loss_of == pytest.approx(1.0 - theirs)


def test_a_sum_adds_its_terms_with_their_weights() -> None:
    ours = loss("cross_entropy+0.1*error+1e-1*margin,width=2e+0", LOGITS)
    wide = margin(LOGITS.clone(), TARGETS, width=2.0)
    theirs = cross_entropy(LOGITS.clone(), TARGETS) + 0.1 * error(LOGITS, TARGETS) + 0.1 * wide
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(loss("0.5*error", LOGITS), 0.5 * error(LOGITS, TARGETS))
    logits = LOGITS[0].clone().requires_grad_()
    (both,) = torch.autograd.grad(loss("cross_entropy+2*squared_error", logits), logits)
    (first,) = torch.autograd.grad(cross_entropy(logits, TARGETS), logits)
    (second,) = torch.autograd.grad(squared_error(logits, TARGETS), logits)
    torch.testing.assert_close(both, first + 2 * second)


def loss(text: str, logits: Tensor) -> Tensor:
    """In place, as the engine allows, where the logits need no gradient."""
    batch = Batch({}, TARGETS)
    return judge(parse(text), batch)(logits if logits.requires_grad else logits.clone())


def test_a_small_loss_is_not_lost_in_large_logits() -> None:
    logits = torch.tensor([[30.0, 15.5, 15.0]])
    truth = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([0]))
    assert float(cross_entropy(logits, torch.tensor([0]))) == pytest.approx(float(truth), rel=0.05)


def test_the_gradient_of_cross_entropy_is_that_of_torch() -> None:
    logits = LOGITS[0].clone().requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy(logits, TARGETS), logits)
    (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, TARGETS), logits)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cross_entrpy", "unknown objective 'cross_entrpy'; did you mean 'cross_entropy'"),
        ("margin,widht=2", "objective 'margin' has no option 'widht'; did you mean 'width'"),
        ("error,width=2", "objective 'error' has no option 'width'; it takes no options"),
        ("margin:Hinge", "has no variants"),
        ("cross_entropy+0.1*eror", "unknown objective 'eror'; did you mean 'error'"),
        ("cross_entropy+0*error", "'0' in the objective .* is no weight above 0"),
        ("x*error", "'x' in the objective .* is no weight above 0"),
        ("kl", "kl,teacher=runs/NAME/models/finetuned"),
        ("kl,teacher=nowhere", "no model at 'nowhere'"),
    ],
)
def test_what_is_wrong_with_one_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.mark.parametrize("space", ["head", "full"])
def test_the_engine_scores_what_it_is_given(space: str, bert: Path) -> None:
    model, batch = classifier(bert)
    engine = Engine(model, searched(space, model), 1000, 0, error)
    candidates = [Seeded(seed, 1.0, "gaussian", LowRank(1)) for seed in range(6)]
    losses = engine.losses(batch, candidates)
    assert len(set(losses)) > 1
    assert all(
        loss * len(batch.targets) == pytest.approx(round(loss * len(batch.targets))) for loss in losses
    )
    with pytest.raises(UserError, match="needs a gradient, which the objective has not"):
        engine.gradient(batch, 0)
    engine.close()


@pytest.mark.parametrize("wrong", [lambda logits, targets: logits, lambda logits, targets: 1.0])
def test_an_objective_of_the_wrong_shape_is_one_line(wrong: object, bert: Path) -> None:
    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        assert callable(wrong)
        made: Tensor = wrong(logits, targets)
        return made

    model, batch = classifier(bert)
    engine = Engine(model, searched("head", model), 1000, 0, objective)
    with pytest.raises(UserError, match="it must give a tensor of a loss for each"):
        engine.losses(batch, [Seeded(1, 0.1)])


def test_a_student_learns_its_teachers_probabilities(bert: Path, tmp_path: Path) -> None:
    teacher, batch = classifier(bert)
    student, _ = classifier(bert)
    with torch.no_grad():
        student.classifier.weight.neg_()
    asked: list[Path] = []

    def load(folder: Path) -> TextClassifier:
        asked.append(folder)
        return teacher

    objective = parse(f"kl,teacher={tmp_path},temperature=2", load)
    assert not asked, "the teacher is loaded before it is needed"
    with torch.inference_mode():
        logits, taught = student(batch), teacher(batch)
    for each in (logits, logits[None].expand(3, -1, -1)):
        theirs = 4.0 * torch.nn.functional.kl_div(
            (logits / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="batchmean"
        )
        ours = judge(objective, batch)(each)
        torch.testing.assert_close(ours, theirs.expand(ours.shape))
    assert asked == [tmp_path]
    assert float(judge(objective, batch)(taught)) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="tells 2 classes apart, the model 3"):
        judge(objective, batch)(torch.zeros(8, 3))

    engine = Engine(student, searched("head", student), 1000, 0, objective)
    along = [Seeded(seed, scale) for seed in range(3) for scale in (0.0, 0.1)]
    losses = engine.losses(batch, along)
    assert losses[0] == pytest.approx(float(judge(objective, batch)(logits)))
    assert len(set(losses)) == 4
    _, gradients = engine.gradient(batch, 0)
    assert gradients[0].abs().max() > 0
    engine.close()


def test_a_teacher_reads_each_row_once(bert: Path, tmp_path: Path) -> None:
    teacher, batch = classifier(bert)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    objective: AnyObjective = parse(f"kl,teacher={tmp_path}", lambda folder: teacher)
    first = judge(objective, batch)(torch.zeros(8, 2))
    again = judge(objective, batch)(torch.zeros(8, 2))
    assert len(calls) == 1
    assert torch.equal(first, again)
