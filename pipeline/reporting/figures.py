"""The result of a task that is not measured by accuracy: its own figures, beside those of its yardsticks."""

from __future__ import annotations

from typing import Any

ROWS = {"zero_shot": "zero-shot", "test": "this run", "adamw": "AdamW (gradients)"}
COSTS = ("forward_passes", "seconds")


def table(metrics: dict[str, Any], result: str = ROWS["test"]) -> list[tuple[str, ...]]:
    """A head and a line for each row that has figures, as text; empty where none has."""
    found = {name: _of(metrics, row) for row, name in {**ROWS, "test": result}.items()}
    found = {name: figures for name, figures in found.items() if figures}
    keys = list(dict.fromkeys(key for figures in found.values() for key in figures))
    keys = [key for key in keys if key not in COSTS] + [key for key in COSTS if key in keys]
    if not keys:
        return []
    head = ("", *(key.replace("_", " ") if key in COSTS else f"test {key}" for key in keys))
    return [head, *((name, *(_cell(figures, key) for key in keys)) for name, figures in found.items())]


def verdict(metrics: dict[str, Any], optimizer: str) -> str:
    """One sentence: the task's first figure at the start and after; empty where nothing was tested."""
    figures = _of(metrics, "test")
    key = next((key for key in figures if key != "loss"), "loss")
    if key not in figures:
        return ""
    before = metrics.get(f"zero_shot/{key}")
    if before is None:
        return f"{optimizer} reaches a test {key} of {figures[key]:.4f}; there is nothing to compare it with."
    return f"{optimizer} takes the test {key} from {before:.4f} to {figures[key]:.4f}."


def _of(metrics: dict[str, Any], row: str) -> dict[str, float]:
    """The figures of a row; the run's own costs are not under its name."""
    figures = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{row}/")}
    if row == "test" and figures:
        figures |= {key: metrics[key] for key in COSTS if key in metrics}
    return figures


def _cell(figures: dict[str, float], key: str) -> str:
    if key not in figures:
        return ""
    value = figures[key]
    return (
        f"{value:,.0f}"
        if key == "forward_passes"
        else f"{value:,.1f}"
        if key == "seconds"
        else f"{value:.4f}"
    )
