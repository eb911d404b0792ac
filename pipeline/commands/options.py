"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Set a parameter; may be repeated."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID", help="Model directory, GGUF file, hub id or package:NAME; fresh:… for new weights."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Parameters; else params.yaml.")]
Task = Annotated[
    str | None, typer.Option(help="A task of `pipeline tasks`, FILE.py:NAME, or none to pretrain only.")
]
Objective = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="name[,key=value…], FILE.py:NAME, or a sum such as a+0.1*b."),
]
Train = Annotated[str | None, typer.Option(metavar="FILE", help="Labelled text: CSV, TSV, JSONL, Parquet, …")]
HeldOut = Annotated[str | None, typer.Option(metavar="FILE", help="Else held out of the training text.")]
Text = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column that holds the text.")]
Label = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column that holds the label.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The experiment's seed.")]
