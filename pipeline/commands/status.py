"""``pipeline status``: what is done, what is not, and which tracked run made it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.output import print_table

if TYPE_CHECKING:
    from pipeline.layout import Layout

KEYS = ("run", "stage", "state", "made", "commit", "tracked as")


def status(
    run: Annotated[
        str | None, typer.Argument(help="A run's name or folder; else the project's and all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which results come from which run: also of a stage that DVC took from its cache.

    \b
    pipeline status
    pipeline status spsa-1
    """
    from pipeline import runs
    from pipeline.layout import Layout, project_root
    from pipeline.tracking import spool

    if run is not None:
        layouts = [runs.find(run)]
    else:
        folders = sorted((project_root() / "runs").glob("*/params.yaml"))
        layouts = [Layout(project_root()), *(Layout(path.parent) for path in folders)]
    rows = [row for layout in layouts for row in _rows(layout)]
    print_table([*KEYS], rows, as_json)
    if not as_json and (unsent := len(spool.waiting(spool.folder()))):
        typer.echo(f"\n{unsent} runs are not in MLflow yet: pipeline sync")


def _rows(layout: Layout) -> list[list[Any]]:
    from pipeline.layout import project_root
    from pipeline.stage import ORDER
    from pipeline.tracking import ledger

    name = "." if layout.root.resolve() == project_root() else layout.name
    rows = []
    for stage in ORDER:
        by = ledger.maker(layout, stage)
        made = datetime.fromtimestamp(by["at"] / 1000).isoformat(" ", "seconds") if by else ""
        commit = by["commit"][:7] if by else ""
        rows.append([name, stage, _state(layout, stage), made, commit, by["name"] if by else ""])
    return rows


def _state(layout: Layout, stage: str) -> str:
    """Where the stage stands. Of ``dvc repro`` at work nothing is known: it reads as cut off."""
    if layout.last_written(stage).is_file():
        return "done"
    if stage == "finetune" and layout.last_written("evaluate").is_file():
        return "no task"
    if not any(path.exists() for path in layout.outputs(stage)):
        return "not yet"
    return "at work" if _locked(layout) else "cut off"


def _locked(layout: Layout) -> bool:
    from filelock import FileLock, Timeout

    lock = layout.root / ".lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
