"""Which rows make a batch, and how rows of unequal length become tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.noise import derive


def pad(tokens: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the right."""
    width = max(len(row) for row in tokens)
    ids = np.full((len(tokens), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def pad_left(tokens: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """As `pad`, padded on the left: every row ends where the next token is to be written."""
    turned = pad([list(reversed(row)) for row in tokens], pad_id)
    return {name: tensor.flip(1) for name, tensor in turned.items()}


def shuffled(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of batch ``step``: each epoch is a permutation from ``seed``; batches run over its end.

    The order depends on nothing but these four numbers, so every method sees the same batches.
    """
    batch_size = min(batch_size, count)  # a small data set is one batch, each row once
    first = step * batch_size
    rows: list[int] = []
    while len(rows) < batch_size:
        epoch, at = divmod(first + len(rows), count)
        order = np.random.default_rng(derive(seed, 2, epoch)).permutation(count)
        rows.extend(int(i) for i in order[at : at + batch_size - len(rows)])
    return rows
