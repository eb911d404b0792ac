"""``pipeline sync``: sends what an absent tracking server did not get."""

from __future__ import annotations

import os

import typer

from pipeline.errors import UserError


def sync() -> None:
    """Send to MLflow the runs that it could not be told of: its server was away, or its database locked.

    \b
    pipeline sync

    The next run does so too, while it trains.
    """
    from pipeline.tracking import spool
    from pipeline.tracking.store import PATIENCE, QUIET

    unsent = spool.folder()
    before = spool.waiting(unsent)
    if not before:
        typer.echo("nothing waits to be sent")
        return
    os.environ.update({**PATIENCE, **os.environ, **QUIET})  # before mlflow is imported
    from pipeline.tracking.sender import Sender

    said: list[str] = []
    sender = Sender(said.append, unsent)
    while sender.send_one_left_behind():
        pass
    still = spool.waiting(unsent)
    typer.echo(f"{len(set(before) - set(still))} runs of {len(before)} sent")
    if still:
        reason = said[0].split("; what it notes")[0] if said else "another process is at them"
        raise UserError(f"{len(still)} runs wait in {unsent}: {reason}")
    for line in said:
        typer.echo(f"tracking: {line}", err=True)
