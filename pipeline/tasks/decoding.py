"""Writing token by token: the most likely next one, or one drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.noise import derive

NextLogits = Callable[[Tensor | None], Tensor]
"""Reads the tokens just chosen (int64 ``[examples]``; None at first) and gives the logits of the next."""


@dataclass(frozen=True)
class Decoding:
    """How texts are written. ``stop`` are the tokens that end one, ``pad`` is what stands behind its end,
    ``first``, if not None, is what every text begins with, such as the token of a language.

    At a ``temperature`` of 0 the most likely token is taken; above, one is drawn from the softmax of
    logits / temperature.
    """

    max_new_tokens: int
    temperature: float
    stop: tuple[int, ...]
    pad: int
    first: int | None = None


@torch.inference_mode()
def decode(next_logits: NextLogits, options: Decoding, seed: int) -> Tensor:
    """What is written of each example, the end included: int64 ``[examples, at most max_new_tokens]``.

    What is drawn depends on ``seed`` and the position alone: candidates that write with one seed meet the
    same random numbers, so their texts differ by their weights only.
    """
    written: list[Tensor] = []
    token: Tensor | None = None
    for position in range(options.max_new_tokens):
        logits = next_logits(token)
        token = _chosen(logits, options.temperature, derive(seed, position))
        if not written and options.first is not None:
            token = torch.full_like(token, options.first)
        if written:
            token = torch.where(_ended(written[-1], options), options.pad, token)
        written.append(token)
        if bool(_ended(token, options).all()):
            break
    return torch.stack(written, 1)


def _ended(token: Tensor, options: Decoding) -> Tensor:
    return torch.isin(token, torch.tensor([*options.stop, options.pad], device=token.device))


def _chosen(logits: Tensor, temperature: float, seed: int) -> Tensor:
    if not temperature:
        return logits.argmax(-1)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
    uniform = torch.rand(logits.shape, generator=generator).clamp(min=1e-20)
    gumbel = -(-uniform.log()).log()  # its largest sum is a draw from the softmax
    return (logits.float() / temperature + gumbel.to(logits.device)).argmax(-1)
