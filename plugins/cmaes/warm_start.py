"""A search distribution from points scored before: WS-CMA-ES (Nomura et al. 2021, arXiv 2012.06932)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import AskTell, AskTellOptimizer, Explicit, Problem
from pipeline.registry import Spec, create
from pipeline.space import Space
from pipeline.trajectory import Trajectory, redo
from plugins.cmaes.strategy import CMAES

BEST = 0.1  # γ: the share of points that the distribution is fitted to
PRIOR = 0.1  # α, of σ: the deviation of each point's own Gaussian
MOST = 256  # points kept
SEEDED = ("projection", "prompt", "lora")  # spaces that the seed draws


def warmed(method: CMAES, problem: Problem, path: str) -> CMAES:
    """``method`` started from the better points of the trajectory at ``path``.

    Raises:
        UserError: there is none, it is over another space, or it holds no points.
    """
    trajectory = Trajectory.read(Path(path))
    header = trajectory.header
    if (header.size, header.problem(problem.device).space) != (problem.size, problem.space):
        raise UserError(
            f"warm_start: {path} is over {header.space} ({header.size:,} coordinates), the search over "
            f"{problem.space} ({problem.size:,})"
        )
    if problem.space in SEEDED and header.run_seed != problem.run_seed:
        raise UserError(
            f"warm_start: {path} has seed {header.run_seed}, the search {problem.run_seed}, and the space "
            f"{problem.space} is drawn from it: its coordinates would mean something else"
        )
    return fitted(method, _points(trajectory, problem))


def fitted(method: CMAES, scored: Iterator[tuple[float, Tensor]] | Sequence[tuple[float, Tensor]]) -> CMAES:
    """``method`` started from the better of ``scored``: losses, and points ``[size]``.

    m is the mean of the best γ of them (at most `MOST`), σ² C their covariance plus α² I: equations 8 and 9
    of the paper, with α a share of σ. The new σ makes the variances of C have a geometric mean of 1.

    Raises:
        UserError: fewer than two points.
    """
    best: list[tuple[float, int, Tensor]] = []
    count = 0
    for loss, point in scored:
        count += 1
        if not math.isfinite(loss):
            continue
        heapq.heappush(best, (-loss, -count, point))
        if len(best) > MOST:
            heapq.heappop(best)
    keep = min(len(best), max(2, math.ceil(BEST * count)))
    if keep < 2:
        raise UserError("warm_start: the trajectory holds fewer than two points whose loss is finite")
    like = method._mean
    chosen = torch.stack([point.to(like) for _, _, point in heapq.nlargest(keep, best)])
    method._mean.copy_(chosen.mean(0))
    deviations = (chosen - method._mean) / math.sqrt(keep)
    prior = PRIOR * method.sigma
    variances = deviations.square().sum(0) + prior**2
    sigma = float(
        variances.log().mean().div(2).exp()
    )  # of the diagonal: its determinant is had in any dimension
    method.warm(sigma, deviations / sigma, prior / sigma)
    return method


def _points(trajectory: Trajectory, problem: Problem) -> Iterator[tuple[float, Tensor]]:
    """The points of a run, with their losses above the start point's on the same batch."""
    header = trajectory.header
    optimizer = create(Spec.parse(header.optimizer), header.problem(problem.device), header.defaults)
    if not isinstance(optimizer, AskTellOptimizer):
        raise UserError(
            f"warm_start: a run of {header.optimizer} scored no points; take one of cmaes or nevergrad"
        )
    noting = _Noting(optimizer.method)
    optimizer.method = noting
    for step in trajectory.steps:
        redo([step], cast(Space, _Nowhere()), optimizer)
        yield from noting.scored
        noting.scored.clear()


class _Noting:
    """An `AskTell` that notes what it is told."""

    def __init__(self, method: AskTell) -> None:
        self.scored: list[tuple[float, Tensor]] = []
        self.ask, self.recommend = method.ask, method.recommend
        self.state_dict, self.load_state_dict = method.state_dict, method.load_state_dict
        self._method = method

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        self.scored += zip(losses, (candidate.coordinates for candidate in candidates), strict=True)
        self._method.tell(candidates, losses)


class _Nowhere:
    """A space without weights: only the points are of interest."""

    def place(self, coordinates: Tensor) -> None:
        pass
