"""What a pair of forward passes can gain in each space: ``python -m benchmarks.spaces CONFIG [SPACE …]``.

At the start of a configuration's fine-tuning (of its pretraining where it has no task), by forward passes.
The same directions z on two batches give ‖∇L‖², the mean of the slopes' products; ν, what a batch's noise
adds to their squares; and tr H, the mean curvature along z. A step of two-point SPSA with one direction then
gains at best ‖∇L‖⁴ / (2 (‖∇L‖² + ν) tr H), at the rate ‖∇L‖² / ((‖∇L‖² + ν) tr H), to second order; with n
directions both are n times that, while n is far below d. It is of the start: a run flattens the steepest
directions first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import note
from pipeline import config, start
from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.engine.evaluator import Engine
from pipeline.layout import Layout
from pipeline.models.loading import choose_device, pass_through
from pipeline.noise import derive
from pipeline.optimizer import Seeded
from pipeline.runs import preflight
from plugins.seeded.two_point import TwoPoint

SPACES = ("full", "norms", "lora,rank=8", "prompt,tokens=10,dimension=500")


@dataclass(frozen=True)
class Chance:
    """A space at the start: coordinates, ε, the loss (nats), and what the directions told."""

    space: str
    coordinates: int
    epsilon: float
    loss: float
    slope: float
    noise: float
    curvature: float

    @property
    def rate(self) -> float:
        """Of two-point SPSA with one direction."""
        return self.slope / (self.slope + self.noise) / self.curvature

    @property
    def gain(self) -> float:
        """Nats for two forward passes."""
        return self.slope * self.rate / 2


def measured(chosen: Config, layout: Layout, directions: int) -> Chance:
    """Of the space that ``chosen`` names, on the first two batches of its training."""
    stage = "pretrain" if chosen.prepare.task == "none" else "finetune"
    options = chosen.pretrain if stage == "pretrain" else chosen.finetune
    begin = start.begin(chosen, layout, stage, None)
    space = start.space(options, chosen, begin.model)
    plan = start.training(options, chosen)
    passes = 2 * (1 + 2 * directions)
    engine = Engine(begin.model, space, passes, chosen.seed, plan.objective)
    epsilon = options.epsilon or TwoPoint.DEFAULTS[plan.space.backend].epsilon
    seeds = [derive(chosen.seed, 77, number) for number in range(directions)]
    sides = [Seeded(seed, sign * epsilon) for seed in seeds for sign in (1, -1)]
    losses, slopes, curvatures = [], [], []
    for number in range(2):
        batch = begin.batch(number).to(choose_device(chosen.device))
        [centre] = engine.losses(batch, [Seeded(0, 0.0)])
        found = engine.losses(batch, sides)
        pairs = list(zip(found[::2], found[1::2], strict=True))
        losses.append(centre)
        slopes.append([(up - down) / (2 * epsilon) for up, down in pairs])
        curvatures += [(up + down - 2 * centre) / epsilon**2 for up, down in pairs]
    shared = statistics.fmean(first * second for first, second in zip(*slopes, strict=True))
    square = statistics.fmean(slope**2 for each in slopes for slope in each)
    return Chance(
        options.space,
        space.size,
        epsilon,
        statistics.fmean(losses),
        shared,
        square - shared,
        statistics.fmean(curvatures),
    )


def of_space(chosen: Config, space: str, batch: int | None) -> Config:
    """``chosen`` with another space, its ε the method's own; perhaps with another batch."""
    values: dict[str, Any] = {"space": space, "epsilon": None}
    if batch is not None:
        values["batch_size"] = batch
    both = {f"{stage}.{key}": value for stage in ("pretrain", "finetune") for key, value in values.items()}
    return config.updated(chosen, both, "the command line")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("spaces", nargs="*", default=SPACES)
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--batch", type=int, help="texts of each of the two batches")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = config.read(arguments.config)
    preflight(chosen, ("prepare",))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        prepare(chosen, layout)
        if chosen.prepare.task != "none":
            pass_through(chosen.model, layout.pretrained, derive(chosen.seed, 6))
        for space in arguments.spaces:
            row = measured(of_space(chosen, space, arguments.batch), layout, arguments.directions)
            rows.append({**asdict(row), "rate": row.rate, "gain": row.gain})
            note(
                f"{row.space}: d {row.coordinates:,}, ε {row.epsilon:g}, loss {row.loss:.4f}, "
                f"‖∇L‖² {row.slope:.3g}, ν {row.noise:.3g}, tr H {row.curvature:.3g}: "
                f"rate {row.rate:.2g}, gain {row.gain:.2g} a pair of passes"
            )
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
