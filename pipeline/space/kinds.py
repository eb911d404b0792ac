"""The kinds of space: the spec that names one, and the parameters of a model that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from pipeline.errors import Unsuitable, UserError, nearest, unknown
from pipeline.models import quantized
from pipeline.models.prompt import NAME, embedding_scale
from pipeline.registry import Spec
from pipeline.space.projection import Projection
from pipeline.space.searched import Space
from pipeline.tasks.base import TaskModel

OPTIONS: dict[str, dict[str, int | float]] = {
    "full": {"encoder_scale": 1.0},
    "biases": {"encoder_scale": 1.0},
    "norms": {"encoder_scale": 1.0},
    "head": {},
    "lora": {"rank": 8, "encoder_scale": 1.0},
    "projection": {"dimension": 1000},
    "prompt": {"tokens": 10, "dimension": 500, "encoder_scale": 1.0},
}
_EVERY_WEIGHT = ("full", "projection")
_MAY_BE_ZERO = {("prompt", "dimension")}  # the prompt's elements themselves


def parse(text: str) -> Spec:
    """A space's spec with its defaults filled in.

    Raises:
        UserError: unknown space or option, or an option of another kind or out of its range.
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
    zero = (space, key) in _MAY_BE_ZERO
    if not number or value < 0 or (value == 0 and not zero) or (wanted is int and value != int(value)):
        kind = "positive whole number" if wanted is int else "positive number"
        raise UserError(
            f"option '{key}' of space '{space}' takes a {kind}{' or 0' if zero else ''}, not '{value}'"
        )
    return int(value) if wanted is int else float(value)


def check_held(spec: Spec, coded: bool) -> None:
    """Raises Unsuitable for a space that moves every weight, where those of linear layers are quantized."""
    if coded and spec.backend in _EVERY_WEIGHT:
        raise Unsuitable(
            f"the space '{spec.backend}' moves every weight, and int8 and int4 hold them as they are: "
            "choose the space lora, norms, biases, prompt or head, or set dtype=float32"
        )


def build(spec: Spec, model: TaskModel, seed: int) -> Space:
    """The space a spec names, over a model that `prepare_model` has seen.

    Raises:
        UserError: the model has no such parameters, or holds them quantized.
    """
    check_held(spec, any(quantized.quantized(model)))
    if spec.backend == "projection":
        return Projection("projection", _searched(model, "full", 1.0), spec.options["dimension"], seed)
    if spec.backend == "prompt":
        return _of_prompt(spec, model, seed)
    scale = spec.options.get("encoder_scale", 1.0)
    return Space(spec.backend, _searched(model, spec.backend, scale), seed)


def prepare_model(spec: Spec, model: TaskModel, seed: int) -> None:
    """Adds what a space needs to the model: the factors of ``lora``, the vectors of ``prompt``.

    Raises:
        UserError: a model that cannot have a prompt.
    """
    if spec.backend == "lora":
        model.add_lora(spec.options["rank"], seed)
    if spec.backend == "prompt":
        model.add_prompt(spec.options["tokens"], seed)


def _of_prompt(spec: Spec, model: TaskModel, seed: int) -> Space:
    """A unit of a coordinate moves its elements by as much as words differ, whatever the dimension."""
    unit = spec.options["encoder_scale"] * embedding_scale(model.encoder)
    [(name, vectors, unit)] = _searched(model, "prompt", unit)
    dimension = min(spec.options["dimension"], vectors.numel())
    if not dimension:
        return Space("prompt", [(name, vectors, unit)], seed)
    column = math.sqrt(vectors.numel() / dimension)  # a projection's own columns are of length one
    return Projection("prompt", [(name, vectors, unit * column)], dimension, seed)


def _searched(model: TaskModel, kind: str, encoder_scale: float) -> Iterator[tuple[str, nn.Parameter, float]]:
    head = {id(parameter) for parameter in model.head_parameters()}
    norms = {id(parameter) for parameter in _of_norms(model)} if kind == "norms" else set()
    for name, parameter in model.named_parameters():
        wanted = (
            kind == "full"
            or (kind != "prompt" and id(parameter) in head)
            or (kind == "biases" and name.endswith("bias"))
            or id(parameter) in norms
            or (kind == "lora" and ".lora_" in name)
            or (kind == "prompt" and name.endswith(f"{NAME}.vectors"))
        )
        if wanted and parameter.is_floating_point():
            yield name, parameter, 1.0 if id(parameter) in head else encoder_scale


def _of_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """Scales and shifts of the layers that normalise: LayerNorm, RMSNorm, whatever a model calls its own."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            yield from module.parameters(recurse=False)
