"""``pipeline compare``: optimizers beside each other at equal forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline.commands.configuring import absolute, configure
from pipeline.commands.options import (
    ConfigFile,
    HeldOut,
    Label,
    Model,
    Objective,
    Set,
    Task,
    Text,
    Train,
)
from pipeline.commands.output import shown
from pipeline.errors import Unsuitable, UserError
from pipeline.strict_json import strict_json


def compare(
    optimizers: Annotated[
        str,
        typer.Option(metavar="SPEC,…", help="Specs; key=value belongs to the one before."),
    ] = "spsa,spsa:OneSided,cmaes,nevergrad:OnePlusOne,nevergrad:DE,adamw",
    seeds: Annotated[str, typer.Option(metavar="N|A,B,…", help="How many, or which.")] = "3",
    tune: Annotated[
        int, typer.Option(metavar="N", help="Trials that tune each before; 0 takes the defaults.")
    ] = 0,
    workers: Annotated[int, typer.Option(metavar="N", help="Runs at once, of one thread each.")] = 1,
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
    forward_passes: Annotated[int | None, typer.Option(metavar="N", help="Budget of every run.")] = None,
    name: Annotated[str, typer.Option(help="The comparison's folder under runs/.")] = "compare",
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json at the end.")] = False,
) -> None:
    """Compare optimizers over seeds: the same start, data order, budget and test for all; AdamW beside them.

    \b
    pipeline compare --optimizers spsa,spsa:OneSided,cmaes,nevergrad:DE --seeds 3 --workers 2
    pipeline compare --optimizers spsa,directions=4,spsa,directions=16 --seeds 0,1 --forward-passes 4000
    pipeline compare --train my.csv --text review --label verdict --optimizers spsa,cmaes --name mine
    pipeline compare --optimizers spsa,es --tune 10 -S finetune.space=biases --name biases

    The same command again goes on with a comparison that was cut off. What a method is refused for stays in
    the table.
    """
    from pipeline import runs
    from pipeline.comparison.plan import Plan, parse_optimizers, parse_seeds
    from pipeline.comparison.run import NAME
    from pipeline.comparison.run import compare as run
    from pipeline.comparison.table import markdown
    from pipeline.data.prepare import LABELS, data_of

    if workers < 1 or tune < 0:
        raise UserError("--workers must be at least 1, and --tune at least 0")
    files = {"train": train, "validation": validation, "test": test, "text": text, "label": label}
    flags = {
        "prepare.task": task,
        "finetune.objective": objective,
        "model": None if model is None else absolute(model),
        "finetune.forward_passes": forward_passes,
    }
    chosen = configure(config, files, flags, set_ or [])
    if chosen.prepare.task == "none":
        raise UserError("prepare.task is none: there is no fine-tuning to compare")
    if data_of(chosen.prepare.task) != LABELS:
        raise UserError(
            "compare takes tasks of texts and labels, by whose accuracy it compares methods; "
            f"{chosen.prepare.task} is none"
        )
    if chosen.finetune.then:
        raise UserError("compare runs one optimizer from start to end: set finetune.then to []")
    if tune:
        _check_search(chosen.tune.search)
    root = runs.folder(name, chosen, make=False)
    plan = Plan(root, chosen, parse_optimizers(optimizers), parse_seeds(seeds), tune)
    unsuitable: list[Unsuitable] = []
    for each in plan.optimizers:
        try:
            runs.preflight(plan.preflight_config(each), ("prepare", "pretrain", "finetune"))
        except Unsuitable as reason:  # its row says so
            unsuitable.append(reason)
    if len(unsuitable) == len(plan.optimizers):
        raise unsuitable[0]
    found = run(plan, workers, typer.echo if not as_json else lambda text: None)
    if as_json:
        typer.echo(strict_json(found), nl=False)
        return
    typer.echo(markdown(found))
    typer.echo(f"{shown(root / NAME)}.html, .md, .json. Review: pipeline ui")


def _check_search(search: Sequence[str]) -> None:
    """Raises UserError where methods would not be compared on the same task at the same budget."""
    from pipeline.config import SCALES
    from pipeline.tuning.search import parse

    for each in map(parse, search):
        if each.name not in SCALES and not each.name.startswith("optimizer."):
            raise UserError(
                f"tune.search names '{each.name}', which is equal for all methods of a comparison; "
                "it takes epsilon, sigma, learning_rate and optimizer.OPTION"
            )
