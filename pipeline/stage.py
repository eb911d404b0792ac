"""Runs a stage: the same way for ``dvc repro``, for ``pipeline run``, and as a script."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.entry_points import load
from pipeline.errors import guarded
from pipeline.layout import Layout, partial
from pipeline.strict_json import strict_json
from pipeline.user_code import blamed

if TYPE_CHECKING:
    from pipeline.tracking import Tracker
    from pipeline.trainer import OnMeasure

_POINTS = 500  # of a curve of steps: what a chart can show, and a database keep for every run
ORDER = ("prepare", "pretrain", "tune", "finetune", "evaluate")


@dataclass
class Context:
    """What a stage is given: its parameters, its directories, where to report.

    ``resume`` asks it to go on from what a killed execution of it left.
    """

    config: Config
    layout: Layout
    tracker: Tracker
    resume: bool = False

    def say(self, text: str) -> None:
        """One line for whoever watches."""
        print(text, flush=True)

    @contextmanager
    def training_progress(
        self, label: str, forward_passes: int, before: int = 0
    ) -> Iterator[tuple[OnMeasure, OnMeasure]]:
        """Callbacks for the trainer: a progress bar on a terminal, the tracker always.

        The tracker counts on from the forward passes made ``before``.
        """
        from tqdm import tqdm

        figures: dict[str, str] = {}
        spacing, noted = forward_passes / _POINTS, -1.0
        with tqdm(total=forward_passes, desc=label, unit="fwd", disable=None, file=sys.stderr) as bar:

            def show(made: int, new: dict[str, float], *keys: str) -> None:
                figures.update({key: f"{new[key]:.4f}" for key in keys if key in new})
                bar.set_postfix(figures, refresh=False)
                bar.update(made - bar.n)

            def on_step(made: int, new: dict[str, float]) -> None:
                nonlocal noted
                show(made, new, "train_loss")
                if made - noted >= spacing:
                    noted = made
                    self.tracker.metrics(new, before + made)

            def on_measure(made: int, new: dict[str, float]) -> None:
                held_out = {f"validation_{key}": value for key, value in new.items()}
                show(made, held_out, "validation_loss")
                self.tracker.metrics(held_out, before + made)

            yield on_step, on_measure

    def write_curve(self, name: str, curve: list[tuple[int, dict[str, float]]]) -> Path:
        """Writes ``plots/<name>.csv``: forward passes, then the figures measured there, if any."""
        path = self.layout.plots / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        # phases of other objectives may measure more
        keys = [key for key in curve[0][1] if all(key in each for _, each in curve)] if curve else ["loss"]
        rows = [",".join(map(str, [made, *(figures[key] for key in keys)])) for made, figures in curve]
        path.write_text("\n".join([",".join(["forward_passes", *keys]), *rows]) + "\n", encoding="utf-8")
        return path


Stage = Callable[[Context], dict[str, float]]


def run(
    name: str, config: Config, layout: Layout, *, resume: bool = False, parent: str | None = None
) -> dict[str, float]:
    """Runs one stage under a tracked run, a part of ``parent`` if given; its figures.

    Raises:
        UserError: the stage is not installed, or says what is wrong.
    """
    from pipeline.tracking import ledger, track

    stage: Stage = load("stage", name)
    users = (config.prepare.task, config.pretrain.task, config.pretrain.objective, config.finetune.objective)
    with track(name, config, layout, parent=parent, resume=resume) as tracker, blamed(*users):
        figures = stage(Context(config, layout, tracker, resume))
    if tracker.id:
        ledger.made(layout, name)
    else:  # what is noted made what was there before
        ledger.forget(layout, name)
    return figures


def script(name: str) -> None:
    """``python -m stages.<name>``: ``params.yaml`` and the directories of the working directory."""
    from pipeline.config import read

    root = Path.cwd()
    guarded(lambda: run(name, read(root / "params.yaml"), Layout(root)))


@contextmanager
def fresh_folder(path: Path, *, resume: bool = False) -> Iterator[Path]:
    """A folder to write into that takes ``path``'s place when all went well, and not before.

    It is empty, or with ``resume`` as it was left when writing was cut off.
    """
    building = partial(path)
    if not resume:
        shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, exist_ok=True)
    yield building
    shutil.rmtree(path, ignore_errors=True)
    building.rename(path)


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Writes flat metrics as JSON; null is one that is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strict_json(metrics), encoding="utf-8")


def write_predictions(
    path: Path, losses: Sequence[float], scores: Sequence[float], written: Sequence[str] = ()
) -> None:
    """Writes a line for each test target: its loss and whether it was predicted, or how well, from 0 to 1.

    Where the model writes, what it wrote stands beside that.
    """
    columns = [[repr(loss) for loss in losses], [f"{score:g}" for score in scores]]
    columns += [list(written)] if written else []
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["loss", "hit", "written"][: len(columns)])
        lines.writerows(zip(*columns, strict=True))


def read_metrics(path: Path) -> dict[str, Any]:
    """What `write_metrics` wrote, NaN for what was not finite; empty where there is no file."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: math.nan if value is None else value for key, value in content.items()}
