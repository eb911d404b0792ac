"""How commands print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer


def print_table(keys: list[str], rows: list[list[Any]], as_json: bool) -> None:
    """Rows under their keys, for a person or as JSON; empty last columns are left out."""
    if as_json:
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    table = [keys, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(keys))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def shown(path: Path) -> str:
    """A path as short as it can be said."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
