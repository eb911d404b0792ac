"""The search for fine-tuning's parameters, where it is switched on."""

from __future__ import annotations

from pipeline.stage import Context, script
from pipeline.tuned import write
from pipeline.tuning.run import search


def tune(context: Context) -> dict[str, float]:
    """Writes ``tuned.json``: what was found, or nothing where tuning is not enabled."""
    config, layout = context.config, context.layout
    if not config.tune.enabled or config.prepare.task == "none":
        write(layout.tuned, {})
        return {}
    found = search(context)
    write(layout.tuned, found)
    return {"tune/trials": found["trials"], f"tune/{config.tune.by}": found["value"]}


if __name__ == "__main__":
    script("tune")
