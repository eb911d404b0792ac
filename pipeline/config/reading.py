"""Configurations from YAML, from nested values and from ``section.key=value``; each way the same checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.config.checking import built
from pipeline.config.schema import Config
from pipeline.errors import UserError, nearest

MAPPINGS = (
    "finetune.descriptions",
    "finetune.verbalizers",
)  # parameters whose own keys can be set one by one
_PLACE = re.compile(r"finetune\.then\[(\d+)\]")


def read(path: Path) -> Config:
    """The configuration a YAML file describes; what it leaves out keeps its default.

    Raises:
        UserError: no such file, not YAML, or a key or value that does not fit.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; pass --config FILE") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path} must map section names to values")
    return build(content or {}, source=str(path))


def build(content: dict[str, Any], source: str) -> Config:
    """A configuration from nested plain values; ``source`` names them in errors.

    Raises:
        UserError: a key or value that does not fit.
    """
    config: Config = built(Config, content, where="", source=source)
    if config.tune.enabled and config.finetune.then:
        raise UserError(f"{source}: tune searches one phase, and finetune.then names more: set it to []")
    return config


def write(config: Config, path: Path) -> None:
    """Writes the configuration as YAML."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def override(config: Config, assignments: list[str], flags: dict[str, Any] | None = None) -> Config:
    """``config`` with ``flags`` (as `updated` takes them), then each ``section.key=value`` applied.

    Values are read as YAML. What does not fit together is looked for when all are applied.

    Raises:
        UserError: an assignment without ``=``, an unknown key (the nearest is named), or a wrong type.
    """
    import yaml

    values: dict[str, Any] = dict(flags or {})
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"'-S {assignment}' is not section.key=value")
        try:
            values[path.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # a ValueError is a date that is none
            raise UserError(f"'-S {assignment}': the value is not readable YAML") from None
    return updated(config, values, source="the command line")


def updated(config: Config, values: dict[str, Any], source: str) -> Config:
    """``config`` with ``{"section.key": value}`` applied; ``source`` names them in errors.

    ``finetune.descriptions.LABEL`` sets one description, ``finetune.then[0].KEY`` one value of a phase.

    Raises:
        UserError: an unknown key (the nearest is named), or a wrong type.
    """
    content, known = config.to_dict(), config.flat()
    for path, value in values.items():
        section, _, key = path.partition(".")
        key, dot, inner = key.partition(".")
        if path in known and not key:
            content[section] = value
        elif path in known:
            content[section][key] = value
        elif dot and f"{section}.{key}" in MAPPINGS and isinstance(content[section][key], dict | None):
            content[section][key] = {**(content[section][key] or {}), inner: value}
        elif inner and (place := _PLACE.fullmatch(f"{section}.{key}")):
            _phase_at(content["finetune"]["then"], int(place[1]), source)[inner] = value
        else:
            hint = nearest(path, known) or "; see docs/parameters.md"
            if dot and f"{section}.{key}" in known:
                hint = (
                    f"; '{section}.{key}' is one value, with its options in it: {section}.{key}=NAME,option=1"
                )
                if key not in ("optimizer", "space"):
                    hint = f"; '{section}.{key}' is one value"
            raise UserError(f"{source}: unknown parameter '{path}'{hint}")
    return build(content, source)


def _phase_at(phases: Any, place: int, source: str) -> dict[str, Any]:
    if not isinstance(phases, list) or place >= len(phases) or not isinstance(phases[place], dict):
        count = len(phases) if isinstance(phases, list) else 0
        raise UserError(f"{source}: there is no finetune.then[{place}]: it has {count} phases, from [0] on")
    phase: dict[str, Any] = phases[place]
    return phase
