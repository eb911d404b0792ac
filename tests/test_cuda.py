"""What must be alike on a GPU: noise and moves to the bit, losses to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import noise
from pipeline.engine.evaluator import Engine
from pipeline.optimizer import Candidate, LowRank, Move, Seeded
from pipeline.registry import free_bytes
from pipeline.trajectory import machine
from tests.test_engine import classifier, searched

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_memory_that_torch_keeps_is_free() -> None:
    before = free_bytes(CUDA)
    held = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    assert before - free_bytes(CUDA) >= 2**28
    del held
    assert before - free_bytes(CUDA) < 2**26  # its blocks are not given back, but used again


def test_a_machine_is_told_with_its_gpu() -> None:
    assert machine(CUDA)["gpu"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("law", noise.LAWS)
def test_noise_has_the_same_bits(law: str) -> None:
    assert torch.equal(
        noise.direction(9, 17, 10_000, law, CPU), noise.direction(9, 17, 10_000, law, CUDA).cpu()
    )
    values = torch.randn(7777, generator=torch.Generator().manual_seed(0))
    expected = noise.add(values, 5, 64, law, 1e-3, out=torch.empty_like(values))
    for fused in (False, True):
        there = values.to(CUDA)
        assert torch.equal(noise.add(there, 5, 64, law, 1e-3, out=there, fused=fused).cpu(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True])
def test_moves_have_the_same_bits(dtype: str, fused: bool, bert: Path) -> None:
    moves = [Move([i], [0.01 * i], law) for law in noise.LAWS for i in range(12)]
    moves += [Move([1, 2], [0.01, 0.02], "rademacher", decay=0.1)]
    digests = []
    for device in (CPU, CUDA):
        model, _ = classifier(bert, dtype)
        space = searched("full", model.to(device))
        space.fused = fused
        space.move(*moves)
        digests.append(space.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("text", ["full", "head"])
def test_losses_are_those_of_the_cpu(text: str, bert: Path) -> None:
    candidates: list[Candidate] = [Seeded(i, 0.05, "gaussian") for i in range(3)]
    candidates += [Seeded(i, 0.05, "gaussian", LowRank(2)) for i in range(3)]
    losses = []
    for device in (CPU, CUDA):
        model, batch = classifier(bert)
        engine = Engine(model, searched(text, model.to(device)), 100, run_seed=0)
        losses.append(engine.bind(batch, 0).losses(candidates))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
