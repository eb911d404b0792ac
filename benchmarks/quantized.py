"""What 8 and 4 bits cost and save: ``python -m benchmarks.quantized [--only NAME] [--json]``.

SmolLM2-135M as examples/sentiment-smollm2.yaml has it: its bytes, memory, time, what it says of 200 held-out
sentences in the template, and what a short run of SPSA over LoRA's factors makes of the same sentences' loss.
The package holds SmolLM2 in 4 bits (GGUF Q4_1) already, so that ``int4`` finds values that fit its grid.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import psutil
import torch

from benchmarks.harness import Row, interleaved, main, ratios
from pipeline import config, start
from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.engine.evaluator import Engine
from pipeline.layout import Layout
from pipeline.measuring.evaluation import measure
from pipeline.models.loading import pass_through
from pipeline.models.quantized import FORMATS
from pipeline.optimizer import Seeded
from pipeline.peak_memory import PeakMemory
from pipeline.tasks.base import Batch, Start
from pipeline.trainer import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "sentiment-smollm2.yaml"
DTYPES = ("float32", *FORMATS)
SENTENCES, PASSES = 200, 100
EXAMPLES, TOKENS = 8, 64  # of the forward pass that is timed
UNITS = {
    "weights": "MiB",
    "memory_loading": "MiB",
    "memory_training": "MiB",
    "zero_shot_accuracy": "share",
    "loss_before": "nats",
    "loss_after": "nats",
}


def example(dtype: str, device: str) -> Config:
    """The example's configuration with its weights held in ``dtype``, cut short."""
    read = config.read(EXAMPLE)
    finetune = replace(read.finetune, forward_passes=PASSES, evaluate_every=PASSES)
    sizes = replace(read.prepare, test_size=SENTENCES)
    return replace(read, dtype=dtype, device=device, prepare=sizes, finetune=finetune)


@cache
def _layout() -> Layout:
    """The data and the model as the first two stages leave them; they go with the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    layout, chosen = Layout(Path(folder.name)), example("float32", "cpu")
    prepare(chosen, layout)
    pass_through(chosen.model, layout.pretrained, 0)
    return layout


@cache
def _figures(dtype: str, device: torch.device) -> dict[str, float]:
    """`figures`, in a process of its own: memory is the process's."""
    root = str(_layout().root)
    code = f"from benchmarks.quantized import figures; figures({dtype!r}, {str(device)!r}, {root!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(dtype: str, device: str, root: str) -> None:
    """Prints the figures of ``UNITS`` as JSON; memory is what the process has grown by."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    chosen, on = example(dtype, device), torch.device(device)
    before = 0.0 if on.type == "cuda" else psutil.Process().memory_info().rss / 2**20
    with PeakMemory(on) as loading:
        begin = start.begin(chosen, Layout(Path(root)), "finetune", None)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in begin.model.state_dict().values()}
    zero_shot = measure(begin.model, begin.test)
    with PeakMemory(on) as training:
        _train(chosen, begin)
    made = {
        "weights": sum(held.values()) / 2**20,
        "memory_loading": loading.mib - before,
        "memory_training": training.mib - before,
        "zero_shot_accuracy": zero_shot["accuracy"],
        "loss_before": zero_shot["loss"],
        "loss_after": measure(begin.model, begin.test)["loss"],
    }
    print(json.dumps(made))


def _train(chosen: Config, begin: Start) -> None:
    space = start.space(chosen.finetune, chosen, begin.model)
    training = start.training(chosen.finetune, chosen)
    train(training, begin.model, space, begin.batch, lambda: {"loss": 0.0})


def row(dtype: str, figure: str, device: torch.device) -> Row:
    return Row.of(f"{figure}_{dtype}", UNITS[figure], [_figures(dtype, device)[figure]])


@cache
def _seconds(device: torch.device) -> dict[str, list[float]]:
    """One candidate of LoRA's factors on random tokens, in each dtype."""
    ids = torch.randint(1000, 30000, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, torch.zeros(EXAMPLES, dtype=torch.long)).to(device)
    work = {dtype: partial(_forward, _model(dtype, device), batch) for dtype in DTYPES}
    return interleaved(work, 11, device)


def _model(dtype: str, device: torch.device) -> Engine:
    chosen = example(dtype, str(device))
    begin = start.begin(chosen, _layout(), "finetune", None)
    space = start.space(chosen.finetune, chosen, begin.model)
    return Engine(begin.model, space, 10**6, run_seed=0)


def _forward(engine: Engine, batch: Batch) -> None:
    engine.losses(batch, [Seeded(1, 0.01)])


def forward(dtype: str, device: torch.device) -> Row:
    """What a forward pass over weights in ``dtype`` takes beside one over float32."""
    seconds = _seconds(device)
    return Row.of(f"forward_{dtype}_over_float32", "ratio", ratios(seconds[dtype], seconds["float32"]))


if __name__ == "__main__":
    rows = {f"{figure}_{dtype}": partial(row, dtype, figure) for figure in UNITS for dtype in DTYPES}
    main({**rows, **{f"forward_{dtype}_over_float32": partial(forward, dtype) for dtype in FORMATS}})
