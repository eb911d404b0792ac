"""The seeded methods on functions whose gradient is known: estimates, steps, schedules, guards, options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.measuring.evaluation import measure
from pipeline.noise import direction
from pipeline.objective import cross_entropy
from pipeline.optimizer import Candidate, Move, Problem, Seeded
from pipeline.registry import Spec, create
from pipeline.space import parse
from pipeline.trainer import Training, train
from plugins.seeded import ES, SPSA, es, spsa
from plugins.seeded.evolution import ranks, z_scores
from tests.test_engine import classifier, searched
from tests.test_training import run

VARIANTS = [f"spsa:{name}" for name in SPSA] + [f"es:{name}" for name in ES]


class Linear:
    """An evaluator of the linear loss g·θ, whose gradient is g everywhere."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.gradient_ = gradient
        self.point = torch.zeros_like(gradient)

    def _z(self, seed: int, distribution: str) -> torch.Tensor:
        if distribution == "sphere":
            z = direction(seed, 0, len(self.point), "gaussian", self.point.device)
            return z * (len(z) ** 0.5 / z.norm())
        return direction(seed, 0, len(self.point), distribution, self.point.device)

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        points = [c.scale * self._z(c.seed, c.distribution) for c in candidates if isinstance(c, Seeded)]
        return [float((self.point + p).double() @ self.gradient_.double()) for p in points]

    def move(self, move: Move) -> None:
        for seed, coefficient in zip(move.seeds, move.coefficients, strict=True):
            self.point = self.point + coefficient * self._z(seed, move.distribution)

    def place(self, coordinates: torch.Tensor) -> None:
        raise AssertionError("SPSA moves along seeds")

    def gradient(self) -> tuple[float, list[torch.Tensor]]:
        raise AssertionError("SPSA needs no gradient")

    def tensors(self) -> list[torch.Tensor]:
        raise AssertionError("SPSA sees no tensor")


@pytest.mark.parametrize(("distribution", "extra"), [("rademacher", -1), ("gaussian", 1), ("sphere", -1)])
@pytest.mark.parametrize("n", [1, 4])
def test_the_estimate_has_the_second_moment_of_theory(distribution: str, extra: int, n: int) -> None:
    d, repeats = 40, 1500
    gradient = torch.randn(d, generator=torch.Generator().manual_seed(0))
    problem = Problem(d, "full", 10**9, 1)
    method = spsa(problem, learning_rate=1.0, epsilon=0.1, directions=n, distribution=distribution)
    total, square = torch.zeros(d), 0.0
    for _ in range(repeats):
        evaluator = Linear(gradient)
        method.step(evaluator)
        total -= evaluator.point
        square += float(evaluator.point @ evaluator.point)
    ratio = square / repeats / float(gradient @ gradient)
    assert ratio == pytest.approx((d + n + extra) / n, rel=0.1)
    assert float(torch.cosine_similarity(total, gradient, dim=0)) > 0.97


def test_many_directions_point_along_the_gradient(bert: Path) -> None:
    model, batch = classifier(bert)
    space = searched("head", model)
    parameters = [t.parameter for t in space.tensors]
    gradient = torch.autograd.grad(cross_entropy(model(batch), batch.targets), parameters)
    before = space.snapshot()
    n = 20 * space.size
    training = Training(
        Spec.parse(f"spsa,directions={n},epsilon=0.001,learning_rate=1.0"), parse("head"), 2 * n, 2 * n, 0
    )
    train(training, model, space, lambda step: batch, lambda: measure(model, [batch]))
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, parameters, strict=True)])
    truth = torch.cat([g.flatten() for g in gradient])
    assert float(torch.cosine_similarity(moved, truth, dim=0)) > 0.95


def test_one_sided_steps_have_a_length_that_ignores_the_gradients_size() -> None:
    d, n = 500, 8
    direction_ = torch.randn(d, generator=torch.Generator().manual_seed(0))
    steps = []
    for size in (1e-3, 1.0, 1e3):
        method = spsa(Problem(d, "full", 10**6, 1), name="OneSided", learning_rate=0.01, directions=n)
        evaluator = Linear(direction_ * size)
        assert method.passes_a_step == n + 1
        report = method.step(evaluator)
        assert report.loss == 0.0  # the loss at the point itself
        steps.append(evaluator.point)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(steps[2], steps[1], rtol=1e-2, atol=1e-6)
    # n slopes of spread one, along unit-variance directions
    assert float(steps[1].norm()) == pytest.approx(0.01 * (d / n) ** 0.5, rel=0.25)


class Bowl(Linear):
    """The loss ½ Σ kᵢ θᵢ², seen from θ = 1."""

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        points = [c.scale * self._z(c.seed, c.distribution) + 1 for c in candidates if isinstance(c, Seeded)]
        return [float((0.5 * self.gradient_ * p * p).double().sum()) for p in points]


def test_clipping_damps_by_the_curvature_along_the_direction() -> None:
    k = torch.tensor([3.0, 1e5])
    moved = {}
    for name in ("TwoPoint", "CurvatureClipped"):
        problem = Problem(2, "full", 10**6, 1)
        bowl = Bowl(k)
        spsa(problem, name=name, epsilon=0.1, learning_rate=1.0, directions=1).step(bowl)
        moved[name] = bowl.point
    # along ±1 the curvature is the trace
    expected = moved["TwoPoint"] / float(k.sum()) ** 0.1
    torch.testing.assert_close(moved["CurvatureClipped"], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_loss_that_never_reacts_stops_loudly(spec: str) -> None:
    method = create(Spec.parse(spec), Problem(4, "head", 10**4, 0))
    for _ in range(9):
        method.step(Linear(torch.zeros(4)))
    with pytest.raises(UserError, match="stayed at exactly 0 for 10 steps"):
        method.step(Linear(torch.zeros(4)))


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize(
    ("schedule", "shares"), [("constant", [1, 1]), ("linear", [1, 0.5]), ("cosine", [1, 0.5])]
)
def test_the_rate_follows_its_schedule(spec: str, schedule: str, shares: list[float]) -> None:
    options = Spec.parse(f"{spec},learning_rate=0.1,schedule={schedule}")
    passes = create(options, Problem(4, "head", 100, 0)).passes_a_step
    method = create(options, Problem(4, "head", 2 * passes, 0))
    rates = [method.step(Linear(torch.ones(4))).metrics["learning_rate"] for _ in shares]
    assert rates == pytest.approx([0.1 * share for share in shares])


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_loss_that_is_not_finite_stops_loudly(spec: str) -> None:
    method = create(Spec.parse(spec), Problem(4, "head", 100, 0))
    with pytest.raises(UserError, match="not finite"):
        method.step(Linear(torch.full((4,), math.nan)))


def test_losses_are_shaped_by_their_order_or_their_spread() -> None:
    assert ranks([3.0, 1.0, 1e9, 2.0, 1.0]) == [0.25, -0.375, 0.5, 0.0, -0.375]
    assert z_scores([3.0, 1.0]) == [1.0, -1.0]
    assert z_scores([2.0, 2.0]) == [0.0, 0.0]


@pytest.mark.parametrize("shaping", ["rank", "z_score"])
def test_an_evolution_step_goes_downhill_by_a_length_that_ignores_the_losses_size(shaping: str) -> None:
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    moved = []
    for size in (1e-3, 1e3):
        method = es(
            Problem(40, "full", 10**9, 1), shaping=shaping, learning_rate=0.1, sigma=0.1, population_size=4000
        )
        assert method.passes_a_step == 4000
        evaluator = Linear(size * gradient)
        method.step(evaluator)
        moved.append(evaluator.point)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)
    assert float(torch.cosine_similarity(-moved[0], gradient, dim=0)) > 0.97


def test_momentum_in_the_factors_is_the_mean_of_what_was_seen_since_v_was_drawn() -> None:
    beta, rate, refresh = 0.8, 0.1, 4
    gradient = torch.randn(20, generator=torch.Generator().manual_seed(0))
    method = spsa(
        Problem(20, "full", 10**9, 1),
        name="LazyLowRank",
        momentum=beta,
        refresh=refresh,
        learning_rate=rate,
        epsilon=0.1,
        directions=2,
        schedule="constant",
    )
    evaluator = Linear(gradient)
    mean = torch.zeros(20)
    for step in range(2 * refresh + 1):
        before = evaluator.point
        method.step(evaluator)
        seeds = [(1 << 32) + 2 * step + i for i in (0, 1)]
        zs = [evaluator._z(seed, "rademacher") for seed in seeds]
        estimate = sum(((gradient @ z) * z for z in zs), torch.zeros(20)) / 2
        mean = (0.0 if step % refresh == 0 else beta) * mean + (1 - beta) * estimate
        torch.testing.assert_close(evaluator.point - before, -rate * mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("steps", "rank"), [(1, 2), (3, 2), (5, 4)])
def test_lazy_steps_add_up_to_the_rank_of_one_until_v_is_drawn_anew(
    steps: int, rank: int, bert: Path
) -> None:
    model, batch = classifier(bert)
    space = searched("full", model)
    before = space.snapshot()
    spec = Spec.parse("spsa:LazyLowRank,refresh=3,directions=1,learning_rate=1.0,momentum=0.5")
    training = Training(spec, parse("full"), 2 * steps, 2 * steps, 0)
    train(training, model, space, lambda step: batch, lambda: measure(model, [batch]))
    for tensor, old in zip(space.tensors, before, strict=True):
        if tensor.name.endswith("query.weight"):
            change = (tensor.parameter.detach() - old).double()
            assert int(torch.linalg.matrix_rank(change, atol=1e-4)) == rank


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spsa,rank=2", "'spsa:TwoPoint' has no option 'rank'"),
        ("es,rank=2", "'es:Gaussian' has no option 'rank'"),
        ("es,population_size=3", "population_size is even"),
        ("es,shaping=rnk", "did you mean 'rank'"),
        ("es:LowRank,rank=-1", "rank must not be negative"),
        ("spsa:LazyLowRank,momentum=1", "momentum is in"),
        ("spsa:LazyLowRank,refresh=-1", "refresh must not be negative"),
        ("spsa:LazyLowRank,distribution=sphere", "rademacher or gaussian, not sphere"),
        ("es:LowRank,distribution=sphere", "rademacher or gaussian, not sphere"),
        ("spsa:OneSided,directions=1", "at least 2 directions"),
        ("spsa,epsilon=-1", "must not be negative"),
        ("spsa:CurvatureClipped,epsilon=1e-170", "must be at least 1e-12"),
        ("spsa,epsilon=1e999", "takes float, not 'inf'"),
        ("spsa,epsilon=1" + 400 * "0", "takes float, not '1000"),
        ("spsa,epsilon={[]:1}", "takes float, not "),
        ("spsa,directions=1000000000", "fewer than one step of TwoPoint takes"),
        ("spsa:TwoPiont", "did you mean 'TwoPoint'"),
    ],
)
def test_an_option_out_of_place_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(Spec.parse(spec), Problem(4, "head", 100, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["spsa:LazyLowRank", "es:LowRank"])
def test_low_rank_directions_are_refused_where_there_are_no_matrices(spec: str, bert: Path) -> None:
    with pytest.raises(UserError, match="no matrices for low-rank directions"):
        run(bert, spec, "projection,dimension=50", 40)


@pytest.mark.parametrize("spec", VARIANTS)
def test_no_method_touches_the_global_random_state(spec: str, bert: Path) -> None:
    before = torch.get_rng_state()
    run(bert, f"{spec},schedule=constant", "full", 70)
    assert torch.equal(torch.get_rng_state(), before)
