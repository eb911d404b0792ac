"""The tables of a comparison, as rows of cells and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.comparison.results import METRIC
from pipeline.reporting.markdown import table as as_markdown

HEAD = (
    "",
    "validation loss",
    "test loss",
    f"test {METRIC}",
    f"{METRIC} against {{reference}}",
    "loss against {reference}",
    "forward passes",
)
COST_HEAD = (
    "",
    "seconds",
    "peak memory, MiB",
    "validation loss at {seconds} s",
    f"validation {METRIC} at {{seconds}} s",
)
DIVERGED = "diverged"  # a mean over seeds that is no number
TIMED = "On this machine, one thread a run, from the first step on; these figures change from run to run."


def results(found: dict[str, Any]) -> list[list[str]]:
    """The table that is the same whenever the comparison is run, with its head."""
    head = [cell.format(reference=found["reference"]) for cell in HEAD]
    return [head, *(_result(row) for row in found["results"])]


def cost(found: dict[str, Any]) -> list[list[str]]:
    """What depends on this machine, with its head; empty where nothing ran."""
    timings = found["timings"]
    if not timings:
        return []
    head = [cell.format(seconds=f"{timings['equal_time_seconds']:,.1f}") for cell in COST_HEAD]
    return [head, *(_cost(name, row) for name, row in timings["rows"].items())]


def tuned_to(found: dict[str, Any]) -> list[str]:
    """A line for each method that was tuned."""
    return [
        f"{name}: {', '.join(f'{key}={value}' for key, value in values.items())}"
        for name, values in found["tuned"].items()
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know to believe the tables."""
    setup = found["setup"]
    seeds = ", ".join(map(str, setup["seeds"]))
    scales = ", ".join(f"{key}={value:g}" for key, value in setup["scales"].items())
    if setup["tuning_trials"]:
        tuned = (
            f"Each method's scale and rate were tuned by {setup['tuning_trials']} trials on the validation "
            "split of another seed."
        )
    elif scales:
        tuned = (
            f"`{setup['optimizer']}` has {scales} of the configuration; each other method has its own "
            "published defaults."
        )
    else:
        tuned = "Each method has its own published defaults; none was tuned for this."
    return [
        f"{setup['model']}, {setup['data']}, space `{setup['space']}` (AdamW: the whole model), batches of "
        f"{setup['batch_size']} × {setup['max_length']} tokens, objective {setup['objective']}. Every method "
        f"has {setup['forward_passes']:,} forward passes (a backward pass counts as two), the same start and "
        f"the same order of the data for each of the seeds {seeds}; all are tested on the same examples.",
        tuned,
        "Mean ± standard deviation over seeds. A difference is paired, example by example and seed by seed; "
        "in brackets its 95% interval over other test examples, which leaves out the chance of a seed.",
    ]


def markdown(found: dict[str, Any]) -> str:
    """Both tables and the notes."""
    parts = ["# Comparison", *notes(found), as_markdown(results(found))]
    if timed := cost(found):
        parts += ["## Cost, and equal time", TIMED, as_markdown(timed)]
    if found["tuned"]:
        parts += ["## Tuned to", "\n".join(f"- {line}" for line in tuned_to(found))]
    return "\n\n".join(parts) + "\n"


def _result(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["name"], f"not run: {row['error']}", *[""] * (len(HEAD) - 2)]
    cells = [row["name"], _spread(row, "validation/loss"), _spread(row, "test/loss")]
    cells += [_spread(row, f"test/{METRIC}", percent=True)]
    cells += [_difference(row, f"test/{METRIC}", percent=True), _difference(row, "test/loss")]
    passes = row.get("forward_passes")
    return [*cells, "" if passes is None else _range(passes)]


def _cost(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        _range(row["seconds"], 1),
        _range(row["peak_memory_mib"]),
        _mean(row["validation_loss_at_equal_time"], ".4f"),
        _mean([100 * value for value in row[f"validation_{METRIC}_at_equal_time"]], ".1f") + "%",
    ]


def _spread(row: dict[str, Any], key: str, percent: bool = False) -> str:
    if key not in row:
        return ""
    mean, deviation = row[key]["mean"], row[key]["sd"]
    if not math.isfinite(mean):
        return DIVERGED
    if percent:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f}%"
    return f"{mean:.4f} ± {deviation:.4f}"


def _difference(row: dict[str, Any], key: str, percent: bool = False) -> str:
    found = row.get(f"{key}_difference")
    if found is None:
        return ""
    mean, low, high = found["mean"], found["low"], found["high"]
    if not math.isfinite(mean):
        return ""
    if percent:
        return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _mean(values: Sequence[float], form: str) -> str:
    mean = sum(values) / len(values)
    return format(mean, form) if math.isfinite(mean) else DIVERGED
