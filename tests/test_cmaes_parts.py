"""Parts of CMA-ES: samples, ranks, step sizes, stop criteria, bounds; LM-MA-ES against its published loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline import noise
from pipeline.errors import UserError
from plugins.cmaes import cmaes
from plugins.cmaes.box import Box
from plugins.cmaes.parameters import Parameters, default_population_size
from plugins.cmaes.ranking import by_rank
from plugins.cmaes.sampling import Generation
from plugins.cmaes.step_size import PathLength, PopulationSuccess
from plugins.cmaes.stopping import Scales, Stopping
from tests.cmaes_problems import ellipsoid, generations, problem, rosenbrock, scored, shifted

WEIGHTS = (0.6, 0.3, 0.1, -0.1, -0.3, -0.6)


def drawn(count: int, size: int, held: bool = True, **options: bool) -> Tensor:
    like = torch.zeros(size, dtype=torch.float64)
    return Generation(7, (count, size), like, held=held, **options).block(slice(0, size))


def test_samples_are_normal_and_independent() -> None:
    z = drawn(60, 2000)
    assert abs(z.mean()) < 0.01
    assert z.var() == pytest.approx(1, abs=0.02)
    correlations = (z @ z.T / 2000).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(2000)


@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_spans_and_sums_are_of_the_same_samples(mirrored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.cmaes.sampling.HELD", 0)
    monkeypatch.setattr("plugins.cmaes.sampling._DRAWN", 100)
    like = torch.zeros(333, dtype=torch.float64)
    generation = Generation(7, (6, 333), like, mirrored=mirrored)
    assert not generation.held
    whole = drawn(6, 333, mirrored=mirrored)
    assert len(list(generation.spans)) > 3
    assert torch.equal(torch.cat([generation.block(span) for span in generation.spans], 1), whole)
    assert torch.equal(torch.stack([generation.row(i) for i in range(6)]), whole)
    weights = torch.arange(6, dtype=torch.float64)
    assert torch.allclose(generation.weighted(weights, torch.empty_like(like)), weights @ whole)


def test_mirrored_samples_are_pairs() -> None:
    z = drawn(6, 10, mirrored=True)
    assert torch.equal(z[0::2], -z[1::2])
    assert not torch.equal(z[0].abs(), z[2].abs())


@pytest.mark.parametrize("count", [4, 13])
def test_orthogonal_samples_are_so_in_blocks_and_keep_their_lengths(count: int) -> None:
    z = drawn(count, 5, orthogonal=True)
    for low in range(0, count, 5):
        block = z[low : low + 5]
        assert torch.allclose(block @ block.T, torch.diag(block.square().sum(1)), atol=1e-9)
    assert torch.allclose(z.norm(dim=1), drawn(count, 5).norm(dim=1))
    assert ((z * drawn(count, 5)).sum(1) > 0).all()  # none is turned around


def test_orthogonal_samples_of_a_large_space_are_refused() -> None:
    with pytest.raises(UserError, match="orthogonal=true needs all samples of 300,000 coordinates"):
        cmaes(problem(300_000), name="SepCMA", orthogonal=True)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3, 1, 2, 6, 5, 4], [0.1, 0.6, 0.3, -0.6, -0.3, -0.1]),
        ([1, 1, 2, 2, 3, 3], [0.45, 0.45, 0.0, 0.0, -0.45, -0.45]),  # equal losses share
        ([math.nan, 1, -math.inf, 2, 3, math.inf], [-1 / 3, 0.6, -1 / 3, 0.3, 0.1, -1 / 3]),
        ([math.nan, math.inf, math.nan, math.nan, 1, math.nan], [-0.12, -0.12, -0.12, -0.12, 0.6, -0.12]),
    ],
)
def test_weights_go_by_rank_and_failures_never_draw(losses: list[float], expected: list[float]) -> None:
    assert by_rank(losses, WEIGHTS).tolist() == pytest.approx(expected)


def test_of_a_mirrored_pair_the_worse_ranks_behind_all_others() -> None:
    weights = by_rank([5, 6, 1, 2, 3, 4], WEIGHTS, mirrored=True)
    assert weights.tolist() == pytest.approx([0.1, -0.6, 0.6, -0.1, 0.3, -0.3])
    tied = by_rank([5, 5, 1, 2, 3, 4], WEIGHTS, mirrored=True)
    assert tied[0] == tied[1]  # says nothing of its direction


def test_path_lengths_move_sigma_as_published() -> None:
    p = Parameters.of(20, 12)
    rule = PathLength(p)
    assert rule.growth(p.chi_n, []) == 1.0
    assert rule.growth(2 * p.chi_n, []) == pytest.approx(math.exp(p.c_sigma / p.d_sigma))  # (44)
    assert rule.growth(1e9, []) == math.e
    squared = PathLength(p, squared=True)
    assert squared.growth(math.sqrt(40), []) == pytest.approx(math.exp(p.c_sigma / 2))


def test_population_success_compares_two_populations() -> None:
    def after(now: list[float]) -> float:
        rule = PopulationSuccess()
        assert rule.growth(0.0, [2.0, 3.0, 4.0]) == 1.0
        return rule.growth(0.0, now)

    assert after([0.0, 1.0]) == pytest.approx(math.exp(0.3 * 0.75))  # all better: z = 1 - z*
    assert after([5.0, math.nan]) == pytest.approx(math.exp(-0.3 * 1.25))
    assert after([2.0, 3.0, 4.0]) == pytest.approx(math.exp(-0.3 * 0.25))  # as many ranks won as lost


def noted(losses: list[list[float]]) -> str:
    watch = Stopping(2, 6, 1.0)  # looks at 20 generations, and stagnates over 130
    for generation in losses:
        watch.note(generation)
    return watch.reason.split(":")[0]


def test_losses_that_no_longer_fall_end_a_run() -> None:
    assert noted([[1.0, 2.0]] * 19) == ""
    assert noted([[1.0, 2.0]] * 20) == "EqualFunValues"
    assert noted([[1.0 + i * 1e-15, 1.0 + 1e-14] for i in range(20)]) == "TolFun"
    assert noted([[math.inf, math.inf]] * 40) == ""
    draws = [noise.derive(1, i) / 2**63 for i in range(400)]
    assert noted([[draw, draw + 1] for draw in draws[:130]]) == ""
    assert noted([[draw, draw + 1] for draw in draws]) == "Stagnation"
    assert noted([[draw - i / 20, draw + 1] for i, draw in enumerate(draws)]) == ""  # the best still falls
    assert noted([[draw, draw + 1 - i / 20] for i, draw in enumerate(draws)]) == ""  # the median does


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"deviations": torch.full((2,), 1e-13)}, "TolX"),
        ({"deviations": torch.full((2,), 1e-13), "path": torch.tensor([0.0, -1e-3])}, ""),
        ({"most": 2e4, "least": 1e4}, "TolXUp"),
        ({"least": 1e-8}, "ConditionCov"),
        ({"axis": torch.tensor([0.0, 1e-17])}, "NoEffectAxis"),
        ({"axis": torch.tensor([0.0, 1e-3])}, ""),
        ({"mean": torch.tensor([1.0, 1e17])}, "NoEffectCoord"),
    ],
)
def test_a_distribution_that_collapsed_or_ran_away_ends_a_run(changed: dict[str, object], why: str) -> None:
    given: dict[str, object] = {
        "sigma": 1.0,
        "mean": torch.zeros(2),
        "deviations": torch.ones(2),
        "path": torch.zeros(2),
        "least": 1.0,
        "most": 1.0,
    }
    if "axis" in changed:
        given["mean"] = torch.ones(2)
    watch = Stopping(2, 6, 1.0)
    watch.look(Scales(**{**given, **changed}))  # type: ignore[arg-type]
    assert watch.reason.split(":")[0] == why


@pytest.mark.parametrize(("lower", "upper"), [(-0.84, 0.76), (-1.0, math.inf), (-math.inf, 2.0)])
def test_a_box_folds_points_inside_and_leaves_those_that_are(lower: float, upper: float) -> None:
    box, x = Box(lower, upper), torch.linspace(-20, 20, 4001, dtype=torch.float64)
    x = torch.cat((x[x < 0.76], torch.tensor([0.76], dtype=torch.float64), x[x > 0.76]))
    folded = box(x)
    assert folded.min() >= lower
    assert folded.max() <= upper
    inside = (x >= lower) & (x <= upper)
    assert torch.allclose(folded[inside], x[inside])
    assert (folded.diff().abs() <= x.diff().abs() + 1e-12).all()  # nowhere torn


def test_low_memory_is_the_published_procedure() -> None:
    """Its samples against the loop of Loshchilov et al. 2017, algorithm 2, lines 7 to 10 and 15 to 21."""
    method = cmaes(problem(30, budget=10**7), name="LMMA", sigma=0.5, dtype="float64")
    p = method.parameters
    m = len(method._paths)
    assert m == default_population_size(30)
    paths = torch.zeros(m, 30, dtype=torch.float64)
    c_d = [1 / (1.5**i * 30) for i in range(m)]
    c_c = [min(0.5, p.population_size / (4**i * 30)) for i in range(m)]
    for generation in range(25):
        z = method._noise.block(slice(None))
        d = z.clone()
        for j in range(min(generation, m)):
            d = (1 - c_d[j]) * d + c_d[j] * torch.outer(d @ paths[j], paths[j])
        assert torch.allclose(method._spread(z), d, rtol=1e-9, atol=1e-12)
        candidates = method.ask()
        losses = scored(candidates, rosenbrock)
        order = sorted(range(len(losses)), key=losses.__getitem__)
        step = sum(p.weights[rank] * z[index] for rank, index in enumerate(order))
        for i in range(m):
            paths[i] = (1 - c_c[i]) * paths[i] + math.sqrt(p.mu_eff * c_c[i] * (2 - c_c[i])) * step
        method.tell(candidates, losses)


def test_low_memory_holds_only_the_paths_that_a_budget_lets_matter() -> None:
    """A short run with all paths ends where one with few does."""
    short = cmaes(problem(2000, budget=800), name="LMMA", sigma=0.5, dtype="float64")
    whole = cmaes(problem(2000, budget=10**9), name="LMMA", sigma=0.5, dtype="float64")
    assert len(short._paths) < len(whole._paths) == default_population_size(2000)
    for method in (short, whole):
        generations(method, shifted(ellipsoid), 800 // short.parameters.population_size)
    moved = whole.recommend().norm()
    assert (short.recommend() - whole.recommend()).norm() < 1e-3 * moved
