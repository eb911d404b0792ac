"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from pipeline.commands.compare import compare
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
from pipeline.commands.plugins import plugins
from pipeline.commands.register import register
from pipeline.commands.status import status
from pipeline.commands.sync import sync
from pipeline.commands.tasks import tasks
from pipeline.commands.tune import tune
from pipeline.errors import UserError, guarded, unknown

if TYPE_CHECKING:
    from pipeline.layout import Layout


class _Stopped(BaseException):
    """Ctrl-C, past typer, which would end the process without a word of what goes on."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _Stopped(*stopped.args) from None


app = typer.Typer(
    name="pipeline",
    cls=_Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("gradient-free-pipeline"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train transformer language models without gradients.

    \b
    pipeline run --optimizer nevergrad:OnePlusOne
    pipeline run --optimizer spsa,directions=16 -S finetune.space=biases --forward-passes 2000
    pipeline run --train my.csv --test my2.csv --text review --label stars
    pipeline tune --optimizer spsa --workers 2
    pipeline compare --optimizers spsa,es,cmaes --seeds 3
    pipeline replay spsa-1
    pipeline ui

    `dvc repro` runs the same stages with params.yaml.
    """


@app.command()
def run(
    context: typer.Context,
    optimizer: Annotated[
        str | None, typer.Option(metavar="SPEC", help="backend[:Name][,key=value…] for the finetune stage.")
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
    forward_passes: Annotated[
        int | None, typer.Option(metavar="N", help="Budget of the finetune stage.")
    ] = None,
    seed: Seed = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="First stage; needs --name.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Last stage.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The run's folder under runs/; without --from a new one.")
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(metavar="RUN", help="Take what `pipeline tune` found there.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Majority, zero-shot, linear probe, AdamW.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run that was cut off; alone.")
    ] = None,
) -> None:
    """Run prepare → pretrain → tune, if enabled → finetune → evaluate into runs/NAME.

    \b
    pipeline run --optimizer nevergrad:OnePlusOne --forward-passes 400
    pipeline run --optimizer cmaes:SepCMA --seed 1 --no-baselines
    pipeline run --name mine --to pretrain && pipeline run --name mine --from finetune
    pipeline run --resume mine
    pipeline run --tuned tune-spsa
    pipeline run --objective cross_entropy+0.5*f1 --forward-passes 2000
    pipeline run --objective ./reward.py:score
    """
    from pipeline import runs
    from pipeline.layout import Layout

    if resume is not None:
        _resume(context, resume)
        return

    files = {"train": train, "validation": validation, "test": test, "text": text, "label": label}
    chosen = configure(
        config,
        files,
        {
            "finetune.optimizer": optimizer,
            "finetune.objective": objective,
            "model": None if model is None else absolute(model),
            "prepare.task": task,
            "finetune.forward_passes": forward_passes,
            "seed": seed,
            "evaluate.baselines": None if baselines else False,
        },
        set_ or [],
        tuned,
    )
    stages = runs.stages_between(first, last)
    if first and first != "prepare" and name is None:
        raise UserError(f"--from {first} goes on with a run: name it with --name")
    runs.preflight(chosen, stages)
    if forward_passes is not None and chosen.prepare.task == "none":
        raise UserError(
            "--forward-passes is fine-tuning's budget, and there is no task: set -S pretrain.forward_passes"
        )
    layout = Layout(runs.folder(name, chosen, make=not dry_run))
    if first is None:
        runs.refuse_to_replace(layout)
    if dry_run:
        typer.echo(runs.plan(chosen, layout, stages), nl=False)
        return
    runs.execute(chosen, layout, stages)
    _closing(layout)


app.command()(tune)
app.command()(compare)
app.command()(status)
app.command()(sync)
app.command()(register)
app.command()(tasks)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="A run's name or folder; '.' is the last dvc repro.")],
    stage: Annotated[
        str | None, typer.Option(help="pretrain or finetune; else both, as far as there are.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the rebuilt model here; needs --stage.")
    ] = None,
) -> None:
    """Rebuild a run's final weights from its trajectory, bit for bit, without a forward pass.

    \b
    pipeline replay spsa-1
    pipeline replay . --stage finetune --out rebuilt/
    """
    from pipeline import runs
    from pipeline.replay import STAGES, recorded
    from pipeline.replay import replay as rebuild

    layout = runs.find(run)
    if stage is not None and stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if out and not stage:
        raise UserError("--out needs --stage pretrain or --stage finetune")
    chosen = [stage] if stage else [each for each in STAGES if recorded(layout, each)]
    if not chosen:
        raise UserError(f"{shown(layout.root)} holds no trajectory yet")
    for done in (done for each in chosen for done in rebuild(layout, each, out)):
        end = "identical to the run's" if done.whole else "where the run was cut off"
        size = f"{done.steps:,} steps from {done.bytes / 1024:,.0f} KB"
        found = f"{size}, weights {done.digest[:16]}: {end}"
        typer.echo(f"{done.what}: {found if done.digest else 'by gradients, which leave no record'}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run's name or folder; '.' is the last dvc repro.")] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json.")] = False,
) -> None:
    """Print the result table of a run.

    \b
    pipeline show spsa-1
    pipeline show --json
    """
    from pipeline import runs
    from pipeline.reporting.report import table
    from pipeline.stage import read_metrics

    layout = runs.find(run)
    if not layout.metrics.is_file():
        raise UserError(f"{shown(layout.root)} has no metrics.json yet: its evaluate stage has not run")
    if as_json:
        typer.echo(layout.metrics.read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(table(read_metrics(layout.metrics)))


app.add_typer(plugins, name="plugins")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="The next free port is taken if this one is not.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
) -> None:
    """Open the review of every run in MLflow."""
    from pipeline.ui import serve

    serve(port=port, host=host, open_browser=browser)


def _resume(context: typer.Context, name: str) -> None:
    """Goes on with the run ``name``, which brings its own parameters.

    Raises:
        UserError: another option was given, there is no such run, or it is whole.
    """
    from pipeline import runs

    for option in context.command.params:
        given = context.get_parameter_source(str(option.name))
        if option.name != "resume" and given is not None and given.name == "COMMANDLINE":
            raise UserError(f"--resume takes the run's own parameters; leave out {option.opts[0]}")
    layout = runs.find(name)
    chosen, stages = runs.unfinished(layout)
    runs.execute(chosen, layout, stages, resume=True)
    _closing(layout)


def _closing(layout: Layout) -> None:
    """Says what a run left, and where."""
    made = [path for path in (layout.metrics, layout.report) if path.is_file()]
    held = ", ".join(path.name for path in made) or "no result yet: its evaluate stage has not run"
    typer.echo(f"\n{shown(layout.root)}: {held}. Review: pipeline ui")


def main() -> None:
    """The ``pipeline`` command."""
    guarded(_one_line_errors)


def _one_line_errors() -> None:
    """Runs the command; the parser's own complaint, of several lines, becomes one like ours."""
    # typer carries a click of its own or uses the installed one: its public names lead to the right classes
    complaint: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _Stopped as stopped:
        raise KeyboardInterrupt(*stopped.args) from None
    except complaint as error:
        said = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(said)
            raise SystemExit(0) from None
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "pipeline"
        raise UserError(f"{said.rstrip('.')}; see {command} --help") from None
    raise SystemExit(status if isinstance(status, int) else 0)
