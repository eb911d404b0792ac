"""Objectives by their definitions, and a run that minimises one without a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.objective import cross_entropy, error, margin, parse, squared_error
from pipeline.optimizer import LowRank, Seeded
from tests.test_engine import classifier, searched

LOGITS = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 0.2, -0.1]], [[0.0, 0.0, 3.0], [1.0, -1.0, 0.0]]])
TARGETS = torch.tensor([0, 2])


@pytest.mark.parametrize("objective", [cross_entropy, error, squared_error, margin])
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
    assert float(parse("margin,width=2")(first, TARGETS)) == pytest.approx((0.5 + (2.0 + 0.2 + 0.1)) / 2)


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
