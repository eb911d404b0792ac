"""The kinds of space: the spec that names one, and the parameters of a model that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from pipeline.errors import UserError, nearest, unknown
from pipeline.registry import Spec
from pipeline.space.projection import Projection
from pipeline.space.searched import Space
from pipeline.tasks.base import TaskModel

OPTIONS: dict[str, dict[str, int | float]] = {
    "full": {"encoder_scale": 1.0},
    "biases": {"encoder_scale": 1.0},
    "head": {},
    "lora": {"rank": 8, "encoder_scale": 1.0},
    "projection": {"dimension": 1000},
}


def parse(text: str) -> Spec:
    """A space's spec with its defaults filled in.

    Raises:
        UserError: unknown space or option, or an option that is not a positive whole number.
    """
    spec = Spec.parse(text)
    if spec.backend not in OPTIONS or spec.name:
        raise unknown("space", spec.backend + (f":{spec.name}" if spec.name else ""), OPTIONS)
    known = OPTIONS[spec.backend]
    for key in spec.options:
        if key not in known:
            hint = nearest(key, known) or f"; it takes {', '.join(known) or 'no options'}"
            raise UserError(f"space '{spec.backend}' has no option '{key}'{hint}")
    options = {
        key: _option(spec.backend, key, value, type(known[key])) for key, value in spec.options.items()
    }
    return Spec(spec.backend, None, {**known, **options})


def _option(space: str, key: str, value: Any, wanted: type) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (wanted is int and value != int(value)):
        kind = "whole number" if wanted is int else "number"
        raise UserError(f"option '{key}' of space '{space}' takes a positive {kind}, not '{value}'")
    return int(value) if wanted is int else float(value)


def build(spec: Spec, model: TaskModel, seed: int) -> Space:
    """The space a spec names, over a model that `prepare_model` has seen.

    Raises:
        UserError: the model has no such parameters.
    """
    if spec.backend == "projection":
        return Projection(_searched(model, "full", 1.0), spec.options["dimension"], seed)
    scale = spec.options.get("encoder_scale", 1.0)
    return Space(spec.backend, _searched(model, spec.backend, scale), seed)


def prepare_model(spec: Spec, model: TaskModel, seed: int) -> None:
    """Adds what a space needs to the model: the factors of ``lora``."""
    if spec.backend == "lora":
        model.add_lora(spec.options["rank"], seed)


def _searched(model: TaskModel, kind: str, encoder_scale: float) -> Iterator[tuple[str, nn.Parameter, float]]:
    head = {id(parameter) for parameter in model.head_parameters()}
    for name, parameter in model.named_parameters():
        wanted = (
            kind == "full"
            or id(parameter) in head
            or (kind == "biases" and name.endswith("bias"))
            or (kind == "lora" and ".lora_" in name)
        )
        if wanted and parameter.is_floating_point():
            yield name, parameter, 1.0 if id(parameter) in head else encoder_scale
