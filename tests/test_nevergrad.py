"""The nevergrad backend, by behaviour: every family improves, runs repeat and resume, mistakes read well.

The names are one or two of each family of nevergrad's registry, and those that FIELD.md section 3 warns of.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.nevergrad_names import attempt, checked
from pipeline.errors import UserError
from pipeline.optimizer import AskTell, Problem
from pipeline.registry import Spec, Variant, create
from plugins.nevergrad import WORST_LOSS, Nevergrad
from plugins.nevergrad.catalogue import OTHER
from plugins.nevergrad.enclosure import ARCHIVE_BYTES

FAMILIES = [
    "OnePlusOne",
    "DiscreteLenglerOnePlusOne",
    "DE",
    "TwoPointsDE",
    "PSO",
    "CMA",
    "DiagonalCMA",
    "TBPSA",
    "ES",
    "Powell",
    "Cobyla",
    "SQP",
    "ChainDE",
    "MetaModel",
    "NGOpt",
    "ScrHammersleySearch",
]
RESUMED = [
    "OnePlusOne",
    "DE",
    "TwoPointsDE",
    "PSO",
    "CMA",
    "NGOpt",
    "StupidRandom",
    "Powell",
    "CmaFmin2",
    "Carola9",
]
# one of them misses a package; benchmarks.nevergrad_names tries every name
SAMPLE = random.Random(5).sample(Nevergrad.variants(), 25)


def problem(size: int = 20, forward_passes: int = 300, seed: int = 0) -> Problem:
    return Problem(size, "projection", forward_passes, seed)


def quadratic(x: Tensor) -> float:
    return float((x.double() + 0.3).square().sum())


def run(method: Nevergrad, asks: int, function: Callable[[Tensor], float] = quadratic) -> Tensor:
    """Every candidate of ``asks`` asks: ``[asks · num_workers, size]``."""
    seen = []
    for _ in range(asks):
        candidates = method.ask()
        seen += [candidate.coordinates.clone() for candidate in candidates]
        method.tell(candidates, [function(candidate.coordinates) for candidate in candidates])
    return torch.stack(seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_improves_on_a_quadratic(name: str) -> None:
    method = Nevergrad(problem(), name=name)
    run(method, 200)
    assert quadratic(method.recommend()) < 0.95 * quadratic(torch.zeros(20))


def test_fills_in_the_protocol() -> None:
    method = Nevergrad(problem(7), name="DE", num_workers=3)
    assert isinstance(method, AskTell)
    assert torch.equal(method.recommend(), torch.zeros(7))
    candidates = method.ask()
    assert [c.coordinates.shape for c in candidates] == [(7,)] * 3
    assert len({tuple(c.coordinates.tolist()) for c in candidates}) == 3
    assert all(c.coordinates.dtype == torch.float32 for c in candidates)
    assert all(
        torch.equal(a.coordinates, b.coordinates) for a, b in zip(candidates, method.ask(), strict=True)
    )
    with pytest.raises(ValueError, match="3 candidates asked"):
        method.tell(candidates[:1], [0.0])
    method.tell(candidates, [0.0, 1.0, 2.0])
    assert method.recommend().dtype == torch.float32


def test_sigma_is_the_unit_of_length() -> None:
    def spread(sigma: float) -> float:
        return float(run(Nevergrad(problem(50), name="OldCMA", sigma=sigma), 10).std())

    assert spread(0.2) == pytest.approx(0.2, rel=0.2)
    assert spread(0.002) == pytest.approx(0.002, rel=0.2)


@pytest.mark.parametrize("name", RESUMED)
def test_a_restored_run_goes_on_bit_for_bit(name: str) -> None:
    unbroken = Nevergrad(problem(), name=name)
    run(unbroken, 30)
    unbroken.recommend()  # asked of one run and not of the other: must not show
    state = json.loads(json.dumps(unbroken.state_dict()))
    expected = run(unbroken, 30)
    restored = Nevergrad(problem(), name=name)
    np.random.random(3)  # what others draw must not show either
    restored.load_state_dict(state)
    assert torch.equal(run(restored, 30), expected)
    assert torch.equal(restored.recommend(), unbroken.recommend())


def test_restores_over_a_run_and_with_several_workers() -> None:
    options: dict[str, Any] = {"name": "PSO", "num_workers": 4, "popsize": 8}
    unbroken = Nevergrad(problem(), **options)
    run(unbroken, 6)
    state = unbroken.state_dict()
    expected = run(unbroken, 6)
    unbroken.load_state_dict(state)
    assert torch.equal(run(unbroken, 6), expected)


def test_runs_depend_on_their_seed_alone() -> None:
    first = run(Nevergrad(problem(seed=1), name="TwoPointsDE"), 40)
    assert torch.equal(first, run(Nevergrad(problem(seed=1), name="TwoPointsDE"), 40))
    assert not torch.equal(first, run(Nevergrad(problem(seed=2), name="TwoPointsDE"), 40))


@pytest.mark.parametrize("name", ["RotatedTwoPointsDE", "CmaFmin2", "Carola9", "PolyLN", "OnePlusOne"])
def test_global_state_is_as_before(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The first four draw from numpy's global generator, two of them in a thread."""
    import cma
    from nevergrad.optimization.recaster import SequentialRecastOptimizer
    from nevergrad.optimization.utils import Pruning

    torch_state, filters = torch.get_rng_state(), list(warnings.filters)
    defaults, pruning = dict(cma.CMAOptions.defaults()), Pruning.sensible_default
    asking = SequentialRecastOptimizer._internal_ask_candidate
    np.random.seed(123)
    expected = np.random.random(4).tolist()
    np.random.seed(123)
    method = Nevergrad(problem(), name=name)
    run(method, 60)
    method.recommend()
    assert np.random.random(4).tolist() == expected
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert warnings.filters == filters
    assert defaults == cma.CMAOptions.defaults()
    assert Pruning.sensible_default == pruning
    assert SequentialRecastOptimizer._internal_ask_candidate == asking
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["OnePlusOne", "CMA", "PSO", "DE"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(name: str, bad: float) -> None:
    method = Nevergrad(problem(), name=name)

    def fails_left(x: Tensor) -> float:
        return bad if float(x[0]) < -0.05 else quadratic(x)

    run(method, 120, fails_left)
    assert quadratic(method.recommend()) < quadratic(torch.zeros(20))
    assert float(method.recommend()[0]) >= -0.05
    assert max(max(losses) for losses in method.state_dict()["losses"]) == WORST_LOSS


def test_losses_reach_nevergrad_as_floats() -> None:
    method, told = Nevergrad(problem(), name="OnePlusOne", num_workers=3), []
    method._optimizer.register_callback("tell", lambda _optimizer, _point, loss: told.append(loss))
    given: list[Any] = [np.float32(1.5), torch.tensor(2.5), 3]
    method.tell(method.ask(), given)
    assert told == [1.5, 2.5, 3.0]
    assert {type(loss) for loss in told} == {float}


@pytest.mark.parametrize("name", ["CMA", "OldCMA", "DiagonalCMA"])
def test_cma_works_from_300_dimensions_with_tells_across_generations(name: str) -> None:
    method = Nevergrad(problem(320, 120), name=name, num_workers=2)
    run(method, 60)
    assert quadratic(method.recommend()) < quadratic(torch.zeros(320))


@pytest.mark.parametrize("name", ["NGOpt", "LHSSearch", "RandomSearch", "CMA"])
def test_asks_to_the_last_forward_pass_and_a_step_beyond(name: str) -> None:
    run(Nevergrad(problem(5, 30), name=name), 31)


def test_archives_are_bounded_in_a_large_space() -> None:
    size = ARCHIVE_BYTES // 16 // 6
    method = Nevergrad(problem(size), name="OnePlusOne")
    run(method, 12)
    assert 1 <= len(method._optimizer.archive) <= 6


def test_accepts_the_name_that_ends_in_a_space() -> None:
    method = Nevergrad(problem(), name="UltraSmoothDiscreteLognormalOnePlusOne")
    assert method.name == "UltraSmoothDiscreteLognormalOnePlusOne"


def test_options_reach_the_optimizer() -> None:
    def repeats(**options: Any) -> bool:
        return torch.equal(run(Nevergrad(problem(), name="DE", **options), 80), default)

    default = run(Nevergrad(problem(), name="DE"), 80)
    assert repeats(crossover=0.5)  # its default
    assert not repeats(crossover=0.9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "write nevergrad:<Name>, e.g. nevergrad:OnePlusOne"),
        ({"name": "OnePlusOn"}, "did you mean 'OnePlusOne'"),
        ({"name": "oneplusone"}, "did you mean 'OnePlusOne'"),
        ({"name": "qwxzv"}, "unknown nevergrad optimizer 'qwxzv'"),
        ({"name": "DE", "popsiz": 3}, "has no option 'popsiz'; did you mean 'popsize'"),
        ({"name": "DE", "popsize": "abc"}, "nevergrad:DE failed with"),
        ({"name": "CMA", "zzz": 3}, "no option 'zzz'; it takes num_workers, sigma"),
        ({"name": "Powell", "num_workers": 2}, "Powell works on one candidate at a time"),
        ({"name": "DE", "num_workers": 0}, "num_workers must be at least 1"),
        ({"name": "DE", "sigma": -1.0}, "sigma must be positive"),
    ],
)
def test_refuses_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Nevergrad(problem(), **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "needed"), [("AX", "ax-platform"), ("AXP", "ax-platform"), ("FCMA", "fcmaes")]
)
def test_a_missing_library_is_named(
    name: str, needed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in ("ax", "fcmaes"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed, should it be
    with pytest.raises(UserError, match=f"needs {needed}, which is not installed") as caught:
        Nevergrad(problem(), name=name).ask()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # nevergrad prints of AXP


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DS9", "nevergrad:DS9 works on one candidate at a time; leave num_workers at 1"),
        ("Carola3", "nevergrad:Carola3 failed with AssertionError: .*…; choose another optimizer"),
    ],
)
def test_what_only_fails_with_several_workers_is_one_short_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(Nevergrad(problem(6, 60), name=name, num_workers=2), 30)
    assert len(str(caught.value)) < 300


def test_a_failure_inside_nevergrad_is_one_line() -> None:
    method = Nevergrad(problem(5, 10), name="LHSSearch")
    with pytest.raises(UserError, match="nevergrad:LHSSearch failed with AssertionError: Over the budget"):
        run(method, 100)


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda variant: variant.name)
def test_runs_or_refuses_as_listed(variant: Variant) -> None:
    kind, line = checked(variant, *attempt(variant.name))
    assert kind in ("ran", "refused"), line


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda variant: variant.name)
def test_takes_the_options_that_it_lists_and_no_other(variant: Variant) -> None:
    with pytest.raises(UserError, match="needs ") if variant.note.startswith("needs") else nullcontext():
        create(Spec("nevergrad", variant.name, variant.options), problem())
    with pytest.raises(UserError, match=f"optimizer 'nevergrad:{variant.name}' has no option 'optimizers_'"):
        create(Spec("nevergrad", variant.name, {"optimizers_": 1}), problem())


def test_lists_every_name_once_by_family() -> None:
    import nevergrad

    variants = Nevergrad.variants()
    names = [variant.name for variant in variants]
    assert sorted(names) == sorted(name.strip() for name in nevergrad.optimizers.registry)
    families = list(dict.fromkeys(variant.family for variant in variants))
    assert 8 <= len(families) <= 20
    assert families[-1] == OTHER
    assert sum(variant.family == OTHER for variant in variants) < 10
    by_name = {variant.name: variant for variant in variants}
    assert by_name["TwoPointsDE"].family == "differential evolution"
    assert by_name["CMA"].family == by_name["DiagonalCMA"].family == "CMA"
    assert by_name["NGOpt"].family == "chosen by dimension and budget"
    assert by_name["DE"].options["crossover"] == 0.5
    assert "optimizers" not in by_name["ChainDE"].options  # classes: nobody can write them in a spec
    assert json.loads(json.dumps([variant.options for variant in variants]))


def test_notes_which_names_take_one_candidate_at_a_time() -> None:
    alone = [variant.name for variant in Nevergrad.variants() if variant.note == "one candidate at a time"]
    assert {"Powell", "Cobyla", "SQP"} < set(alone)
    for name in alone:
        with pytest.raises(UserError, match="one candidate at a time"):
            Nevergrad(problem(), name=name, num_workers=2)


def test_a_name_in_the_wrong_case_is_suggested_in_one_line() -> None:
    names = {variant.name for variant in Nevergrad.variants()}
    for name in names:
        if name.lower() not in names:
            with pytest.raises(UserError, match=f"(?i)did you mean '{name}'") as caught:
                Nevergrad(problem(), name=name.lower())
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 200


def test_no_thread_waits_for_a_loss_that_its_chain_dropped() -> None:
    """In a process of its own, which would never end. NGOptF chooses a portfolio of chains here."""
    script = """
from pipeline.optimizer import Problem
from plugins.nevergrad import Nevergrad
method = Nevergrad(Problem(6, "projection", 40, 0), name="NGOptF")
for _ in range(40):
    method.tell(method.ask(), [1.0])
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_declares_memory_by_family() -> None:
    whole = Problem(22_700_000, "full", 10_000, 0)
    assert Nevergrad.memory_bytes(whole, name="CMA", sigma=0.1) > 2**50
    assert Nevergrad.memory_bytes(whole, name="NGOpt") > 2**50
    assert 2**31 < Nevergrad.memory_bytes(whole, name="OnePlusOne") < 2**33
    assert Nevergrad.memory_bytes(problem(1000), name="CMA") < 2**28
    with pytest.raises(UserError, match="did you mean 'TBPSA'"):
        Nevergrad.memory_bytes(whole, name="TBPSB")


def test_the_process_ends_though_a_thread_waits_and_takes_little_memory() -> None:
    """In a process of its own: nevergrad's own Powell would keep it from ending."""
    script = """
import psutil, torch
from pipeline.optimizer import Problem
from plugins.nevergrad import Nevergrad
powell = Nevergrad(Problem(20, "projection", 100, 0), name="Powell")
powell.tell(powell.ask(), [0.0])
size, memory = 1_000_000, psutil.Process().memory_info
before = memory().rss
method = Nevergrad(Problem(size, "full", 100, 0), name="OnePlusOne")
for step in range(10):
    method.tell(method.ask(), [float(step % 3)])
print((memory().rss - before) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) < 400
    assert done.stderr == ""
