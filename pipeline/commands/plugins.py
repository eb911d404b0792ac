"""``pipeline plugins``: what is installed, what each offers, and a new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from pipeline.commands.output import print_table, shown
from pipeline.errors import UserError


class _Backends(typer.core.TyperGroup):
    """``pipeline plugins nevergrad`` is short for ``pipeline plugins show nevergrad``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
plugins = typer.Typer(cls=_Backends, rich_markup_mode=None)


@plugins.callback(invoke_without_command=True)
def list_plugins(
    context: typer.Context,
    verify: Annotated[
        bool, typer.Option("--verify", help="Import each, and build each optimizer; status 1 if one fails.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the installed plugins with their distribution and version, without importing one.

    \b
    pipeline plugins
    pipeline plugins --verify
    pipeline plugins nevergrad            # the variants of an optimizer, with their options
    pipeline plugins new my-method        # writes a plugin of your own
    """
    from pipeline.entry_points import installed
    from pipeline.verification import Verdict
    from pipeline.verification import verify as tried

    if context.invoked_subcommand:
        if verify or as_json:
            raise UserError(
                "--verify and --json before a name are for the whole list; write --json behind it"
            )
        return
    verdicts = tried() if verify else [Verdict(plugin, "") for plugin in installed()]
    keys = ["kind", "name", "distribution", "version", "object"]
    rows = [[p.kind, p.name, p.distribution, p.version, p.target] for p in (v.plugin for v in verdicts)]
    if verify:
        keys.append("error" if as_json else "verdict")
        rows = [[*row, v.error or ("" if as_json else "ok")] for row, v in zip(rows, verdicts, strict=True)]
    print_table(keys, rows, as_json)
    if any(verdict.error for verdict in verdicts):
        raise typer.Exit(1)


@plugins.command("show")
def show_backend(
    backend: Annotated[str, typer.Argument(help="An optimizer of `pipeline plugins`.")],
    as_json: Json = False,
) -> None:
    """List an optimizer's variants by family, with their options and defaults.

    \b
    pipeline plugins spsa
    pipeline plugins nevergrad | grep DE
    """
    from pipeline.entry_points import load
    from pipeline.registry import catalogue

    rows: list[list[Any]] = []
    for variant in catalogue(load("optimizer", backend)):
        name = f"{backend}:{variant.name}" if variant.name else backend
        options = variant.options if as_json else " ".join(f"{k}={v}" for k, v in variant.options.items())
        rows.append([variant.family, name, variant.note, options])
    print_table(["family", "optimizer", "note", "options"], rows, as_json)


@plugins.command("new")
def new_plugin(
    name: Annotated[str, typer.Argument(help="The optimizer's name, as in --optimizer NAME.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Where its folder is made.")] = Path(),
) -> None:
    """Write a distribution with an optimizer of your own: it installs, passes its test and trains as it is.

    \b
    pipeline plugins new demo && pip install ./demo && pytest demo
    pipeline run --optimizer demo --forward-passes 200
    """
    from pipeline.scaffold import write_plugin

    folder = shown(write_plugin(name, into).resolve())
    place = folder if os.path.isabs(folder) else f"./{folder}"  # pip takes a bare name for a package's
    typer.echo(f"{place}: now pip install {place} && pytest {place}")
