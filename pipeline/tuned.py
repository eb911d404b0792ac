"""``tuned.json``: the parameters that tuning found, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout

VALUES = "values"
METHOD = ("optimizer", "space")  # what the values were found for


def with_tuned(config: Config, layout: Layout) -> Config:
    """``config`` with what the run's tune stage found, which is nothing where it was not enabled."""
    return applied(config, layout.tuned) if layout.tuned.is_file() else config


def applied(config: Config, path: Path) -> Config:
    """``config`` with the values of a ``tuned.json``; what was not searched stays.

    Raises:
        UserError: no such file, or values that do not fit.
    """
    return configuration.updated(config, read(path).get(VALUES, {}), source=str(path))


def as_tuned(config: Config, path: Path) -> Config:
    """``config`` with the model, optimizer and space of a ``tuned.json``'s study, and with its values.

    Raises:
        UserError: as `applied`.
    """
    found = read(path)
    known = {f"finetune.{key}": found[key] for key in METHOD if key in found}
    known |= {"model": found["model"]} if "model" in found else {}
    return applied(configuration.updated(config, known, source=str(path)), path)


def check(config: Config, path: Path) -> None:
    """Raises UserError where ``config`` has another optimizer or space than what `as_tuned` gave."""
    meant = as_tuned(config, path)
    for key in METHOD:
        now, tuned = getattr(config.finetune, key), getattr(meant.finetune, key)
        if now != tuned:
            raise UserError(
                f"{path} has values for finetune.{key}={tuned}, now {now}: leave one of the two out"
            )


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: there is no such file, or something else is in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no {path}: `pipeline tune` writes one") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what `pipeline tune` writes; delete it and tune again")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes the file as a whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
