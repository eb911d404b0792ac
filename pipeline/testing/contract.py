"""What every optimizer promises, each promise a test. An author overrides ``spec``, and claims if he must."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.registry import readable_bytes
from pipeline.testing.quadratic import Run, trained
from pipeline.trajectory import Trajectory

SLACK = 64 * 2**20  # bytes a process takes whatever its optimizer holds


class OptimizerContract:
    """Tests of the optimizer that ``spec`` names; its claims are class attributes.

    Attributes:
        evaluations: N, the forward passes within which the loss of the quadratic falls to ``reached`` of
            its start.
        reached: that share.
        dimension: the quadratic's.
        seeded: whether another seed gives another run.
        bears_nan: whether a loss that is not finite is borne, as the worst; else it ends the run in one line.
        replays: whether a run is its trajectory; false for methods that use gradients.
        memory_dimension: coordinates at which memory is measured.
    """

    evaluations: ClassVar[int] = 4000
    reached: ClassVar[float] = 1e-2
    dimension: ClassVar[int] = 10
    seeded: ClassVar[bool] = True
    bears_nan: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    memory_dimension: ClassVar[int] = 1_000_000

    @pytest.fixture
    def spec(self) -> str:
        """The optimizer as a user would write it: ``backend[:Name][,option=value…]``."""
        raise NotImplementedError("a contract needs the fixture 'spec', such as 'my-method,sigma=0.3'")

    def test_finds_the_optimum_of_a_quadratic(self, spec: str) -> None:
        start = Run(spec, self.dimension, self.evaluations).loss
        run, _ = trained(spec, self.dimension, self.evaluations)
        assert run.loss <= self.reached * start, (
            f"{self.evaluations} forward passes bring the loss to {run.loss / start:.3g} of its start, not "
            f"to {self.reached}: set the class's evaluations or reached to what the method claims"
        )

    def test_counts_forward_passes_exactly(self, spec: str) -> None:
        run = Run(spec, self.dimension, self.evaluations)
        run.steps(3)
        assert run.passes == run.engine.forward_passes > 0
        step = run.passes  # more than one step takes
        small = Run(spec, self.dimension, budget := 2 * step + 1)
        small.steps(budget + 1)
        assert small.passes == small.engine.forward_passes <= budget
        assert budget - small.passes < step, "it stops although there are passes for another step"

    @pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
    def test_a_loss_that_is_not_finite_is_never_the_best(self, spec: str, broken: float) -> None:
        run = Run(spec, self.dimension, self.evaluations, broken=[broken, math.nan])
        start = run.loss
        if not self.bears_nan:
            with pytest.raises(UserError) as caught:
                run.steps(self.evaluations)
            assert "\n" not in str(caught.value)
        else:
            run.steps(self.evaluations)
            assert run.loss < start
        assert bool(torch.isfinite(run.weights).all())

    def test_writes_into_nothing_it_gave_or_got(self, spec: str) -> None:
        run = Run(spec, self.dimension, self.evaluations)
        run.steps(5)
        assert not run.altered, "a candidate or a list of losses was changed after it had been given or got"

    def test_leaves_global_random_state_alone(self, spec: str) -> None:
        Run(spec, self.dimension, 100)  # importing may draw
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        expected = torch.rand(2).tolist(), np.random.random(2).tolist(), random.random()
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        Run(spec, self.dimension, self.evaluations).steps(3)
        assert (torch.rand(2).tolist(), np.random.random(2).tolist(), random.random()) == expected

    def test_equal_seeds_give_equal_runs(self, spec: str) -> None:
        runs = [Run(spec, self.dimension, self.evaluations, seed) for seed in (1, 1, 2)]
        losses = [[report.loss for report in run.steps(5)] for run in runs]
        assert losses[0] == losses[1]
        assert torch.equal(runs[0].weights, runs[1].weights)
        same = torch.equal(runs[0].weights, runs[2].weights)
        assert not (self.seeded and same), "another run_seed gives the same run: is problem.run_seed used?"

    def test_state_round_trips_to_the_bit(self, spec: str) -> None:
        run = Run(spec, self.dimension, self.evaluations)
        run.steps(4)
        state = _copied(run.optimizer.state_dict())
        other = Run(spec, self.dimension, self.evaluations)
        other.optimizer.load_state_dict(_copied(state))
        again = other.optimizer.state_dict()
        differing = [key for key in {**state, **again} if not _same(again.get(key), state.get(key))]
        assert not differing, f"load_state_dict does not bring back {', '.join(map(str, differing))}"
        _move_to(other, run)
        expected = [report.loss for report in run.steps(4)]
        found = [report.loss for report in other.steps(4)]
        assert found == expected, "after load_state_dict the method goes on otherwise: state is missing"
        assert torch.equal(other.weights, run.weights)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_a_resumed_run_equals_an_unbroken_one(self, spec: str, share: float, tmp_path: Path) -> None:
        path = tmp_path / "trajectory.jsonl"
        budget = min(self.evaluations, 400)
        if not self.replays:
            trained(spec, self.dimension, budget, path)
            _cut(path, share)
            with pytest.raises(UserError, match="gradient"):
                trained(spec, self.dimension, budget, path, resume=True)
            return
        unbroken, _ = trained(spec, self.dimension, budget, path)
        whole = path.read_text(encoding="utf-8")
        fresh = Run(spec, self.dimension, budget)
        fresh.engine.close()
        Trajectory.read(path).replay(fresh.space)
        assert torch.equal(fresh.weights, unbroken.weights), (
            "replayed from its trajectory, a run ends elsewhere"
        )
        _cut(path, share)
        resumed, _ = trained(spec, self.dimension, budget, path, resume=True)
        assert torch.equal(resumed.weights, unbroken.weights)
        assert _without_seconds(path.read_text(encoding="utf-8")) == _without_seconds(whole)

    def test_takes_no_more_memory_than_it_declares(self, spec: str) -> None:
        command = [sys.executable, "-P", "-m", "pipeline.testing.memory", spec, str(self.memory_dimension)]
        mapped = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536"
        }  # glibc keeps no freed tensor: a peak is one
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=mapped)
        assert done.returncode == 0, done.stderr
        declared, taken = json.loads(done.stdout)
        assert taken <= declared + SLACK, (
            f"takes {readable_bytes(taken)} for {self.memory_dimension:,} coordinates and declares "
            f"{readable_bytes(declared)}: say so in memory_bytes(problem, **options), or hold less"
        )


def _cut(path: Path, share: float) -> None:
    """What a kill leaves after that share of the file: whole lines, and a torn one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = max(1, int(share * (len(lines) - 1)))
    path.write_text("".join(lines[:kept]) + lines[kept][:7], encoding="utf-8")


def _without_seconds(trajectory: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in trajectory.splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _move_to(run: Run, other: Run) -> None:
    """Puts a run where another is: its weights and what it has spent."""
    run.space.restore(other.space.snapshot())
    run.engine.forward_passes = other.engine.forward_passes


def _copied(state: Any) -> Any:
    """A copy that shares nothing; state is plain data and tensors."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value) for value in state]
    if isinstance(state, Tensor):
        return state.clone()
    assert isinstance(state, int | float | str | bool | bytes | None), (
        f"state_dict holds a {type(state).__name__}; it must be numbers, texts, lists, dicts and tensors"
    )
    return state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other) or (one != one and other != other)
