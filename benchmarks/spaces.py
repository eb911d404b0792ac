"""What a pair of forward passes can gain in each space: ``python -m benchmarks.spaces CONFIG [SPACE …]``.

At the start of a configuration's fine-tuning (of its pretraining where it has no task), by forward passes.
The same directions z on two batches give ‖∇L‖², the mean of the slopes' products; ν, what a batch's noise
adds to their squares; and tr H, the mean curvature along z. A step of two-point SPSA with one direction then
gains at best ‖∇L‖⁴ / (2 (‖∇L‖² + ν) tr H), at the rate ‖∇L‖² / ((‖∇L‖² + ν) tr H), to second order and
where (‖∇L‖² + ν) tr H is far above ∇LᵀH∇L. With n directions both are n times that as long as n stays below
that quotient, an effective rank. It is of the start: a run flattens the steepest directions first, and then
gains less.
"""

from __future__ import annotations

import argparse
import json
import math
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
from pipeline.errors import Unsuitable, UserError, guarded
from pipeline.layout import Layout
from pipeline.models.loading import choose_device, pass_through
from pipeline.noise import derive
from pipeline.optimizer import Seeded
from pipeline.runs import preflight
from plugins.seeded.two_point import TwoPoint

SPACES = ("full", "norms", "lora,rank=8", "prompt,tokens=10,dimension=500")


@dataclass(frozen=True)
class Chance:
    """A space at the start: coordinates, ε, the loss (nats), and what the directions told.

    ``_error`` is a standard error over directions.
    """

    space: str
    coordinates: int
    epsilon: float
    loss: float
    slope: float
    slope_error: float
    noise: float
    curvature: float
    curvature_error: float

    @property
    def resolved(self) -> bool:
        """Whether the directions were enough to tell the slope and the curvature from nothing."""
        return self.slope > 2 * self.slope_error and self.curvature > 2 * self.curvature_error

    @property
    def rate(self) -> float:
        """Of two-point SPSA with one direction."""
        return self.slope / (self.slope + self.noise) / self.curvature

    @property
    def gain(self) -> float:
        """Nats for two forward passes."""
        return self.slope * self.rate / 2

    def __str__(self) -> str:
        told = f"rate {self.rate:.2g}, gain {self.gain:.2g} a pair of passes"
        return (
            f"{self.space}: d {self.coordinates:,}, ε {self.epsilon:g}, loss {self.loss:.4f}, "
            f"‖∇L‖² {self.slope:.3g} ± {self.slope_error:.2g}, ν {self.noise:.3g}, "
            f"tr H {self.curvature:.3g} ± {self.curvature_error:.2g}: "
            f"{told if self.resolved else 'not resolved: raise --directions or --batch'}"
        )


def measured(chosen: Config, layout: Layout, directions: int) -> Chance:
    """Of the space that ``chosen`` names, on the first two batches of its training."""
    stage = "pretrain" if chosen.prepare.task == "none" else "finetune"
    options = chosen.pretrain if stage == "pretrain" else chosen.finetune
    plan = start.training(options, chosen)
    begin = start.begin(chosen, layout, stage, None)
    space = start.space(options, chosen, begin.model)
    engine = Engine(begin.model, space, 2 * (1 + 2 * directions), chosen.seed, plan.objective)
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
        curvatures.append([(up + down - 2 * centre) / epsilon**2 for up, down in pairs])
    shared = [first * second for first, second in zip(*slopes, strict=True)]
    bent = [(first + second) / 2 for first, second in zip(*curvatures, strict=True)]
    square = statistics.fmean(slope**2 for each in slopes for slope in each)
    slope = statistics.fmean(shared)
    return Chance(
        space=options.space,
        coordinates=space.size,
        epsilon=epsilon,
        loss=statistics.fmean(losses),
        slope=slope,
        slope_error=statistics.stdev(shared) / math.sqrt(directions),
        noise=square - slope,
        curvature=statistics.fmean(bent),
        curvature_error=statistics.stdev(bent) / math.sqrt(directions),
    )


def of_space(chosen: Config, space: str, epsilon: float | None, batch: int | None) -> Config:
    """``chosen`` with another space and ε, None the method's own; perhaps with another batch."""
    values: dict[str, Any] = {"space": space, "epsilon": epsilon}
    if batch is not None:
        values["batch_size"] = batch
    both = {f"{stage}.{key}": value for stage in ("pretrain", "finetune") for key, value in values.items()}
    return config.updated(chosen, both, "the command line")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("spaces", nargs="*", default=SPACES)
    parser.add_argument("--directions", type=int, default=32)
    parser.add_argument("--epsilon", type=float, help="of all spaces; else each one's own")
    parser.add_argument("--batch", type=int, help="texts of each of the two batches")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = config.read(arguments.config)
    task = chosen.prepare.task != "none"
    if task and chosen.pretrain.enabled:
        raise UserError(f"{arguments.config} pretrains: what its fine-tuning starts from is not there yet")
    preflight(chosen, ("prepare",))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        prepare(chosen, layout)
        if task:
            pass_through(chosen.model, layout.pretrained, derive(chosen.seed, 6))
        for space in arguments.spaces:
            try:
                varied = of_space(chosen, space, arguments.epsilon, arguments.batch)
                row = measured(varied, layout, arguments.directions)
            except Unsuitable as error:
                note(f"{space}: {error}")
                continue
            note(str(row))
            rows.append({**asdict(row), "rate": row.rate, "gain": row.gain, "resolved": row.resolved})
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    guarded(main)
