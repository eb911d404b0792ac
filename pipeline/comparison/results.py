"""Reads what the runs of a plan left, into one plain structure that every output shows.

What a machine's speed decides, seconds and memory, is kept apart: the rest is the same whenever it is run.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import tuned
from pipeline.comparison.jobs import failure, has_yardsticks
from pipeline.comparison.plan import Plan
from pipeline.comparison.statistics import paired, spread
from pipeline.config import SCALES
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.reporting.report import YARDSTICKS
from pipeline.stage import read_metrics
from pipeline.trajectory import FILE

METRIC = "accuracy"


@dataclass
class Measured:
    """A measurement of a run: after so many passes and seconds, its held-out figures."""

    forward_passes: int
    seconds: float
    figures: dict[str, float]


@dataclass
class Run:
    """What one run came to; ``error`` where it came to nothing. ``seconds`` are from the first step on."""

    metrics: dict[str, Any] = field(default_factory=dict)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    hits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    curve: list[Measured] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def collect(plan: Plan) -> dict[str, Any]:
    """Everything the comparison has to say, as plain data."""
    found = {each: [_run(plan, each, seed) for seed in plan.seeds] for each in plan.optimizers}
    good = {name: made for name, made in found.items() if not any(run.error for run in made)}
    reference = next(iter(good), None)
    rows = [
        _row(name, made, good[reference] if reference else []) if name in good else _refused(name, made)
        for name, made in found.items()
    ]
    return {
        "setup": _setup(plan),
        "reference": reference,
        "results": [*_yardsticks(plan), *rows],
        "curves": {name: [_points(run) for run in made] for name, made in good.items()},
        "tuned": _tuned(plan),
        "timings": _timings(good),
    }


def _run(plan: Plan, optimizer: str, seed: int) -> Run:
    layout = plan.run(optimizer, seed)
    if error := failure(plan, optimizer, seed):
        return Run(error=error)
    metrics = read_metrics(layout.metrics)
    if f"test/{METRIC}" not in metrics:
        raise UserError(
            f"compare compares methods by {METRIC}, which {plan.config.prepare.task} does not measure; "
            f"the runs are in {plan.root}"
        )
    with layout.predictions.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = _curve(layout)
    began = curve[0].seconds  # when the start was measured
    return Run(
        metrics,
        np.array([float(row["loss"]) for row in rows]),
        np.array([float(row["hit"]) for row in rows]),
        [dataclasses.replace(each, seconds=each.seconds - began) for each in curve],
        metrics["seconds"] - began,
    )


def _curve(layout: Layout) -> list[Measured]:
    curve = []
    with (layout.finetuned / FILE).open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if "measured" in line:
                curve.append(Measured(line["forward_passes"], line["seconds"], line["measured"]))
    return curve


def _points(run: Run) -> list[dict[str, float]]:
    return [{"forward_passes": each.forward_passes, **each.figures} for each in run.curve]


def _row(name: str, made: list[Run], reference: list[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    for key in ("validation/loss", f"validation/{METRIC}", "test/loss", f"test/{METRIC}"):
        values = [run.metrics[key] for run in made]
        mean, deviation = spread(values)
        row[key] = {"mean": mean, "sd": deviation, "seeds": values}
    row["forward_passes"] = [run.metrics["forward_passes"] for run in made]
    row["coordinates"] = made[0].metrics["coordinates"]
    if made is not reference:
        for key, of in (("test/loss", "losses"), (f"test/{METRIC}", "hits")):
            ours, theirs = (np.stack([getattr(run, of) for run in each]) for each in (made, reference))
            mean, low, high = paired(ours, theirs)
            row[f"{key}_difference"] = {"mean": mean, "low": low, "high": high}
    return row


def _refused(name: str, made: list[Run]) -> dict[str, Any]:
    return {"name": name, "error": next(run.error for run in made if run.error)}


def _yardsticks(plan: Plan) -> list[dict[str, Any]]:
    """Each seed's, from the run that measured them."""
    measured = []
    for seed in plan.seeds:
        layouts = [plan.run(each, seed) for each in plan.optimizers]
        measured += [read_metrics(layout.metrics) for layout in layouts if has_yardsticks(layout)][:1]
    rows = []
    for key, name in YARDSTICKS.items():
        figures = {
            figure: [metrics[f"{key}/{figure}"] for metrics in measured if f"{key}/{figure}" in metrics]
            for figure in ("loss", METRIC)
        }
        if figures[METRIC]:
            row: dict[str, Any] = {"name": name, "yardstick": True}
            for figure, values in figures.items():
                if values:
                    mean, deviation = spread(values)
                    row[f"test/{figure}"] = {"mean": mean, "sd": deviation, "seeds": values}
            rows.append(row)
    return rows


def _setup(plan: Plan) -> dict[str, Any]:
    options = plan.config.finetune
    return {
        "model": plan.config.model,
        "data": plan.config.prepare.train,
        "space": options.space,
        "forward_passes": options.forward_passes,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "objective": options.objective,
        "optimizer": options.optimizer,
        "seeds": list(plan.seeds),
        "tuning_trials": plan.tune,
        "scales": _scales(plan),
    }


def _scales(plan: Plan) -> dict[str, Any]:
    """The scales and the rate that the configuration sets for its own method, if that is compared."""
    options = plan.config.finetune
    if not any(map(plan.is_configured, plan.optimizers)):
        return {}
    return {key: value for key in SCALES if (value := getattr(options, key)) is not None}


def _tuned(plan: Plan) -> dict[str, Any]:
    if not plan.tune:
        return {}
    return {
        each: tuned.read(plan.study(each).tuned).get(tuned.VALUES, {})
        for each in plan.optimizers
        if plan.study(each).tuned.is_file()
    }


def _timings(good: dict[str, list[Run]]) -> dict[str, Any]:
    """Seconds, memory, and what each had reached in the time that the fastest took for its budget."""
    if not good:
        return {}
    seconds = {name: [run.seconds for run in made] for name, made in good.items()}
    limit = min(max(each) for each in seconds.values())
    rows = {}
    for name, made in good.items():
        reached = [_at(run.curve, limit) for run in made]
        rows[name] = {
            "seconds": seconds[name],
            "peak_memory_mib": [run.metrics["peak_memory_mib"] for run in made],
            "validation_loss_at_equal_time": [each.figures["loss"] for each in reached],
            f"validation_{METRIC}_at_equal_time": [each.figures[METRIC] for each in reached],
            "curve_seconds": [[each.seconds for each in run.curve] for run in made],
        }
    return {"equal_time_seconds": limit, "rows": rows}


def _at(curve: list[Measured], limit: float) -> Measured:
    """The last measurement made by then; the start, where none was."""
    return [curve[0], *(each for each in curve if each.seconds <= limit)][-1]
