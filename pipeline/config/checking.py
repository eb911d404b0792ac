"""Values held against the type and the bounds of their field: here, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from dataclasses import fields
from typing import Any

from pipeline.config.schema import PHASE, FinetuneConfig
from pipeline.errors import UserError, nearest


def built(cls: type, content: dict[str, Any], where: str, source: str) -> Any:
    """The dataclass ``cls`` from ``content``; errors name where it is, and its ``source``.

    Raises:
        UserError: a key or value that does not fit.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    bounds = {f.name: f.metadata.get("within") for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        full = f"{where}{key}"
        if key not in names:
            hint = (
                nearest(str(key), names)
                or f"; '{where.rstrip('.') or 'the top level'}' takes {', '.join(names)}"
            )
            raise UserError(f"{source}: unknown parameter '{full}'{hint}")
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise UserError(f"{source}: '{full}' is a section, not a value")
            values[key] = built(typing.cast(type, wanted), value, f"{full}.", source)
        else:
            checked = _checked(full, value, wanted, source)
            values[key] = _in_bounds(full, checked, bounds.get(key), source)
    return cls(**values)


def _checked(name: str, value: Any, wanted: Any, source: str) -> Any:
    """``value`` as ``wanted``, or the one line that says what was expected.

    YAML 1.1 reads ``1e-3`` as text; a float field takes it as the number it plainly is.
    """
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    plain = typing.get_origin(kind) or kind
    if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if plain is list and isinstance(value, str):
        value = [value]
    if type(value) is not plain:
        shown = " ".join(str(value).split())
        raise UserError(f"{source}: '{name}' takes {_readable(kind)}, not '{shown:.80}'")
    if plain is list and typing.get_args(kind) != (str,):
        return [_phase(f"{name}[{place}]", each, source) for place, each in enumerate(value)]
    if plain is list:
        return [_text(name, each, source) for each in value]
    if plain is dict:
        return {_text(name, key, source): _text(name, each, source) for key, each in value.items()}
    return value


def _phase(name: str, content: Any, source: str) -> dict[str, Any]:
    """What a phase says, checked as finetune's own parameters are."""
    if not isinstance(content, dict):
        raise UserError(f"{source}: '{name}' takes a phase such as {{optimizer: spsa}}, not '{content}'")
    for key in content:
        if key not in PHASE:
            hint = nearest(str(key), PHASE) or f"; it takes {', '.join(PHASE)}"
            raise UserError(f"{source}: a phase cannot say '{name}.{key}'{hint}")
    phase = built(FinetuneConfig, content, f"{name}.", source)
    return {key: getattr(phase, key) for key in content}


def _text(name: str, value: Any, source: str) -> str:
    """An element of a list or a mapping: text, or a whole number as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        # YAML reads an unquoted yes or no as true or false, and 1.10 as 1.1
        raise UserError(f"{source}: '{name}' takes texts, not '{value}'; write it in quotes")
    return str(value)


def _in_bounds(name: str, value: Any, bounds: tuple[float, float] | None, source: str) -> Any:
    if bounds is None or value is None:
        return value
    low, high = bounds
    if not low <= value <= high or value == float("inf"):
        wanted = f"at least {low:g} and finite" if isinstance(value, float) else f"at least {low:g}"
        wanted = wanted if high == float("inf") else f"from {low:g} to {high:g}"
        raise UserError(f"{source}: '{name}' must be {wanted}, got {value}")
    return value


def _readable(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind == list[dict[str, Any]]:
        return "a list of phases"
    origin = typing.get_origin(kind) or kind
    return names.get(origin, {list: "a list of texts", dict: "a mapping of texts"}.get(origin, str(kind)))
