"""Plugins of every kind, built-ins included: found without an import, loaded when chosen.

A distribution offers one by an entry point in the kind's group; a user's own file is one by its path
(`pipeline.user_code`). What stands behind it may have an attribute
``api_version``, the version of the plugin interface it was written for; without one it is taken to fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipeline import user_code
from pipeline.errors import UserError, unknown

API_VERSION = 1
GROUPS = {
    "optimizer": "pipeline.optimizers",
    "task": "pipeline.tasks",
    "objective": "pipeline.objectives",
    "stage": "pipeline.stages",
}


@dataclass(frozen=True)
class Plugin:
    """One entry point: its kind and name, the object it names, and the distribution it came with."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    entry_point: metadata.EntryPoint

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}' ({self.distribution} {self.version})"


def installed(kinds: Iterable[str] = GROUPS) -> list[Plugin]:
    """Every installed plugin of ``kinds``, by kind and name. Of one name there may be several."""
    found: dict[tuple[str, ...], Plugin] = {}
    for kind in kinds:
        for entry in metadata.entry_points(group=GROUPS[kind]):
            dist = entry.dist
            name, version = (dist.name, dist.version) if dist else ("?", "?")
            # a distribution may be found twice, by an editable install and by its folder
            found[kind, entry.name, entry.value, name] = Plugin(
                kind, entry.name, entry.value, name, version, entry
            )
    order = list(GROUPS)
    return sorted(found.values(), key=lambda p: (order.index(p.kind), p.name, p.distribution))


def load(kind: str, name: str) -> Any:
    """The object behind the plugin ``name``, or that of the file and name ``./file.py:name``.

    Raises:
        UserError: there is none (the nearest is named) or more than one, its import failed (chained), or it
            is of another interface.
    """
    if reference := user_code.Reference.parse(name):
        return user_code.load(kind, reference)
    user_code.check_named(kind, name)
    by_name: dict[str, list[Plugin]] = {}
    for plugin in installed([kind]):
        by_name.setdefault(plugin.name, []).append(plugin)
    if name not in by_name:
        raise unknown(kind, name, by_name)
    first, *others = by_name[name]
    if others:
        raise ambiguous([first, *others])
    return imported(first)


def ambiguous(rivals: list[Plugin]) -> UserError:
    """The error for a name that several distributions offer."""
    offers = " and ".join(f"{p.distribution} {p.version}" for p in rivals)
    return UserError(f"{rivals[0].kind} '{rivals[0].name}' is offered by {offers}; uninstall all but one")


def imported(plugin: Plugin) -> Any:
    """The object behind the plugin.

    Raises:
        UserError: its import failed (chained), or it is of another interface.
    """
    try:
        target = plugin.entry_point.load()
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{plugin} failed to import: {said}; mend or uninstall {plugin.distribution}"
        ) from error
    wanted = getattr(target, "api_version", API_VERSION)
    if wanted != API_VERSION:
        older = "pipeline" if isinstance(wanted, int) and wanted > API_VERSION else plugin.distribution
        raise UserError(
            f"{plugin} is written for version {wanted} of the plugin interface, this pipeline has "
            f"{API_VERSION}; upgrade {older}"
        )
    return target
