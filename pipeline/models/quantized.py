"""Weights that are held in 8 or 4 bits and stay as they are, under what is searched in float32.

torch's parametrizations do the work: a layer keeps its class, and its ``weight``, which is computed from the
codes when the layer reads it. Activations are not rounded: it is by the loss's small changes that a search
by forward passes finds its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

GROUP = 32  # weights of a row that share a scale, in 4 bits
_LEAST_SCALE = 2.0**-24  # above 0, of float16


class Codes(nn.Module):
    """How a matrix ``[out, in]`` is held; a `Conv1D` keeps its own the other way round."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight: Any = module.weight
        self._turned = isinstance(module, Conv1D)
        self._columns: int = weight.shape[0 if self._turned else 1]

    def forward(self, *held: Tensor) -> Tensor:
        """The layer's weight in float32."""
        weight = self.decoded(*held)
        return weight.T if self._turned else weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What is held of the layer's weight."""
        return self.encoded((weight.T if self._turned else weight).float())

    def encoded(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What is held of float32 ``[out, in]``."""
        raise NotImplementedError

    def decoded(self, *held: Tensor) -> Tensor:
        """float32 ``[out, in]`` of it."""
        raise NotImplementedError


class Int8(Codes):
    """w ≈ scale · code: int8 codes, and a float32 scale of each row."""

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = weight / scale.clamp(min=torch.finfo(scale.dtype).tiny)
        return codes.round_().clamp_(-127, 127).to(torch.int8), scale

    def decoded(self, *held: Tensor) -> Tensor:
        codes, scale = held
        return codes.float().mul_(scale)


class Int4(Codes):
    """w ≈ least + scale · code: codes of 0 to 15, two in a byte, and two float16 numbers for each group.

    That is 5 bits a weight, as in llama.cpp's Q4_1. A row's last group is filled up with its last weight.
    """

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        filled = nn.functional.pad(weight, (0, -weight.shape[1] % GROUP), mode="replicate")
        groups = filled.view(len(filled), -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale, least = ((high - low) / 15).half(), low.half()
        codes = (groups - least) / scale.float().clamp(min=_LEAST_SCALE)
        first, second = codes.round_().clamp_(0, 15).to(torch.uint8).chunk(2, -1)
        return first | second << 4, scale, least

    def decoded(self, *held: Tensor) -> Tensor:
        packed, scale, least = held
        codes = torch.cat((packed & 15, packed >> 4), -1).float()
        return torch.addcmul(least.float(), codes, scale.float()).flatten(1)[:, : self._columns]


FORMATS: dict[str, type[Codes]] = {"int8": Int8, "int4": Int4}


def quantize(model: Any, name: str) -> None:
    """Holds the linear layers below a transformers model's head as ``name`` says; all else becomes float32.

    In place, a layer at a time. Codes are buffers, not parameters: nothing trains or searches them.
    """
    chosen = set(_below_head(model))
    for module in list(model.modules()):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        if module in chosen:
            codes = FORMATS[name](module)
            weight: Any = module._parameters.pop("weight")
            module.register_buffer("weight", weight.detach())
            parametrize.register_parametrization(module, "weight", codes)


def dequantize(model: nn.Module) -> None:
    """Puts plain float32 weights back, in place, with the values they have."""
    for module in list(quantized(model)):
        parametrize.remove_parametrizations(module, "weight")
        weight: Any = module._buffers.pop("weight")
        module.register_parameter("weight", nn.Parameter(weight.contiguous()))


def quantized(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of the model whose weights are held in codes."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            lists: Any = module.parametrizations
            if isinstance(lists.weight[0], Codes):
                yield module


def _below_head(model: Any) -> Iterator[nn.Module]:
    """Linear layers of the base model, but the one that gives logits, and none that shares its weight."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = model.get_output_embeddings()
    for module in model.base_model.modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        if linear and owners[id(module.weight)] == 1:
            yield module
