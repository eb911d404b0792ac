"""The verdict for a person: a table, one honest sentence, three pictures, and how to do it again."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, TrainConfig
from pipeline.layout import Layout, project_root
from pipeline.reporting import figures, markdown, phase_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD = ("", "test accuracy", "95% interval", "test loss", "forward passes", "seconds")
SHOWN = ("loss", "accuracy", "score", "bleu", "rouge_l", "chrf", "exact_match", "token_f1")  # in curves
FURTHER = {"f1": "macro F1", "mcc": "MCC", "calibration_error": "calibration error"}  # beneath the headline
YARDSTICKS = {
    "majority": "majority",
    "zero_shot": "zero-shot",
    "in_context": "in-context",
    "linear_probe": "linear probe",
}
"""What a result stands beside without training by steps, by what its figures begin with."""
RESULT, REFERENCE, AXIS = "#1f5fa8", "#8a8f98", "#4a4e55"


@dataclass(frozen=True)
class Row:
    """One line of the result table; None is a figure that was not made. Accuracies are shares of one."""

    name: str
    accuracy: float
    low: float | None
    high: float | None
    loss: float | None
    forward_passes: float | None
    seconds: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of ``HEAD``; empty where there is no figure."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f"{self.low * 100:.1f} to {self.high * 100:.1f}%"
        return (
            self.name,
            f"{self.accuracy * 100:.1f}%",
            interval,
            f"{self.loss:.4f}" if self.loss is not None else "",
            f"{self.forward_passes:,.0f}" if self.forward_passes is not None else "",
            f"{self.seconds:,.1f}" if self.seconds is not None else "",
        )


def rows(metrics: dict[str, Any], result: str = "this run") -> list[Row]:
    """The yardsticks without training, the run itself and AdamW, as far as there are figures."""
    found = []
    for prefix, name in _names(result).items():
        cost = "" if prefix == "test" else f"{prefix}/"
        keys = ("accuracy", "accuracy_low", "accuracy_high", "loss")
        accuracy, low, high, loss = (metrics.get(f"{prefix}/{key}") for key in keys)
        if accuracy is not None:
            passes, seconds = metrics.get(f"{cost}forward_passes"), metrics.get(f"{cost}seconds")
            found.append(Row(name, accuracy, low, high, loss, passes, seconds))
    return found


def _names(result: str) -> dict[str, str]:
    """What the rows' figures begin with, and the names they are shown by."""
    return {**YARDSTICKS, "test": result, "adamw": "AdamW (gradients)"}


def table(metrics: dict[str, Any]) -> str:
    """The result table as plain text, columns aligned, and the pretraining line, as far as there are any."""
    content = _content(metrics, "this run")
    lines = []
    if content:
        used = [i for i in range(len(content[0])) if i == 0 or any(line[i] for line in content[1:])]
        widths = {i: max(len(line[i]) for line in content) for i in used}
        lines = ["  ".join(_aligned(line[i], widths[i], i) for i in used).rstrip() for line in content]
    return "\n".join([*lines, *_pretraining(metrics), *phase_figures.lines(metrics, SHOWN)])


def _content(metrics: dict[str, Any], result: str) -> list[tuple[str, ...]]:
    """The result table's head and lines: accuracies, or a task's own figures."""
    found = rows(metrics, result)
    return [HEAD, *(row.cells for row in found)] if found else figures.table(metrics, result)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _pretraining(metrics: dict[str, Any]) -> list[str]:
    before, after = metrics.get("pretrain/loss_before"), metrics.get("pretrain/loss_after")
    if before is None or after is None:
        return []
    return [f"pretraining: held-out loss {before:.4f} before, {after:.4f} after"]


def verdict(metrics: dict[str, Any], optimizer: str) -> str:
    """One sentence: the run against zero-shot and AdamW, and whether the 95% intervals overlap."""
    found = {row.name: row for row in rows(metrics)}
    run = found.get("this run")
    if run is None:
        return figures.verdict(metrics, optimizer) or "Nothing was tested."
    others = ("zero-shot", "AdamW (gradients)")
    compared = [_compared(run, found[name]) for name in others if name in found]
    if not compared:
        return (
            f"{optimizer} reaches {run.accuracy * 100:.1f}% on the test; there is nothing to compare it with."
        )
    return f"{optimizer} is {' and '.join(compared)}."


def _compared(run: Row, other: Row) -> str:
    name = other.name.split(" (")[0]
    points = round((run.accuracy - other.accuracy) * 100, 1)
    if points == 0:
        return f"level with {name}"
    said = f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {name}"
    if run.low is None or run.high is None or other.low is None or other.high is None:
        return said
    apart = run.low > other.high or other.low > run.high
    return f"{said} (95% intervals {'do not overlap' if apart else 'overlap'})"


def write_report(config: Config, layout: Layout, metrics: dict[str, Any], curves: dict[str, Path]) -> None:
    """Writes ``report.md`` and the pictures in ``plots/``.

    ``metrics`` is flat (``test/accuracy``, …); what is absent stays absent. ``curves`` maps ``pretrain`` and
    ``finetune`` to CSV files with the columns ``forward_passes``, ``loss`` and, perhaps, ``accuracy``.
    """
    layout.plots.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(config, layout, metrics, curves)
    sections = [
        f"# {_title(layout)}",
        verdict(metrics, config.finetune.method),
        _result(metrics, config),
        _further(metrics, config),
        _setup(config, metrics),
        *([_pretrained(metrics)] if _pretraining(metrics) else []),
        _phases(metrics),
        *([_seen(pictures, layout)] if pictures else []),
        _again(layout),
    ]
    layout.report.write_text("\n\n".join(part for part in sections if part) + "\n", encoding="utf-8")


def _title(layout: Layout) -> str:
    return "Run of dvc repro" if _is_project(layout) else f"Run {layout.root.name}"


def _is_project(layout: Layout) -> bool:
    return layout.root.resolve() == project_root()


def _result(metrics: dict[str, Any], config: Config) -> str:
    content = _content(metrics, f"**{config.finetune.method}** (this run)")
    if not content:
        return ""
    note = "A forward pass is one of the model over one batch; a backward pass counts as two."
    return "\n".join(["## Result", "", markdown.table(content), "", note])


def _further(metrics: dict[str, Any], config: Config) -> str:
    """The figures beneath the headline, each with its 95% interval, as far as there are any."""
    names = _names(f"**{config.finetune.method}** (this run)")
    found = [(name, *(_bounded(metrics, f"{row}/{key}") for key in FURTHER)) for row, name in names.items()]
    found = [cells for cells in found if any(cells[1:])]
    if not found:
        return ""
    note = (
        "In brackets, 95% intervals. Macro F1 counts every label alike; MCC, Matthews' correlation, is 0 for "
        "a guess and 1 where all is right; the calibration error is how far confidence is from accuracy."
    )
    return "\n".join(["## Further figures", "", markdown.table([("", *FURTHER.values()), *found]), "", note])


def _bounded(metrics: dict[str, Any], key: str) -> str:
    value, low, high = (metrics.get(each) for each in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _setup(config: Config, metrics: dict[str, Any]) -> str:
    corpus = ", ".join("the task's own text" if each == "task" else each for each in config.prepare.corpus)
    lines = [f"- model: {config.model}"]
    if config.prepare.task != "none":
        shots = f", {config.prepare.shots} examples of each label" if config.prepare.shots else ""
        lines.append(f"- task: {config.prepare.task}, {config.prepare.train}{shots}")
        if config.finetune.template is not None:
            lines.append(f"- template: `{json.dumps(config.finetune.template, ensure_ascii=False)}`")
    if config.pretrain.enabled:
        lines.append(f"- pretraining: {_training(config.pretrain)}, on {corpus}")
    if config.prepare.task != "none":
        size = f" ({metrics['coordinates']:,.0f} coordinates)" if "coordinates" in metrics else ""
        lines += [f"- fine-tuning: {_training(each)}" for each in config.finetune.phases]
        lines[-1] += size
    return "\n".join(["## What was run", "", *lines, f"- seed: {config.seed}"])


def _training(options: TrainConfig) -> str:
    return (
        f"`{options.optimizer}` over the space `{options.space}` on `{options.objective}`, at most "
        f"{options.forward_passes:,} forward passes of {options.batch_size} × {options.max_length} tokens"
    )


def _pretrained(metrics: dict[str, Any]) -> str:
    before, after = metrics["pretrain/loss_before"], metrics["pretrain/loss_after"]
    change = f"{abs(after - before):.4f} nats {'lower' if after < before else 'higher'}"
    if after == before:
        change = "unchanged"
    return f"## Pretraining\n\nHeld-out loss {before:.4f} before, {after:.4f} after: {change}."


def _phases(metrics: dict[str, Any]) -> str:
    found = phase_figures.lines(metrics, SHOWN)
    return "\n".join(["## Phases", "", *(f"- {line}" for line in found)]) if found else ""


def _seen(pictures: list[Path], layout: Layout) -> str:
    shown = [f"![{path.stem}]({path.relative_to(layout.root).as_posix()})" for path in pictures]
    return "\n\n".join(["## Pictures", *shown])


def _again(layout: Layout) -> str:
    if _is_project(layout):
        commands = ["pipeline replay .    # the same weights, bit for bit, from the trajectory"]
        commands.append("dvc repro --force    # the whole run again")
    else:
        name = layout.name
        commands = [f"pipeline replay {name}    # the same weights, bit for bit, from the trajectory"]
        commands.append(f"pipeline run --config runs/{name}/{layout.params.name}    # the whole run again")
    return "\n".join(["## Again", "", "```", *commands, "```"])


def _pictures(config: Config, layout: Layout, metrics: dict[str, Any], curves: dict[str, Path]) -> list[Path]:
    """Draws what there are figures for; those files.

    The others are empty pictures: ``dvc.yaml`` names all three as outputs.
    """
    drawn = []
    result = f"{config.finetune.method} (this run)"
    drawings: dict[str, Figure | None] = {
        "accuracy": _accuracies(found, result) if (found := rows(metrics, result)) else None
    }
    for stage, shown, marks in (
        ("finetune", config.finetune.phases, phase_figures.boundaries(metrics)),
        ("pretrain", [config.pretrain], []),
    ):
        title = f"{stage}: " + ", then ".join(f"{each.optimizer} over {each.space}" for each in shown)
        drawings[stage] = _curve(curves[stage], title, marks) if stage in curves else None
    for name, figure in drawings.items():
        path = _save(figure or _canvas(0, height=1)[0], layout.plots / f"{name}.png")
        drawn += [path] if figure else []
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=144, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return path


def _accuracies(found: list[Row], result: str) -> Figure:
    """Accuracies as dots with their intervals, the run's own in colour."""
    figure, (axes,) = _canvas(1, height=1.3 + 0.5 * len(found))
    for place, row in enumerate(reversed(found)):
        colour = RESULT if row.name == result else REFERENCE
        if row.low is not None and row.high is not None:
            axes.plot(
                [row.low * 100, row.high * 100], [place, place], color=colour, linewidth=2.5, alpha=0.55
            )
        axes.plot(row.accuracy * 100, place, "o", color=colour, markersize=8)
        right = row.accuracy if row.high is None else row.high
        axes.annotate(f"{row.accuracy * 100:.1f}", (right * 100, place), (7, 0), va="center", color=colour,
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(found)), [row.name for row in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy, % (bar: 95% interval)")
    return figure


def _curve(path: Path, title: str, marks: list[float]) -> Figure | None:
    """Validation figures against forward passes: one panel for each that the file holds, if it holds any.

    ``marks`` are forward passes after which another phase began.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        return None
    passes = [float(line["forward_passes"]) for line in lines]
    shown = [key for key in SHOWN if key in lines[0]][:3]
    figure, panels = _canvas(len(shown), height=3.6)
    for axes, key in zip(panels, shown, strict=True):
        scale = 100 if key == "accuracy" else 1
        axes.plot(passes, [float(line[key]) * scale for line in lines], "-o", color=RESULT, markersize=3.5)
        for mark in marks:
            axes.axvline(mark, color=REFERENCE, linewidth=1, linestyle="--")
        axes.set_ylabel("validation " + {"accuracy": "accuracy, %", "loss": "loss, nats"}.get(key, key))
        axes.set_xlabel("forward passes")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlim(left=0)
    figure.suptitle(title, fontsize=11, color=AXIS)
    return figure


def _canvas(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure 8 inches wide with ``panels`` side by side, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    made = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c8ccd2")
        axes.tick_params(colors=AXIS, labelsize=9)
        axes.grid(color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, made
