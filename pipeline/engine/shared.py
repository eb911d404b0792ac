"""Features that several runs of one process read: of the same weights and the same text, computed once.

A search of the head alone needs each text's features, and those of a study's trials are all alike: to compute
them again for each trial would cost more than the trials. Outside `sharing` nothing is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.tasks.base import Batch, TaskModel

Features = dict[bytes, Tensor]
"""By what was read: `content`."""

_stores: dict[str, Features] | None = None


@contextmanager
def sharing() -> Iterator[None]:
    """While it is entered, runs of this process share features."""
    global _stores
    _stores = {}
    try:
        yield
    finally:
        _stores = None


def store(model: TaskModel, batch_size: int) -> Features | None:
    """What runs share of ``model``, below its head; None outside `sharing`.

    The last bits of features depend on how many texts were encoded at once, so batches of another size share
    nothing. Only one model's are held: the next replaces them.
    """
    global _stores
    if _stores is None:
        return None
    weights = _digest(model)
    if any(not key.startswith(weights) for key in _stores):
        _stores.clear()
    return _stores.setdefault(f"{weights}/{batch_size}", {})


def content(batch: Batch, row: int) -> bytes:
    """What the model reads of one row: its inputs, without the padding that its batch asked for."""
    mask = batch.inputs["attention_mask"][row].bool()
    return b"".join(
        name.encode() + tensor[row][mask].cpu().numpy().tobytes()
        for name, tensor in sorted(batch.inputs.items())
    )


def _digest(model: TaskModel) -> str:
    """Of everything that features are computed from."""
    head = {id(parameter) for parameter in model.head_parameters()}
    said = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            said.update(name.encode())
            said.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return said.hexdigest()
