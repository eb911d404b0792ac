"""The modules that own searched tensors, which read them where the engine says instead of where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.engine.matmul import linear
from pipeline.errors import UserError
from pipeline.space import Searched, Space

Owned = dict[str, Searched]
"""A module's searched tensors, by attribute."""


class Point(Protocol):
    """One candidate or several, at which a forward pass is made."""

    def product(self, module: nn.Module, owned: Owned, inputs: Tensor) -> Tensor:
        """What a linear layer (`nn.Linear`, or transformers' `Conv1D`) gives there."""
        ...

    def rows(self, module: nn.Module, searched: Searched, ids: Tensor) -> Tensor:
        """What a plain embedding gives there."""
        ...

    def run(self, module: nn.Module, owned: Owned, forward: Callable[..., Any], arguments: Arguments) -> Any:
        """What any other module gives there."""
        ...


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def multiplies(module: nn.Module) -> bool:
    """Whether the output is the plain product of the first argument and the weight."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def looks_up_rows(module: nn.Module) -> bool:
    """Whether the output is the weight's rows at the first argument; some subclasses scale or shift them."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None


def normalises(module: nn.Module) -> bool:
    """Whether the output is the last dimension normalised, times the weight, plus the bias: as it is, too."""
    plain = type(module).forward is nn.LayerNorm.forward
    return plain and len(cast(nn.LayerNorm, module).normalized_shape) == 1


def read_of(module: nn.Module) -> dict[str, Any]:
    """What a linear layer reads: its weight, computed if it is quantized, and its bias."""
    given: Any = module
    return {"weight": given.weight, "bias": given.bias}


def weight_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A linear layer's weight as ``[out, in]``; a `Conv1D` keeps it the other way."""
    return weight.T if isinstance(module, Conv1D) else weight


def read_by_children(module: nn.Module, owned: Owned) -> bool:
    """Whether each tensor is a parameter of a module within too: then the outer one only holds its name."""
    within = {
        id(parameter)
        for child in module.modules()
        if child is not module
        for parameter in child._parameters.values()
    }
    return all(id(searched.parameter) in within for searched in owned.values())


@contextmanager
def swapped(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within it, the module's parameters are ``values``."""
    # a plain tensor may stand where a Parameter is declared
    parameters: dict[str, Any] = module._parameters
    stored = {attribute: parameters[attribute] for attribute in values}
    parameters.update(values)
    try:
        yield
    finally:
        parameters.update(stored)


class SearchedModules:
    """Gives every module that owns a searched tensor a forward pass of ours, until it is closed.

    A tied tensor is perturbed alike in each owner.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        self._point: Point | None = None
        self._unread = {searched.name for searched in space.tensors}
        self._checked = False
        by_parameter = {id(searched.parameter): searched for searched in space.tensors}
        self._changed: list[nn.Module] = []
        for module in model.modules():
            owned = {
                attribute: by_parameter[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if parameter is not None and id(parameter) in by_parameter
            }
            if (owned or multiplies(module)) and "forward" not in module.__dict__:
                # a method, so that a copy of the model computes with its own weights
                module.forward = MethodType(self._forward(module, owned), module)
                self._changed.append(module)

    @contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """Within it, the model's forward pass is that of ``point``.

        Raises:
            UserError: a searched tensor is read by no module's own forward pass, so scoring cannot see it.
        """
        self._point = point
        try:
            yield
        finally:
            self._point = None
        if not self._checked and self._unread:
            raise UserError(
                f"the forward pass reads {len(self._unread)} searched tensors through no module of theirs, "
                f"such as {min(self._unread)}: leave them out of the space"
            )
        self._checked = True

    def close(self) -> None:
        """Takes the model's modules back to what they were."""
        for module in self._changed:
            del module.forward
        self._changed = []

    def _forward(self, module: nn.Module, owned: Owned) -> Callable[..., Any]:
        plain = type(module).forward
        product, rows = multiplies(module), looks_up_rows(module)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            point = self._point if owned else None
            if point is None:
                if product:
                    read = read_of(module)
                    return linear(args[0], weight_of(module, read["weight"]), read["bias"])
                return plain(module, *args, **kwargs)
            if not self._checked:
                self._unread.difference_update(searched.name for searched in owned.values())
            if product:
                return point.product(module, owned, args[0])
            if rows:
                return point.rows(module, owned["weight"], args[0])
            return point.run(module, owned, plain, (args, kwargs))

        return forward
