"""Entry points to optimizers: ``backend[:Name][,key=value…]``.

Built-ins come through the same door as anybody's: the entry-point group ``pipeline.optimizers``. Listing
imports nothing; a backend is imported when it is chosen.

A backend is any callable ``backend(problem, *, option=default, …)`` that returns an `Optimizer` or an
`AskTell`. If it has variants (``cmaes:SepCMA``, ``nevergrad:DE``) it takes the keyword ``name``. Options are
checked against its signature; one that takes ``**options`` checks them itself and raises `UserError`.
A backend whose memory grows with the space has a function attribute
``memory_bytes(problem, *, name=None, **options) -> int``, asked before anything is built. One with variants
has a function attribute ``variants() -> list[Variant]``, which ``pipeline plugins BACKEND`` shows.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, nearest, unknown

if TYPE_CHECKING:
    import torch

    from pipeline.optimizer import Optimizer, Problem

GROUP = "pipeline.optimizers"


@dataclass(frozen=True)
class Spec:
    """A parsed ``backend[:Name][,key=value…]``; ``str()`` gives it back."""

    backend: str
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parses a spec. Values are Python literals where they look like one, else plain strings.

        Raises:
            UserError: an option without ``=``, or an empty backend.
        """
        head, *pairs = text.split(",")
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
        return ",".join([head, *(f"{key}={value}" for key, value in self.options.items())])


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
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


@dataclass(frozen=True)
class Plugin:
    """One entry point: its name, the object it names, and the distribution it came with."""

    name: str
    target: str
    distribution: str
    version: str
    entry_point: metadata.EntryPoint


def plugins(group: str = GROUP) -> list[Plugin]:
    """Every installed plugin of ``group``, by name, without importing one.

    Raises:
        UserError: two distributions offer the same name.
    """
    found: dict[str, Plugin] = {}
    for entry in metadata.entry_points(group=group):
        dist = entry.dist
        plugin = Plugin(
            entry.name, entry.value, dist.name if dist else "?", dist.version if dist else "?", entry
        )
        other = found.get(entry.name)
        if other and (other.distribution, other.target) != (plugin.distribution, plugin.target):
            raise UserError(
                f"two distributions offer the optimizer '{entry.name}': {other.distribution} and "
                f"{plugin.distribution}; uninstall one"
            )
        found[entry.name] = plugin
    return [found[name] for name in sorted(found)]


def load(backend: str) -> Callable[..., Any]:
    """Imports the backend of that name.

    Raises:
        UserError: no such backend (the nearest is named), or its import failed (chained).
    """
    installed = {plugin.name: plugin for plugin in plugins()}
    if backend not in installed:
        raise unknown("optimizer", backend, installed)
    plugin = installed[backend]
    try:
        target: Callable[..., Any] = plugin.entry_point.load()
    except Exception as error:
        raise UserError(
            f"optimizer '{backend}' ({plugin.distribution} {plugin.version}) failed to import: "
            f"{type(error).__name__}: {error}"
        ) from error
    return target


def create(spec: Spec, problem: Problem, defaults: dict[str, Any] | None = None) -> Optimizer:
    """Builds the optimizer a spec names, for a problem.

    ``defaults`` are offered, not imposed: each reaches the backend only if its signature names it and the
    spec does not set it.

    Raises:
        UserError: unknown backend, name or option, or a space the method cannot hold in memory.
    """
    from pipeline.optimizer import AskTell, AskTellOptimizer, Optimizer

    backend = load(spec.backend)
    options = _checked_options(spec, backend, defaults or {})
    _refuse_too_large(spec, backend, problem, options)
    built = backend(problem, **options)
    if isinstance(built, Optimizer):
        return built
    if isinstance(built, AskTell):
        return AskTellOptimizer(built, problem)
    raise UserError(
        f"optimizer '{spec.backend}' built a {type(built).__name__}, which is neither Optimizer nor AskTell"
    )


def _checked_options(spec: Spec, backend: Callable[..., Any], defaults: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(backend).parameters
    named = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = {key: value for key, value in defaults.items() if key in named and value is not None}
    for key, value in spec.options.items():
        if key not in named - {"name"} and not takes_any:
            choices = sorted(named - {"name"})
            hint = nearest(key, choices) or f"; it takes {', '.join(choices) or 'no options'}"
            raise UserError(f"optimizer '{spec.backend}' has no option '{key}'{hint}")
        options[key] = _like_default(spec, key, value, parameters.get(key))
    if spec.name is not None:
        if "name" not in named:
            raise UserError(
                f"optimizer '{spec.backend}' has no variants; write '{spec.backend}' without ':{spec.name}'"
            )
        options["name"] = spec.name
    return options


def _like_default(spec: Spec, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    """``value`` as the type of the option's default, so that ``epsilon=abc`` fails here, in one line."""
    if parameter is None or not isinstance(parameter.default, bool | int | float | str):
        return value
    wanted = type(parameter.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
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
        raise UserError(
            f"'{spec}' needs {readable_bytes(needed)} for the {problem.size:,} coordinates of the space "
            f"'{problem.space}' and {readable_bytes(free)} are free; choose a smaller space, such as "
            f"projection,dimension={_fitting_dimension(declare, problem, options, free)}, or a method that "
            "holds less, such as spsa"
        )


def _fitting_dimension(
    declare: Callable[..., int], problem: Problem, options: dict[str, Any], free: int
) -> int:
    """The largest power of ten, at most 1,000, whose declared memory is under a tenth of what is free."""
    for size in (1000, 100):
        smaller = dataclasses.replace(problem, size=size, space="projection")
        if declare(smaller, **options) < free / 10:
            return size
    return 10


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device`` in bytes."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def readable_bytes(count: float) -> str:
    """``1536`` → ``1.5 KB``; powers of 1024."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if count < 1024 or unit == "PB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
