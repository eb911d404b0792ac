"""The comparison as one HTML file: tables and curves, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.comparison import table
from pipeline.comparison.plots import curves
from pipeline.comparison.results import METRIC

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #6a7078; --line: #d9dde2; --ground: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa1aa; --line: #363b42; --ground: #15181c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem }
p, ul { max-width: 46rem; color: var(--soft) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100% }
th, td { padding: .4rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.said { text-align: left; white-space: normal; color: var(--soft) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem 2rem }
.plots svg { width: 100%; height: auto }
"""


def page(found: dict[str, Any]) -> str:
    """The whole file."""
    parts = ["<h1>Comparison</h1>", *(f"<p>{_prose(note)}</p>" for note in table.notes(found))]
    parts.append(_table(table.results(found)))
    if found["curves"]:
        parts += ["<h2>Against forward passes</h2>", _plots(found, "forward_passes")]
        parts += [
            "<h2>Against time</h2>",
            f"<p>{table.TIMED}</p>",
        ]
        parts += [_plots(found, "seconds"), _table(table.cost(found))]
    if found["tuned"]:
        lines = "\n".join(f"<li>{escape(line)}</li>" for line in table.tuned_to(found))
        parts += ["<h2>Tuned to</h2>", f"<ul>\n{lines}\n</ul>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _plots(found: dict[str, Any], by: str) -> str:
    return f'<div class="plots">{"".join(curves(found, figure, by) for figure in ("loss", METRIC))}</div>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _cells(row: Sequence[str]) -> str:
    if row[1].startswith("not run"):
        return f'<td>{escape(row[0])}</td><td class="said" colspan="{len(row) - 1}">{escape(row[1])}</td>'
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _prose(text: str) -> str:
    """Markdown's backquotes are all that a note has of it."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
