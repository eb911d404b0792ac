"""Text in: fetched, checked, split, described."""

from __future__ import annotations

from pipeline.data.prepare import prepare as prepare_data
from pipeline.stage import Context, script


def prepare(context: Context) -> dict[str, float]:
    """Writes ``data/prepared``: the task's splits, the corpus, and a data card."""
    layout = context.layout
    card = prepare_data(context.config, layout)
    context.tracker.artifact(layout.prepared / "card.md")
    context.tracker.artifact(layout.prepared / "card.json")
    context.say(f"prepare: {layout.prepared} (data card: {layout.prepared / 'card.md'})")
    for note in card.get("notes", []):
        context.say(f"prepare: note: {note}")
    return {}


if __name__ == "__main__":
    script("prepare")
