"""A search that begins where the better points of an earlier one lie, by behaviour on a quadratic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.optimizer import Problem
from pipeline.testing.quadratic import Run, trained
from plugins.cmaes import VARIANTS, cmaes
from plugins.cmaes.full import CMA
from plugins.cmaes.options import Options
from plugins.cmaes.warm_start import fitted

SIZE = 10


def over_the_quadratic(size: int = SIZE) -> Problem:
    return Problem(size, "full", 4000, 1)


def run_of(spec: str, folder: Path) -> Path:
    """The trajectory of 300 evaluations."""
    path = folder / "trajectory.jsonl"
    trained(spec, SIZE, 300, path)
    return path


@pytest.mark.parametrize("before", ["cmaes:SepCMA,sigma=0.3", "nevergrad:DE"])
@pytest.mark.parametrize("name", VARIANTS)
def test_begins_nearer_to_the_optimum_and_goes_on(before: str, name: str, tmp_path: Path) -> None:
    path = run_of(before, tmp_path)
    cold, warm = Run(f"cmaes:{name}", SIZE, 400), Run(f"cmaes:{name},warm_start={path}", SIZE, 400)
    start = cold.loss
    cold.steps(1)
    warm.steps(1)
    assert warm.loss < 0.7 * cold.loss
    warm.steps(400)
    assert warm.loss < 0.1 * start


def test_fits_the_best_points_as_published() -> None:
    """Mean and covariance of the best tenth, plus the prior's: Nomura et al. 2021, equations 8 and 9."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0])
    losses = points[:, 0].tolist()
    method = CMA(over_the_quadratic(3), Options(sigma=0.5, dtype="float64"))
    fitted(
        method, [(loss, point) for loss, point in zip(losses, points, strict=True)] + [(-math.inf, points[0])]
    )
    best = points[points[:, 0].argsort()[:21]]  # of 201
    wanted = torch.cov(best.T, correction=0) + 0.05**2 * torch.eye(3)
    assert torch.allclose(method.recommend(), best.mean(0))
    assert torch.allclose(method.sigma**2 * method._covariance, wanted)
    assert method._covariance.diagonal().log().sum() == pytest.approx(0, abs=1e-9)
    z = torch.eye(3, dtype=torch.float64)
    spread = method._spread(z)
    assert torch.allclose(spread.T @ spread, method._covariance)


def test_refuses_another_space_a_run_without_points_and_too_few(tmp_path: Path) -> None:
    path = run_of("cmaes:SepCMA", tmp_path)
    with pytest.raises(UserError, match=r"is over full.* \(10 coordinates\)"):
        cmaes(over_the_quadratic(11), warm_start=str(path))
    header, rest = path.read_text(encoding="utf-8").split("\n", 1)
    path.write_text("\n".join([json.dumps({**json.loads(header), "space": "prompt"}), rest]), "utf-8")
    seed = json.loads(header)["run_seed"]
    with pytest.raises(UserError, match=f"has seed {seed}, the search {seed + 1}, and the space prompt"):
        cmaes(Problem(SIZE, "prompt", 4000, seed + 1), warm_start=str(path))
    cmaes(Problem(SIZE, "prompt", 4000, seed), warm_start=str(path))
    seeded = run_of("spsa", tmp_path)
    with pytest.raises(UserError, match="a run of spsa scored no points"):
        cmaes(over_the_quadratic(), warm_start=str(seeded))
    with pytest.raises(UserError, match="fewer than two points"):
        fitted(CMA(over_the_quadratic()), [(math.nan, torch.zeros(SIZE))])


def test_a_warm_run_is_replayed_and_resumed_from_both_files(tmp_path: Path) -> None:
    path = run_of("cmaes:SepCMA,sigma=0.3", tmp_path)
    spec, own = f"cmaes:CMA,warm_start={path}", tmp_path / "warm.jsonl"
    unbroken, _ = trained(spec, SIZE, 300, own)
    lines = own.read_text(encoding="utf-8").splitlines(keepends=True)
    own.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    resumed, _ = trained(spec, SIZE, 300, own, resume=True)
    assert torch.equal(resumed.weights, unbroken.weights)
