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
    str | None, typer.Option(metavar="DIR|ID", help="Model directory, GGUF file, hub id or package:NAME.")
]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Parameters; else params.yaml.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The experiment's seed.")]
