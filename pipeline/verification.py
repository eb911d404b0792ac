"""Tries every installed plugin, so that a broken one is a row in a table before it is a surprise in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.entry_points import Plugin, ambiguous, imported, installed
from pipeline.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """What came of trying a plugin: ``error`` is the line that a user who chooses it would get, or empty."""

    plugin: Plugin
    error: str


def verify() -> list[Verdict]:
    """Imports every plugin, and builds every optimizer for a few coordinates. Nothing is raised."""
    plugins = installed()
    return [Verdict(plugin, _error(plugin, plugins)) for plugin in plugins]


def _error(plugin: Plugin, plugins: list[Plugin]) -> str:
    rivals = [other for other in plugins if (other.kind, other.name) == (plugin.kind, plugin.name)]
    try:
        if len(rivals) > 1:
            raise ambiguous(rivals)
        _try(plugin, imported(plugin))
    except UserError as error:
        return str(error)
    return ""


def _try(plugin: Plugin, target: Any) -> None:
    if not callable(target):
        raise UserError(f"{plugin} names a {type(target).__name__}, which cannot be called")
    try:
        if plugin.kind == "optimizer":
            from pipeline.registry import try_out

            try_out(plugin.name, target)
        elif plugin.kind == "task":
            from pipeline.tasks.base import Task

            if not isinstance(target(), Task):
                raise UserError(f"{plugin} lacks methods of a Task")
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{plugin} cannot be built: {said}") from error
