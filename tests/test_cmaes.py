"""CMA and SepCMA. Against a reference: evaluations to the target beside FIELD.md section 4 and pycma.

By behaviour: failed evaluations, life after convergence, exact resumption, untouched surroundings.
"""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import AskTell, Explicit, Problem
from plugins.cmaes import FULL_UP_TO, cmaes
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.strategy import CMAES

Objective = Callable[[Tensor], float]


def sphere(x: Tensor) -> float:
    return float(x.square().sum())


def ellipsoid(x: Tensor) -> float:
    return float((10 ** (6 * torch.arange(len(x)) / (len(x) - 1)) * x.square()).sum())


def rosenbrock(x: Tensor) -> float:
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def shifted(function: Objective) -> Objective:
    """Coordinates are displacements: the published x0 = 1 puts the optimum at -1."""
    return lambda x: function(x + 1)


def problem(size: int, seed: int = 0) -> Problem:
    return Problem(size, "projection", 10_000, seed)


def scored(candidates: list[Explicit], function: Objective) -> list[float]:
    return [function(candidate.coordinates.double()) for candidate in candidates]


def generations(method: CMAES, function: Objective, count: int) -> list[Tensor]:
    """Runs ``count`` generations; every candidate they asked for."""
    asked = []
    for _ in range(count):
        candidates = method.ask()
        method.tell(candidates, scored(candidates, function))
        asked += [candidate.coordinates for candidate in candidates]
    return asked


def evaluations(method: CMAES, function: Objective, target: float, at_most: int) -> float:
    """Evaluations until a candidate is below ``target``; infinite after ``at_most``."""
    count = 0
    while count < at_most:
        candidates = method.ask()
        losses = scored(candidates, function)
        for index, loss in enumerate(losses):
            if loss < target:
                return count + index + 1
        method.tell(candidates, losses)
        count += len(losses)
    return math.inf


@pytest.mark.parametrize(
    ("name", "function", "size", "sigma", "reference"),
    [
        ("CMA", shifted(sphere), 10, 0.5, 1360),
        ("CMA", shifted(sphere), 20, 0.5, 2544),
        ("CMA", shifted(ellipsoid), 10, 0.5, 3870),
        ("CMA", rosenbrock, 10, 0.1, 4990),
        ("SepCMA", shifted(sphere), 100, 0.5, 10047),
        ("SepCMA", shifted(ellipsoid), 100, 0.5, 27404),
    ],
)
def test_reaches_1e_8_in_the_evaluations_of_the_field(
    name: str, function: Objective, size: int, sigma: float, reference: int
) -> None:
    counts = [
        evaluations(cmaes(problem(size, seed), name=name, sigma=sigma), function, 1e-8, 2 * reference)
        for seed in range(1 if size == 100 else 3)
    ]
    assert statistics.median(counts) < 1.5 * reference


@pytest.fixture
def pycma(size: int) -> Iterator[Any]:
    """pycma's strategy at its defaults, started at x0 = 1 with sigma 0.5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations, and those of the numpy it calls
        import cma

        yield lambda seed: cma.CMAEvolutionStrategy(
            size * [1.0], 0.5, {"verbose": -9, "seed": seed + 1, "ftarget": 1e-8}
        )


@pytest.mark.parametrize("size", [20])
def test_takes_as_many_evaluations_as_pycma(pycma: Any, size: int) -> None:
    theirs = statistics.mean(
        pycma(seed).optimize(lambda x: float((x**2).sum())).result.evaluations for seed in range(3)
    )
    ours = statistics.mean(
        evaluations(cmaes(problem(size, seed), sigma=0.5), shifted(sphere), 1e-8, 10_000) for seed in range(3)
    )
    assert ours == pytest.approx(theirs, rel=0.25)


@pytest.mark.parametrize("size", [2, 20, 100])
def test_parameters_are_those_of_pycma(pycma: Any, size: int) -> None:
    p, theirs = Parameters.of(size, default_population_size(size)), pycma(0).sp
    assert p.population_size == theirs.popsize
    assert p.weights == pytest.approx(list(theirs.weights))
    assert (p.mu_eff, p.c_1, p.c_mu, p.c_c) == pytest.approx(
        (theirs.weights.mueff, theirs.c1, theirs.cmu, theirs.cc)
    )
    # pycma's c_sigma has 3 where (55) has 5
    assert p.c_sigma == pytest.approx((p.mu_eff + 2) / (size + p.mu_eff + 5))
    exact = math.sqrt(2) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))
    assert p.chi_n == pytest.approx(exact, rel=5e-3)


def test_weights_keep_the_covariance_positive_definite() -> None:
    for size in (1, 2, 10, 1000):
        for population_size in (2, 3, 4, 50, 1000):
            for rate_factor in (1.0, (size + 2) / 3):
                p = Parameters.of(size, population_size, rate_factor)
                positive = sum(w for w in p.weights if w > 0)
                negative = -sum(w for w in p.weights if w < 0)
                assert len(p.weights) == population_size
                assert positive == pytest.approx(1)
                # (52): however long y is, what is taken from an axis is less than what decay leaves of it
                assert size * p.c_mu * negative <= (1 - p.c_1 - p.c_mu) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
def test_converges_though_three_in_ten_evaluations_fail(name: str) -> None:
    failures = random.Random(0)
    method = cmaes(problem(10), name=name, sigma=0.5)

    def failing(x: Tensor) -> float:
        return failures.choice([math.nan, math.inf, -math.inf]) if failures.random() < 0.3 else sphere(x + 1)

    generations(method, failing, 400)
    assert sphere(method.recommend() + 1) < 1e-8


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
@pytest.mark.parametrize("loss", [math.nan, 0.7])
def test_a_generation_of_equal_losses_changes_only_the_noise(name: str, loss: float) -> None:
    method = cmaes(problem(5), name=name)
    generations(method, sphere, 3)
    before, first = method.state_dict(), method.ask()
    method.tell(first, [loss] * len(first))
    after, second = method.state_dict(), method.ask()
    assert not torch.equal(first[0].coordinates, second[0].coordinates)
    assert before["sigma"] == after["sigma"]
    assert all(torch.equal(before[key], after[key]) for key in ("mean", "covariance", "path_sigma", "path_c"))


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
@pytest.mark.parametrize("function", [sphere, lambda x: 1.0, lambda x: float(x.sum())])
def test_goes_on_after_convergence_on_a_plateau_and_without_a_bound(name: str, function: Objective) -> None:
    method = cmaes(problem(3), name=name)
    generations(method, function, 1500)
    candidates = method.ask()
    assert all(torch.isfinite(candidate.coordinates).all() for candidate in candidates)
    assert 0 < method.sigma < math.inf
    assert len({tuple(candidate.coordinates.tolist()) for candidate in candidates}) == len(candidates)


def test_diagonal_and_full_agree_where_the_function_is_separable() -> None:
    full = evaluations(cmaes(problem(10), name="CMA", sigma=0.5), shifted(sphere), 1e-8, 5000)
    diagonal = evaluations(cmaes(problem(10), name="SepCMA", sigma=0.5), shifted(sphere), 1e-8, 5000)
    assert diagonal == pytest.approx(full, rel=0.25)


def test_diagonal_is_the_full_method_in_one_dimension() -> None:
    full, diagonal = (cmaes(problem(1), name=name) for name in ("CMA", "SepCMA"))
    assert full.parameters == diagonal.parameters
    pairs = zip(
        generations(full, shifted(sphere), 20), generations(diagonal, shifted(sphere), 20), strict=True
    )
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in pairs)


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
def test_a_restored_run_goes_on_bit_for_bit(name: str) -> None:
    unbroken = cmaes(problem(40), name=name)
    generations(unbroken, rosenbrock, 7)
    state = unbroken.state_dict()
    expected = generations(unbroken, rosenbrock, 10)  # must not reach into the state
    restored = cmaes(problem(40, seed=5), name=name)
    restored.load_state_dict(state)
    actual = generations(restored, rosenbrock, 10)
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    assert torch.equal(unbroken.recommend(), restored.recommend())
    assert restored.sigma == unbroken.sigma


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
def test_runs_depend_on_their_seed_alone(name: str) -> None:
    def run(seed: int) -> Tensor:
        return torch.stack(generations(cmaes(problem(6, seed), name=name), shifted(sphere), 5))

    first = run(1)
    torch.manual_seed(99)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
def test_leaves_arguments_and_global_generators_alone(name: str) -> None:
    np.random.seed(7)
    expected = np.random.random(3).tolist()
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    method = cmaes(problem(6), name=name)
    candidates = method.ask()
    losses = scored(candidates, sphere)
    copies = [candidate.coordinates.clone() for candidate in candidates], list(losses)
    method.tell(candidates, losses)
    method.recommend().add_(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.random(3).tolist() == expected
    assert losses == copies[1]
    assert all(torch.equal(c.coordinates, copy) for c, copy in zip(candidates, copies[0], strict=True))
    assert not torch.equal(method.recommend(), torch.ones(6))


def test_fills_in_the_protocol() -> None:
    method = cmaes(problem(7), population_size=9)
    assert isinstance(method, AskTell)
    candidates = method.ask()
    assert len(candidates) == 9
    assert all(c.coordinates.shape == (7,) and c.coordinates.dtype == torch.float32 for c in candidates)
    assert all(
        torch.equal(a.coordinates, b.coordinates) for a, b in zip(candidates, method.ask(), strict=True)
    )
    assert torch.equal(method.recommend(), torch.zeros(7))
    with pytest.raises(ValueError, match="9 candidates"):
        method.tell(candidates[:4], [0.0] * 4)


def test_chooses_the_variant_by_size_and_shows_it() -> None:
    assert cmaes(problem(FULL_UP_TO)).name == "CMA"
    assert cmaes(problem(FULL_UP_TO + 1)).name == "SepCMA"
    assert cmaes(problem(FULL_UP_TO), name="SepCMA").name == "SepCMA"


def test_declares_memory_without_allocating() -> None:
    memory_bytes = cmaes.memory_bytes  # type: ignore[attr-defined]
    whole = Problem(22_700_000, "full", 10_000, 0)
    assert memory_bytes(whole, name="CMA", sigma=0.1) > 8 * 2**50  # petabytes
    assert memory_bytes(whole) == memory_bytes(whole, name="SepCMA") < 2**33
    assert memory_bytes(whole, population_size=10) < memory_bytes(whole)
    with pytest.raises(UserError, match="unknown"):
        memory_bytes(whole, name="nope")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "SepCMAES"}, "did you mean 'SepCMA'"),
        ({"name": "xyz"}, "choose one of CMA, SepCMA"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": math.nan}, "sigma must be positive"),
        ({"population_size": 1}, "population_size must be at least 2"),
        ({"population_size": -3}, "population_size must be at least 2"),
    ],
)
def test_refuses_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        cmaes(problem(5), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["CMA", "SepCMA"])
def test_samples_the_same_on_every_device(name: str) -> None:
    cpu = cmaes(problem(20), name=name)
    cuda = cmaes(Problem(20, "projection", 10_000, 0, torch.device("cuda")), name=name)
    expected, actual = (generations(method, shifted(sphere), 10) for method in (cpu, cuda))
    assert actual[0].device.type == "cuda"
    assert all(torch.allclose(a.cpu(), e, atol=1e-4) for a, e in zip(actual, expected, strict=True))
