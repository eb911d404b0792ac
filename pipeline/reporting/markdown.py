"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """A head and lines under it; the first column stands to the left, figures to the right."""
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' + '---:|' * (len(rows[0]) - 1)}", *lines])
