"""From ``backend[:Name][,key=value…]`` to an optimizer.

A backend is any callable ``backend(problem, *, option=default, …)`` that returns an `Optimizer` or an
`AskTell`. If it has variants (``cmaes:SepCMA``, ``nevergrad:DE``) it takes the keyword ``name``. Options are
checked against its signature; one that takes ``**options`` checks them itself and raises `UserError`.
A backend whose memory grows with the space has a function attribute
``memory_bytes(problem, *, name=None, **options) -> int``, asked before anything is built. One with variants
has a function attribute ``variants() -> list[Variant]``, which ``pipeline plugins BACKEND`` shows; one that
takes one of them by itself where none is named has ``choose(problem, **options) -> (name, why)``. One whose
options are 0 for "the space's own" has ``defaults(space, name) -> {option: value}``: where tuning starts.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.entry_points import load
from pipeline.errors import Unsuitable, UserError, nearest

if TYPE_CHECKING:
    import torch

    from pipeline.optimizer import Optimizer, Problem


@dataclass(frozen=True)
class Spec:
    """A parsed ``backend[:Name][,key=value…]``; ``str()`` gives it back."""

    backend: str
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parses a spec. Values are Python literals where they look like one, else plain strings.

        A value in quotes is what stands between them, commas and plus signs too.

        Raises:
            UserError: an option without ``=``, or an empty backend.
        """
        head, *pairs = split_unquoted(text, re.compile(","))
        backend, _, name = head.partition(":")
        if not backend.strip():
            raise UserError(f"'{text}' names no backend; write backend[:Name][,key=value…]")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise UserError(f"option '{pair}' in '{text}' is not key=value")
            options[key.strip()] = _literal(value.strip())
        return cls(backend.strip(), name.strip() or None, options)

    def __str__(self) -> str:
        head = self.backend + (f":{self.name}" if self.name else "")
        return ",".join([head, *(f"{key}={_written(value)}" for key, value in self.options.items())])


_QUOTED = re.compile(r"""=\s*('[^']*'|"[^"]*")""")


def split_unquoted(text: str, separator: re.Pattern[str]) -> list[str]:
    """``text`` split at ``separator``, but not within a value in quotes."""
    hidden = _QUOTED.sub(lambda found: "=" + "\0" * (len(found[0]) - 1), text)
    parts, begin = [], 0
    for found in separator.finditer(hidden):
        parts.append(text[begin : found.start()])
        begin = found.end()
    return [*parts, text[begin:]]


def _written(value: Any) -> str:
    if not isinstance(value, str) or (_literal(value) == value and not re.search("[,+]", value)):
        return str(value)
    return f'"{value}"' if "'" in value else f"'{value}'"


def _literal(text: str) -> Any:
    if len(text) > 1 and _QUOTED.fullmatch("=" + text):
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


@dataclass(frozen=True)
class Variant:
    """A name that a backend takes behind its colon, as a person chooses it.

    ``family`` groups names that are alike; ``options`` are those of this variant with their defaults;
    ``note`` is what else to know, such as the package it misses, or empty.
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def create(spec: Spec, problem: Problem, defaults: dict[str, Any] | None = None) -> Optimizer:
    """Builds the optimizer a spec names, for a problem.

    ``defaults`` are offered, not imposed: each reaches the backend only if its signature names it and the
    spec does not set it.

    Raises:
        UserError: unknown backend, name or option, or a space the method cannot hold in memory.
    """
    return _created(spec, load("optimizer", spec.backend), problem, defaults or {})


def try_out(name: str, backend: Any) -> None:
    """Builds ``backend``, or the first of its variants that can be had, for a few coordinates.

    Raises:
        UserError: it cannot be built.
    """
    import torch

    from pipeline.optimizer import Problem

    problem = Problem(8, "head", 1000, 0, torch.device("cpu"))
    variants = [each.name for each in variants_of(backend) if not each.note]
    _created(Spec(name, variants[0] if variants else None), backend, problem, {})


def variants_of(backend: Any) -> list[Variant]:
    """What may follow the backend's colon; empty where it has no variants, or does not say."""
    declare = getattr(backend, "variants", None)
    return list(declare()) if declare else []


def catalogue(backend: Any) -> list[Variant]:
    """`variants_of` a backend, or one of no name that has the options of its signature."""
    return variants_of(backend) or [Variant("", "", options_of(backend))]


def options_of(backend: Callable[..., Any]) -> dict[str, Any]:
    """The options that a backend's signature names, with their defaults."""
    parameters = inspect.signature(backend).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "name"}


def defaults_of(spec: Spec, space: str) -> dict[str, Any]:
    """The values that a spec's options have in a space of that kind: its own, or the backend's.

    Raises:
        UserError: no such backend.
    """
    backend = load("optimizer", spec.backend)
    declare = getattr(backend, "defaults", None)
    settled = declare(space, spec.name) if declare else {}
    return options_of(backend) | settled | spec.options


def declared_bytes(spec: Spec, backend: Callable[..., Any], problem: Problem) -> int | None:
    """What the optimizer says it will take for ``problem``; None where it says nothing."""
    declare = getattr(backend, "memory_bytes", None)
    return None if declare is None else declare(problem, **check_options("optimizer", spec, backend))


def settle(spec: Spec, problem: Problem, defaults: dict[str, Any] | None = None) -> tuple[Spec, str]:
    """``spec`` with the variant that its backend takes for ``problem`` by itself, and why.

    As it is, and nothing, where it names one or there is nothing to choose.

    Raises:
        UserError: as `create`.
    """
    backend = load("optimizer", spec.backend)
    choose = getattr(backend, "choose", None)
    if spec.name is not None or choose is None:
        return spec, ""
    name, why = choose(problem, **_options(spec, backend, defaults or {}))
    return dataclasses.replace(spec, name=name), why


def _options(spec: Spec, backend: Callable[..., Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The spec's options, and those of ``defaults`` that the backend names and the spec does not set."""
    offered = options_of(backend)
    options = {key: value for key, value in defaults.items() if key in offered and value is not None}
    return options | check_options("optimizer", spec, backend)


def _created(
    spec: Spec, backend: Callable[..., Any], problem: Problem, defaults: dict[str, Any]
) -> Optimizer:
    from pipeline.optimizer import AskTell, AskTellOptimizer, Optimizer

    options = _options(spec, backend, defaults)
    _refuse_too_large(spec, backend, problem, options)
    built = backend(problem, **options)
    if isinstance(built, Optimizer):
        return built
    if isinstance(built, AskTell):
        return AskTellOptimizer(built, problem)
    raise UserError(
        f"optimizer '{spec.backend}' built a {type(built).__name__}, which is neither Optimizer nor AskTell"
    )


def check_options(kind: str, spec: Spec, target: Callable[..., Any]) -> dict[str, Any]:
    """The spec's options, and its ``name`` if it has one, as keywords for ``target``, a plugin of that kind.

    Raises:
        UserError: an option that its signature has not, a value of another type, or a name it does not take.
    """
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options: dict[str, Any] = {}
    for key, value in spec.options.items():
        choices = sorted(options_of(target))
        if key not in choices and not takes_any:
            hint = nearest(key, choices) or f"; it takes {', '.join(choices) or 'no options'}"
            raise UserError(f"{kind} '{spec.backend}' has no option '{key}'{hint}")
        options[key] = _like_default(spec, key, value, parameters.get(key))
    if spec.name is not None:
        if "name" not in parameters:
            raise UserError(
                f"{kind} '{spec.backend}' has no variants; write '{spec.backend}' without ':{spec.name}'"
            )
        options["name"] = spec.name
    return options


def _like_default(spec: Spec, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    """``value`` as the type of the option's default, so that ``epsilon=abc`` fails here, in one line."""
    if parameter is None or not isinstance(parameter.default, bool | int | float | str):
        return value
    wanted = type(parameter.default)
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    infinite = isinstance(value, float) and not math.isfinite(value) and value != parameter.default
    if type(value) is not wanted or infinite:
        raise UserError(f"option '{key}' of '{spec.backend}' takes {wanted.__name__}, not '{value}'")
    return value


def _refuse_too_large(
    spec: Spec, backend: Callable[..., Any], problem: Problem, options: dict[str, Any]
) -> None:
    """Refuses before anything is allocated. ``memory_bytes`` may raise its own, better-worded UserError."""
    import torch

    declare = getattr(backend, "memory_bytes", None)
    if declare is None:
        return
    where = torch.device("cpu") if getattr(backend, "in_host_memory", False) else problem.device
    needed, free = declare(problem, **options), free_bytes(where)
    if needed > free:
        raise Unsuitable(
            f"'{spec}' needs {readable_bytes(needed)} for the {problem.size:,} coordinates of the space "
            f"'{problem.space}' and {readable_bytes(free)} are free; choose a smaller space, such as "
            f"projection,dimension={_fitting_dimension(declare, problem, options, free)}, or a method that "
            "holds less, such as spsa"
        )


def _fitting_dimension(
    declare: Callable[..., int], problem: Problem, options: dict[str, Any], free: int
) -> int:
    """Of 1,000 and 100 the larger that takes less than a tenth of what is free; 10 where neither does."""
    for size in (1000, 100):
        smaller = dataclasses.replace(problem, size=size, space="projection")
        if declare(smaller, **options) < free / 10:
            return size
    return 10


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device`` in bytes, with what torch holds of it and would use again."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    import psutil

    return int(psutil.virtual_memory().available)


def readable_bytes(count: float) -> str:
    """``1536`` → ``1.5 KB``; powers of 1024."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if count < 1024 or unit == "PB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
