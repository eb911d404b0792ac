"""``pipeline register``: a run's model as a version in MLflow's registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.layout import Layout


def register(
    run: Annotated[str, typer.Argument(help="A run's name or folder; '.' is the last dvc repro.")],
    name: Annotated[str, typer.Option("--as", metavar="MODEL", help="The registered model's name.")],
) -> None:
    """Register the model that a run made: its save_pretrained directory becomes the next version of MODEL.

    \b
    pipeline register spsa-1 --as sentiment
    """
    from pipeline import runs
    from pipeline.tracking.store import PATIENCE, QUIET, store_uri

    layout = runs.find(run)
    folder = _model(layout)
    identity = _tracked(layout, folder)
    os.environ.update({**PATIENCE, **os.environ, **QUIET})  # before mlflow is imported
    from pipeline.tracking.book import Book, Rejected

    try:
        version = Book(store_uri(), None).register(identity, folder, name)
    except Rejected as error:
        raise UserError(f"MLflow does not register {folder}: {error}") from None
    except Exception as error:  # whatever a store may raise
        raise UserError(f"{store_uri()} cannot be reached: {' '.join(str(error).split()):.200}") from None
    typer.echo(f"{name}, version {version}: models:/{name}/{version}. Review: pipeline ui")


def _model(layout: Layout) -> Path:
    """The last model that the run made.

    Raises:
        UserError: there is none, or its weights were left out.
    """
    made = [folder for folder in (layout.finetuned, layout.pretrained) if (folder / "config.json").is_file()]
    if not made:
        raise UserError(f"{layout.root} holds no model yet: neither pretrain nor finetune has run")
    if not list(made[0].rglob("*.safetensors")):
        raise UserError(
            f"{made[0]} holds no weights, as every trial of a study; "
            f"rebuild them with pipeline replay {layout.root} --stage finetune --out DIR"
        )
    return made[0]


def _tracked(layout: Layout, folder: Path) -> str:
    """The tracked run that made the model.

    Raises:
        UserError: there is none.
    """
    from pipeline.tracking import ledger

    stage = "finetune" if folder == layout.finetuned else "pretrain"
    made: dict[str, Any] | None = ledger.maker(layout, stage)
    if made is None:
        raise UserError(f"no tracked run made {folder}: pipeline status says what comes from where")
    return str(made["run"])
