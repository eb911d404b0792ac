"""A whole comparison, from its plan to what is written of it."""

from __future__ import annotations

from typing import Any

from filelock import FileLock, Timeout

from pipeline.comparison.jobs import Say, run_all
from pipeline.comparison.page import page
from pipeline.comparison.plan import FILE, Plan
from pipeline.comparison.results import collect
from pipeline.comparison.table import markdown
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.strict_json import strict_json

NAME = "comparison"


def compare(plan: Plan, workers: int, say: Say) -> dict[str, Any]:
    """Runs what is left of ``plan`` and writes ``comparison.html``, ``.md`` and ``.json`` into its folder.

    Raises:
        UserError: the folder holds another comparison or is at work, a start that could not be made, or no
            optimizer that came to a result.
    """
    from pipeline.tracking import track

    resume = (plan.root / FILE).is_file()
    plan.keep()
    try:
        with (
            FileLock(plan.root / ".lock", timeout=0),
            track("compare", plan.config, Layout(plan.root), resume=resume) as tracker,
        ):
            run_all(plan, workers, tracker.id, say)
            found = collect(plan)
            contents = {
                "html": page(found),
                "md": markdown(found),
                "json": strict_json(found),
            }
            for suffix, text in contents.items():
                path = plan.root / f"{NAME}.{suffix}"
                path.write_text(text, encoding="utf-8")
                tracker.artifact(path)
    except Timeout:
        raise UserError(f"another process is at work in {plan.root}; choose another --name") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on") from None
    if found["reference"] is None:
        reasons = "; ".join(f"{row['name']}: {row['error']}" for row in found["results"] if "error" in row)
        raise UserError(f"no optimizer came to a result: {reasons}")
    return found
