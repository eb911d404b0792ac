"""The matrix product of a linear layer, by the fastest exact routine of the platform."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_LEAST_ROWS = 16  # with fewer, a call costs more than it saves


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs · weightᵀ + bias: ``[..., in]``, ``[out, in]`` and ``[out]`` give ``[..., out]``.

    torch's default on CPU, MKL, keeps to narrow vectors on processors that are not Intel's; oneDNN, which
    torch ships too, takes half the time there, in the same float32 arithmetic. Where a gradient is wanted, or
    the routine is missing, this is torch's own.
    """
    if not _by_onednn(inputs):
        return torch.nn.functional.linear(inputs, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


def linear_plus(inputs: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """inputs · weightᵀ + bias + added: ``[rows, in]``, ``[out, in]``, ``[out]``, ``[rows, out]``.

    ``added`` is used up.
    """
    if not _by_onednn(inputs):
        product = added.addmm_(inputs, weight.T)
        return product if bias is None else product.add_(bias)
    summed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, added, weight, bias, "add")
    return summed


def _by_onednn(inputs: Tensor) -> bool:
    plain = torch.is_grad_enabled() or inputs.dtype != torch.float32 or inputs.device.type != "cpu"
    return not plain and inputs.numel() >= _LEAST_ROWS * inputs.shape[-1] and _has_onednn()


@cache
def _has_onednn() -> bool:
    """Whether the routine is there and gives what torch's own does."""
    inputs, weight = torch.linspace(-1, 1, 32 * 48).view(32, 48), torch.linspace(-1, 1, 64 * 48).view(64, 48)
    try:
        product = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product, inputs @ weight.T, rtol=1e-5, atol=1e-5)
