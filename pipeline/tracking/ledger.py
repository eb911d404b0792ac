"""Which tracked run made what lies in a folder: one line of JSON a stage, beside its results."""

from __future__ import annotations

import json
from typing import Any

from pipeline.layout import Layout


def note(layout: Layout, stage: str, entry: dict[str, Any]) -> None:
    """Notes the run that now makes the stage's results."""
    every = noted(layout) | {stage: entry}
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
