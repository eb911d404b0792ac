"""What a study came to: a table of its trials and pictures of where the good ones lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.reporting.markdown import table as as_markdown
from pipeline.tuning.search import Parameter
from pipeline.tuning.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

GOOD, PLAIN = "#1f5fa8", "#8a8f98"
_FOR_IMPORTANCE = 4  # trials that an estimate of importance needs at least


def line(trial: FrozenTrial, study: Study) -> str:
    """A trial in a line."""
    values = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
    end = trial.user_attrs.get("error") or "no value" if trial.value is None else f"{trial.value:.4f}"
    return f"trial {trial.number}: {end}  ({values})"


def table(study: Study, by: str, guessed: bool) -> str:
    """The trials as a Markdown table, the best first. ``guessed``: trial 0 is the first guess."""
    labels = [each.label for each in study.parameters]
    best_first = sorted(study.ended, key=lambda each: _rank(each, study))
    rows = [["trial", by, *labels, ""]]
    for each in best_first:
        value = "" if each.value is None else f"{each.value:.4f}"
        settings = [_short(each.params.get(label, "")) for label in labels]
        note = each.user_attrs.get("error", "first guess" if guessed and each.number == 0 else "")
        rows.append([str(each.number), value, *settings, note])
    return as_markdown(rows)


def importance(study: Study) -> dict[str, float]:
    """The share of the values' variance that each parameter accounts for (fANOVA, Hutter et al. 2014).

    Empty where there are too few trials to say, or one parameter.
    """
    import optuna

    usable = _usable(study)
    if len(usable) < _FOR_IMPORTANCE or len(study.parameters) < 2:
        return {}
    apart = optuna.create_study(direction=study.optuna.direction)
    apart.add_trials(usable)
    try:
        return dict(optuna.importance.get_param_importances(apart))
    except (RuntimeError, ValueError):  # all values alike
        return {}


def write_report(study: Study, folder: Path, config: Config, found: dict[str, Any]) -> None:
    """Writes ``report.md``, ``history.png`` and, where two parameters were searched, ``contour.png``."""
    pictures = [_picture(folder / "history.png", lambda axes: _history(axes, study, config.tune.by))]
    numeric = [each for each in study.parameters if not each.choices]
    if len(numeric) > 1:
        pictures.append(
            _picture(folder / "contour.png", lambda axes: _contour(axes, study, numeric[:2], config.tune.by))
        )
    shares = importance(study)
    text = [
        f"# Tuning {config.finetune.optimizer} over {config.finetune.space}",
        f"{found['trials']} trials of {config.finetune.forward_passes:,} forward passes, seed {config.seed}, "
        f"each scored on the whole validation split after its last step (`{config.tune.by}`). The test was "
        "not looked at.",
        f"Best: trial {found['trial']}, {found['value']:.4f}"
        + ("." if found["first_guess"] is None else f"; the first guess came to {found['first_guess']:.4f}."),
        "`" + " ".join(f"-S {key}={value}" for key, value in found["values"].items()) + "`",
    ]
    if shares:
        text.append(
            "Share of the variance by parameter: "
            + ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
            + "."
        )
    text += [f"![]({path.name})" for path in pictures]
    text.append(table(study, config.tune.by, found["first_guess"] is not None))
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _picture(path: Path, draw: Any) -> Path:
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path)
    return path


def _usable(study: Study) -> list[FrozenTrial]:
    return [each for each in study.ended if each.value is not None and math.isfinite(each.value)]


def _history(axes: Axes, study: Study, by: str) -> None:
    trials = _usable(study)
    numbers = [each.number for each in trials]
    values = [each.value or 0.0 for each in trials]
    better = min if study.optuna.direction.name == "MINIMIZE" else max
    so_far = [better(values[: i + 1]) for i in range(len(values))]
    axes.plot(numbers, values, "o", color=PLAIN, markersize=4, label="trial")
    axes.step(numbers, so_far, where="post", color=GOOD, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"validation {by}")
    _within_reach(axes, values)
    axes.legend(frameon=False)


def _within_reach(axes: Axes, values: Sequence[float]) -> None:
    """Diverged trials must not flatten the others."""
    ordered = sorted(values)
    low, middle = ordered[0], ordered[len(ordered) // 2]
    high = ordered[-1]
    if high - middle > 5 * max(middle - low, 1e-9):
        axes.set_ylim(low - 0.1 * (middle - low), middle + 5 * max(middle - low, 1e-9))


def _contour(axes: Axes, study: Study, pair: Sequence[Parameter], by: str) -> None:
    """Values by two parameters; colours by rank, so that a diverged trial does not hide the others."""
    from matplotlib.tri import Triangulation

    trials = sorted(_usable(study), key=lambda each: _rank(each, study))
    rank = list(range(len(trials)))
    x, y = ([float(each.params[parameter.label]) for each in trials] for parameter in pair)
    u, v = (
        [math.log10(value) for value in values] if parameter.low > 0 else values
        for values, parameter in zip((x, y), pair, strict=True)
    )
    if len(trials) > 3 and len({*u}) > 2 and len({*v}) > 2:
        triangles = Triangulation(x, y, Triangulation(u, v).triangles)
        axes.tricontourf(triangles, rank, levels=12, cmap="viridis", alpha=0.5)
    axes.scatter(x, y, 40, rank, cmap="viridis", edgecolor="white", zorder=3)
    axes.annotate("best", (x[0], y[0]), xytext=(6, 6), textcoords="offset points")
    first, second = pair
    axes.set(xlabel=first.label, xlim=(first.low, first.high), xscale="log" if first.low > 0 else "linear")
    axes.set(
        ylabel=second.label, ylim=(second.low, second.high), yscale="log" if second.low > 0 else "linear"
    )
    axes.set_title(f"rank by validation {by}: dark is best")


def _rank(trial: FrozenTrial, study: Study) -> float:
    if trial.value is None:
        return math.inf
    return trial.value if study.optuna.direction.name == "MINIMIZE" else -trial.value


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
