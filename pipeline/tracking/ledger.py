"""Which tracked run made what: beside the results of a folder, and for the whole project by what was made.

A stage that DVC takes from its cache, and an experiment that it ran elsewhere, leave no run here: what they
leave is known by its digest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.layout import Layout
from pipeline.tracking.store import mlruns

FILE = "made.jsonl"


def note(layout: Layout, stage: str, entry: dict[str, Any]) -> None:
    """Notes the run that is at the stage's results now, so that a resumed one finds it."""
    _write(layout, noted(layout) | {stage: entry})


def forget(layout: Layout, stage: str) -> None:
    """Takes back what was noted of the stage: no tracked run has made what lies there now."""
    every = noted(layout)
    if every.pop(stage, None):
        _write(layout, every)


def _write(layout: Layout, every: dict[str, dict[str, Any]]) -> None:
    part = layout.ledger.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    part.replace(layout.ledger)


def noted(layout: Layout) -> dict[str, dict[str, Any]]:
    """What was noted, by stage; empty where nothing was, or it cannot be read."""
    try:
        found = json.loads(layout.ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def made(layout: Layout, stage: str) -> None:
    """Notes for the project that the run which was noted has made what the stage has written."""
    entry, digest = noted(layout).get(stage), _digest(layout.last_written(stage))
    if entry is None or digest is None:
        return
    path = mlruns() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"digest": digest, "stage": stage, "name": f"{layout.name}/{stage}", **entry}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def maker(layout: Layout, stage: str) -> dict[str, Any] | None:
    """The run that made what lies there; None where nothing lies there, or nobody noted it."""
    digest = _digest(layout.last_written(stage))
    path = mlruns() / FILE
    if digest is None or not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = [line for line in lines if (line["digest"], line["stage"]) == (digest, stage)]
    own = [line for line in found if line["name"] == f"{layout.name}/{stage}"]
    every: list[dict[str, Any] | None] = [None, *found, *own]
    return every[-1]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
