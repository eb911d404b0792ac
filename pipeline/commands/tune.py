"""``pipeline tune``: the stages up to the search, into a folder of the study's own."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.configuring import absolute, configure
from pipeline.commands.options import (
    ConfigFile,
    HeldOut,
    Label,
    Model,
    Objective,
    Seed,
    Set,
    Task,
    Text,
    Train,
)
from pipeline.commands.output import shown
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.layout import Layout


def tune(
    optimizer: Annotated[
        str | None, typer.Option(metavar="SPEC", help="backend[:Name][,key=value…] to tune.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Whole fine-tuning runs, in all; tune.trials else.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes at once; tune.workers else.")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW..HIGH",
            help="What to search; may be repeated. Else the optimizer's epsilon or sigma, and learning_rate.",
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The validation figure that ranks trials: loss, f1, …; tune.by else.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna's database; else a journal file.")
    ] = None,
    model: Model = None,
    task: Task = None,
    objective: Objective = None,
    train: Train = None,
    validation: HeldOut = None,
    test: HeldOut = None,
    text: Text = None,
    label: Label = None,
    config: ConfigFile = None,
    set_: Set = None,
    forward_passes: Annotated[int | None, typer.Option(metavar="N", help="Budget of each trial.")] = None,
    seed: Seed = None,
    name: Annotated[str | None, typer.Option(help="The study's folder under runs/.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print tuned.json at the end.")] = False,
) -> None:
    """Search for an optimizer's parameters on the validation split; the test is not looked at.

    \b
    pipeline tune --optimizer spsa --trials 30 --workers 2
    pipeline tune --search "epsilon=1e-4..1" --search "learning_rate=0.01..10*epsilon"
    pipeline tune --search "optimizer.directions=4..64" --search "batch_size=16|32|64" --by accuracy
    pipeline tune --train my.csv --text review --label verdict --by mcc
    pipeline run --tuned tune-spsa       # with what was found

    The same command again goes on with a study that was cut off, and with more --trials adds to it.
    """
    from pipeline import runs
    from pipeline.layout import Layout
    from pipeline.tuning.run import digest

    chosen = configure(
        config,
        {"train": train, "validation": validation, "test": test, "text": text, "label": label},
        {
            "finetune.optimizer": optimizer,
            "finetune.objective": objective,
            "prepare.task": task,
            "model": None if model is None else absolute(model),
            "finetune.forward_passes": forward_passes,
            "seed": seed,
            "tune.enabled": True,
            "tune.trials": trials,
            "tune.workers": workers,
            "tune.search": search,
            "tune.by": by,
            "tune.storage": storage,
        },
        set_ or [],
    )
    if chosen.prepare.task == "none":
        raise UserError("prepare.task is none: there is no fine-tuning to tune")
    runs.preflight(chosen, runs.stages_between(None, "tune"))
    layout = Layout(runs.folder(name or f"tune-{runs.slug(chosen.finetune.optimizer)}", chosen, make=True))
    begun = layout.params.is_file()
    _same_files(layout, chosen)
    first = runs.first_unfinished(layout, chosen) or "tune"
    stages = runs.stages_between(first if first in ("prepare", "pretrain") else "tune", "tune")
    # what is told on the way is no JSON
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            runs.execute(chosen, layout, stages, resume=begun)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("; the same command goes on") from None
    if as_json:
        typer.echo(layout.tuned.read_text(encoding="utf-8").rstrip())
        return
    report = layout.tuning / digest(chosen, layout) / "report.md"
    typer.echo(f"\n{shown(report)}. Use what was found: pipeline run --tuned {layout.root.name}")


def _same_files(layout: Layout, config: Config) -> None:
    """Notes the files of data that are about to be prepared, or holds them against those that were.

    Raises:
        UserError: one of them was changed.
    """
    from pipeline.data.prepare import check_unchanged, digests
    from pipeline.tuned import read, write

    now = digests(config)
    if not layout.last_written("prepare").is_file():
        layout.root.mkdir(parents=True, exist_ok=True)
        write(layout.files, now)
    elif layout.files.is_file():  # older studies have none
        check_unchanged(read(layout.files), now, layout.root)
