"""What a step costs: ``python -m benchmarks.step [--only NAME] [--json] [--device DEVICE]``.

Fresh BERTs of MiniLM's and BERT-base's shape: weights do not change what arithmetic costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import cache, partial
from typing import Any

import psutil
import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.harness import Row, interleaved, main, ratios
from benchmarks.published import PublishedMeZO
from pipeline import noise
from pipeline import space as spaces
from pipeline.engine.evaluator import Engine
from pipeline.optimizer import Move, Problem, Seeded
from pipeline.tasks.base import Batch
from pipeline.tasks.classification import TextClassifier
from pipeline.tasks.language_modelling import LanguageModel
from plugins.seeded import spsa

SHAPES: dict[str, dict[str, Any]] = {
    "22m": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "110m": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
# a step over two forwards: bare ones, or ones that share the engine's matrix products
RATIOS = {
    "step_ratio_22m": ("22m", "bare"),
    "step_ratio_22m_own_products": ("22m", "own"),
    "step_ratio_110m": ("110m", "bare"),
    "step_ratio_110m_own_products": ("110m", "own"),
}
# the head's candidates with features kept, against features computed for each candidate, or each step's batch
PREFIX = {"prefix_speedup": "each candidate", "prefix_speedup_within_step": "each step"}
CANDIDATES = 32
BATCH, TOKENS, MASKED = 16, 64, 0.15
PASSES = 10**7  # a budget that no benchmark spends, of a run long enough to compile for


def bert(shape: str) -> BertForMaskedLM:
    """A fresh masked language model in eval mode."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_attention_heads=12, **SHAPES[shape]))
    torch.nn.Module.eval(model)
    return model


def masked_batch(
    device: torch.device, examples: int = BATCH, tokens: int = TOKENS
) -> tuple[Batch, dict[str, torch.Tensor], torch.Tensor]:
    """Random tokens, 15% of them targets: as our batch, and as inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (examples, tokens), generator=generator)
    chosen = torch.rand(ids.shape, generator=generator) < MASKED
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    labels = torch.where(chosen, ids, -100).to(device)
    positions = chosen.flatten().nonzero().squeeze(-1).to(device)
    return Batch(inputs, labels.flatten()[positions], positions), inputs, labels


class Ours:
    """SPSA over every parameter, two forward passes a step."""

    def __init__(self, shape: str, device: torch.device, model: LanguageModel | None = None) -> None:
        self.model = (model or LanguageModel(bert(shape))).to(device)
        self.space = spaces.build(spaces.parse("full"), self.model, 0)
        self.engine = Engine(self.model, self.space, PASSES, run_seed=0)
        problem = Problem(self.space.size, self.space.kind, PASSES, 0, device)
        self.optimizer = spsa(problem, epsilon=1e-3, learning_rate=1e-6, directions=1)
        self.batch = masked_batch(device)[0]
        self._steps = 0

    def step(self) -> None:
        self.optimizer.step(self.engine.bind(self.batch, self._steps))
        self._steps += 1

    def two_forwards(self) -> None:
        """The same positions scored, twice, and nothing else, by the engine's own matrix products."""
        two_forwards(self.model, self.batch)


@torch.inference_mode()
def two_forwards(model: LanguageModel, batch: Batch) -> None:
    for _ in range(2):
        model(batch)


@cache
def step_seconds(shape: str, device: torch.device) -> dict[str, list[float]]:
    """A step, two bare forwards as transformers makes them, and two through the engine's products."""
    ours = Ours(shape, device)
    bare = LanguageModel(bert(shape)).to(device)
    work = {"step": ours.step, "bare": lambda: two_forwards(bare, ours.batch), "own": ours.two_forwards}
    ours.step()  # compiles
    seconds = interleaved(work, 25 if shape == "22m" else 9, device)
    ours.engine.close()
    return seconds


def step_ratio(shape: str, forwards: str, name: str, device: torch.device) -> Row:
    seconds = step_seconds(shape, device)
    return Row.of(name, "ratio", ratios(seconds["step"], seconds[forwards]))


def speedup_published(device: torch.device) -> Row:
    ours = Ours("22m", device)
    _, inputs, labels = masked_batch(device)
    published = PublishedMeZO(bert("22m"), device, 1e-3, 1e-6)
    seconds = interleaved(
        {"ours": ours.step, "published": lambda: published.step(inputs, labels, 1)}, 15, device
    )
    ours.engine.close()
    return Row.of("speedup_published_22m", "times", ratios(seconds["published"], seconds["ours"]))


def restore_error(device: torch.device) -> Row:
    """The largest change of any weight over steps at learning rate 0, in each dtype."""
    errors = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        small = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        model = LanguageModel(BertForMaskedLM(small)).to(device, dtype).eval()
        space = spaces.build(spaces.parse("full"), model, 0)
        engine = Engine(model, space, PASSES, run_seed=0)
        before = space.snapshot()
        batch = masked_batch(device)[0]
        for step in range(1000):
            engine.losses(batch, [Seeded(step, 1e-3), Seeded(step, -1e-3)])
            space.move(Move([step], [0.0], "rademacher", 0.0))
        engine.close()
        pairs = zip(before, space.snapshot(), strict=True)
        errors.append(max(float((a.double() - b.double()).abs().max()) for a, b in pairs))
    return Row.of("restore_error", "largest", errors)


def memory_over_inference(device: torch.device) -> Row:
    """Peak memory of steps above that of bare forwards, in units of the largest tensor, at 110M.

    Each in processes of its own, from the moment when the model is there.
    """
    above = [(_peak_of("step", device) - _peak_of("forwards", device)) for _ in range(3)]
    return Row.of("memory_over_inference", "layers", above)


def _peak_of(work: str, device: torch.device) -> float:
    code = f"from benchmarks.step import peak; print(peak({work!r}, {str(device)!r}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)


def peak(work: str, device: str) -> float:
    """How far memory grows while ``work`` is done, in units of the largest tensor."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = LanguageModel(bert("110m")).to(device)
    batch = masked_batch(torch.device(device))[0]
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    noise.add(zeros := torch.zeros(2**13), 1, 0, "rademacher", 1.0, out=zeros, fused=True)  # the compiler
    noise.add(zeros, 1, 0, "rademacher", 1.0, out=torch.zeros(2**13), fused=True)
    with Watched(torch.device(device)) as memory:
        if work == "step":
            ours = Ours("110m", torch.device(device), model)
            for _ in range(5):
                ours.step()
        else:
            for _ in range(5):
                two_forwards(model, batch)
    return memory.grown / largest


class Watched:
    """The growth of memory within a block, in bytes: sampled every millisecond where it is the process's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._most = 0.0
        self.grown = 0.0

    def __enter__(self) -> Watched:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.grown = max(self._most, self._now()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._most = max(self._most, self._now())

    def _now(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return psutil.Process().memory_info().rss


@cache
def head_seconds(device: torch.device) -> dict[str, list[float]]:
    """Seconds a candidate of a search of the head: with features kept, computed once a step, and for each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (64, TOKENS), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = torch.randint(2, (64,), generator=generator).to(device)
    model = TextClassifier(bert("22m").bert, 384, ["no", "yes"], pooled_layers=1).to(device).eval()
    engine = Engine(model, spaces.build(spaces.parse("head"), model, 0), PASSES, run_seed=0)
    kept = Batch(inputs, targets, examples=tuple(range(64)))
    drawn = Batch(inputs, targets)  # of no data set: nothing can be kept
    candidates = [Seeded(i, 0.1) for i in range(CANDIDATES)]
    work = {
        "kept": lambda: engine.losses(kept, candidates),
        "each step": lambda: engine.losses(drawn, candidates),
        "each candidate": lambda: engine.losses(drawn, candidates[:1]),
    }
    seconds = interleaved(work, 15, device)
    engine.close()
    for name in ("kept", "each step"):
        seconds[name] = [total / CANDIDATES for total in seconds[name]]
    return seconds


def prefix_speedup(uncached: str, name: str, device: torch.device) -> Row:
    seconds = head_seconds(device)
    return Row.of(name, "times", ratios(seconds[uncached], seconds["kept"]))


if __name__ == "__main__":
    main(
        {
            **{name: partial(step_ratio, *against, name) for name, against in RATIOS.items()},
            "speedup_published_22m": speedup_published,
            "restore_error": restore_error,
            "memory_over_inference": memory_over_inference,
            **{name: partial(prefix_speedup, uncached, name) for name, uncached in PREFIX.items()},
        }
    )
