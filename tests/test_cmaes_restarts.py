"""IPOP and BIPOP, by behaviour: what they find, their sizes, exact resumption, and what they declare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.optimizer import Problem, Stalled
from plugins.cmaes import cmaes
from tests.cmaes_problems import evaluations, generations, problem, rastrigin, shifted, sphere


def test_restarts_find_what_one_run_does_not() -> None:
    """Rastrigin's 10⁴ local optima: each doubled population sees further."""
    counts = {}
    for restarts in ("none", "ipop", "bipop"):
        method = cmaes(problem(4, 1), sigma=0.5, restarts=restarts, lower=-5, upper=4)
        try:
            counts[restarts] = evaluations(method, shifted(rastrigin), 1e-6, 60_000)
        except Stalled:
            counts[restarts] = math.inf
    assert counts["none"] == math.inf
    assert max(counts["ipop"], counts["bipop"]) < 60_000


@pytest.mark.parametrize(("scheme", "restarts"), [("ipop", 6), ("bipop", 12)])
def test_restarts_resume_bit_for_bit_and_recommend_the_best_run(scheme: str, restarts: int) -> None:
    def method() -> Any:
        return cmaes(problem(3, 4), sigma=0.5, restarts=scheme, lower=-5, upper=4)

    unbroken = method()
    while unbroken.restarts < 3:
        generations(unbroken, shifted(rastrigin), 7)
    restored = method()
    restored.load_state_dict(unbroken.state_dict())
    while unbroken.restarts < restarts:
        one, other = (generations(each, shifted(rastrigin), 20) for each in (unbroken, restored))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(unbroken.recommend(), restored.recommend())
    assert shifted(rastrigin)(unbroken.recommend().double()) < 2.0


def test_restarts_double_the_population() -> None:
    method = cmaes(problem(3), sigma=0.5, restarts="ipop")
    sizes = []
    while method.restarts < 3:
        if len(sizes) <= method.restarts:
            sizes.append(len(method.ask()))
        generations(method, sphere, 1)
    assert sizes == [7, 14, 28]


def test_bipop_spends_on_small_populations_as_much_as_on_doubled_ones() -> None:
    method = cmaes(problem(3), sigma=0.5, restarts="bipop")
    runs: dict[int, tuple[int, float]] = {}
    while method.restarts < 12:
        runs[method.restarts] = len(method.ask()), method._run.options.sigma
        generations(method, sphere, 1)
    large = [size for size, sigma in runs.values() if sigma == 0.5]
    small = [size for size, sigma in runs.values() if sigma < 0.5]
    assert large == [7 * 2**i for i in range(len(large))]
    assert len(small) > len(large)
    assert max(small) <= max(large) / 2
    assert min(small) >= 7


def test_restarts_declare_the_populations_they_may_grow_to() -> None:
    memory_bytes = cmaes.memory_bytes  # type: ignore[attr-defined]
    space = Problem(1000, "head", 100_000, 0)
    once, again = (memory_bytes(space, name="CMA", restarts=scheme) for scheme in ("none", "ipop"))
    assert again - once > 8 * 5 * 1000 * 5000  # of a generation of 24 · 2⁹


def test_orthogonal_samples_stay_so_when_the_population_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.cmaes.strategy.HELD", 30)
    monkeypatch.setattr("plugins.cmaes.sampling.HELD", 30)
    method = cmaes(problem(3), name="SepCMA", restarts="ipop", orthogonal=True)
    while not method.restarts:
        generations(method, sphere, 10)
    assert len(generations(method, sphere, 1)) == 14
