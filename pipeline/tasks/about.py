"""What a task tells a person of itself: `pipeline tasks` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A task's class may have one as its attribute ``about``.

    ``data`` is what its rows hold, ``models`` which architectures it takes, ``objectives`` and ``metrics``
    the names that suit it, ``example`` a command.
    """

    data: str
    models: str
    objectives: tuple[str, ...]
    metrics: tuple[str, ...]
    example: str
