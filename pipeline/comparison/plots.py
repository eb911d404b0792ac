"""Curves of a comparison, mean and band over seeds, as SVG text that stands alone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by most eyes, and on white and black alike
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6F47")
INK = "#7a8088"
POINTS = 200
APART = 10  # times as long as the quickest, from where an axis is logarithmic beyond its end


def curves(found: dict[str, Any], figure: str, by: str) -> str:
    """``figure`` (loss or the metric) on validation against ``by``: ``forward_passes`` or ``seconds``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "comparison",
        "font.family": "sans-serif",
    }
    with rc_context(style | dict.fromkeys(inked, INK)):
        drawn = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = drawn.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        _draw(axes, found, figure, by)
        drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, found: dict[str, Any], figure: str, by: str) -> None:
    seen, ends = [], []
    for number, (name, runs) in enumerate(found["curves"].items()):
        xs = [_axis(found, name, seed, points, by) for seed, points in enumerate(runs)]
        ys = [[_finite(point[figure]) for point in points] for points in runs]
        grid = np.linspace(0.0, min(max(x) for x in xs), POINTS)
        lines = np.array([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
        colour = COLOURS[number % len(COLOURS)]
        dashes = "-" if number < len(COLOURS) else "--"
        axes.fill_between(grid, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(grid, lines.mean(0), dashes, color=colour, label=name, linewidth=1.6)
        seen.append(lines.mean(0))
        ends.append(float(grid[-1]))
    if figure == "loss":
        _frame(axes, seen)
    unit = "forward passes" if by == "forward_passes" else "seconds"
    quickest, slowest = min(ends), max(ends)
    if slowest > APART * quickest > 0.0:  # a method of seconds would vanish beside one of minutes
        axes.set_xscale("symlog", linthresh=quickest)
        axes.set_xlim(0.0, slowest)
        unit += f", on a logarithmic scale from {quickest:,.3g} on"
    axes.set_xlabel(unit)
    axes.set_ylabel(f"validation {figure}")


def _finite(value: float) -> float:
    """NaN, a gap in the curve, for what is not finite."""
    return value if math.isfinite(value) else math.nan


def _axis(
    found: dict[str, Any], name: str, seed: int, points: Sequence[dict[str, float]], by: str
) -> list[float]:
    if by == "forward_passes":
        return [point["forward_passes"] for point in points]
    seconds: list[float] = found["timings"]["rows"][name]["curve_seconds"][seed]
    return seconds


def _frame(axes: Axes, lines: Sequence[Any]) -> None:
    """A loss that diverges must not flatten the others: it is cut at twice the fall of the best one."""
    every = np.concatenate(lines)
    every = every[np.isfinite(every)]
    if not len(every):
        return
    start = float(np.nanmedian([line[0] for line in lines]))
    below, above = start - float(every.min()), float(every.max()) - start
    if above > 2 * below > 0:
        axes.set_ylim(start - 1.2 * below, start + 2 * below)
