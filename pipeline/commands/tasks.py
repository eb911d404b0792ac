"""``pipeline tasks``: what can be trained for, on what, towards what."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

KEYS = ("task", "reads", "data", "models", "objectives", "metrics", "example")


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the tasks: what they read, the models they take, objectives that suit them, metrics, an example.

    \b
    pipeline tasks
    pipeline tasks --json
    pipeline run --task ./my_task.py:MyTask       # a task of your own, in a file
    """
    rows = _rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['task']}: {row['does']}")
        for key in KEYS[1:]:
            value = row.get(key)
            if value:
                typer.echo(f"  {key:<11}{', '.join(value) if isinstance(value, list) else value}")
        typer.echo()
    typer.echo("A task of your own is a class in a file: --task ./my_task.py:MyTask; see docs/plugins.md")


def _rows() -> list[dict[str, Any]]:
    """A broken plugin is a row with its error."""
    from dataclasses import asdict

    from pipeline.entry_points import imported, installed
    from pipeline.errors import UserError

    rows: list[dict[str, Any]] = []
    for plugin in installed(["task"]):
        try:
            kind = imported(plugin)
        except UserError as error:
            rows.append({"task": plugin.name, "does": str(error)})
            continue
        about = getattr(kind, "about", None)
        told = (
            {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(about).items()}
            if about
            else {}
        )
        does = (kind.__doc__ or "").strip().partition("\n")[0]
        rows.append({"task": plugin.name, "does": does, "reads": kind.reads, **told})
    return rows
