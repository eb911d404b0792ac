"""What several runs of one process read, computed once: above all features of the same text and weights.

A search of the head alone needs each text's features, and those of a study's trials are all alike: to compute
them again for each trial would cost more than the trials. Outside `sharing` nothing is kept.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.tasks.base import Batch, TaskModel

T = TypeVar("T")
Features = dict[str, Tensor]
"""By what was read: `content`."""


class _Shared:
    """What the runs of this process share; features also lie in ``folder``, for other processes."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.stores: dict[str, Features] = {}
        self.saved: dict[str, int] = {}
        self.made: dict[Hashable, Any] = {}


_shared: _Shared | None = None


@contextmanager
def sharing(folder: Path | None = None) -> Iterator[None]:
    """While it is entered, runs of this process share; with ``folder`` also what `save` left there.

    Entered again inside, it is the outer one.
    """
    global _shared
    outer = _shared
    _shared = outer or _Shared(folder)
    try:
        yield
    finally:
        _shared = outer


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives, which nobody may change: made once for each ``key`` inside `sharing`."""
    if _shared is None:
        return make()
    if key not in _shared.made:
        _shared.made[key] = make()
    made: T = _shared.made[key]
    return made


def store(model: TaskModel, order: str) -> Features | None:
    """What runs share of ``model``, below its head; None outside `sharing`.

    The last bits of features depend on which texts were encoded at once, so only runs of one ``order``, of
    batches of one size in one sequence, share them. Only one model's are held: the next replaces them.
    """
    if _shared is None:
        return None
    weights = _digest(model)
    if any(not key.startswith(weights) for key in _shared.stores):
        _shared.stores.clear()
        _shared.saved.clear()
    name = f"{weights}-{order}"
    if name not in _shared.stores:
        _shared.stores[name] = _read(name)
        _shared.saved[name] = len(_shared.stores[name])
    return _shared.stores[name]


def reread() -> None:
    """Has the features read anew that other processes have left since."""
    if _shared is not None:
        _shared.stores.clear()
        _shared.saved.clear()


def save(part: int = 0) -> None:
    """Leaves the features that were computed here for other processes that share the folder.

    Processes that save at one time name different parts.
    """
    from safetensors.torch import save_file

    if _shared is None or _shared.folder is None:
        return
    for name, features in _shared.stores.items():
        if len(features) == _shared.saved[name]:
            continue
        _shared.folder.mkdir(parents=True, exist_ok=True)
        building = _shared.folder / f".{name}-{threading.get_native_id()}"
        save_file({key: tensor.cpu().contiguous() for key, tensor in features.items()}, building)
        building.replace(_shared.folder / f"{name}.{part}.safetensors")
        _shared.saved[name] = len(features)


def _read(name: str) -> Features:
    from safetensors.torch import load_file

    assert _shared
    found: Features = {}
    for path in sorted(_shared.folder.glob(f"{name}.*.safetensors")) if _shared.folder else ():
        # in memory of their own: where a file has put a tensor, its products may have other last bits
        found |= {key: tensor.clone() for key, tensor in load_file(path).items()}
    return found


def content(batch: Batch, rows: Sequence[int]) -> str:
    """A digest of what the model reads of ``rows``: their inputs, without the padding the batch asked for."""
    said = hashlib.sha256()
    for row in rows:
        mask = batch.inputs["attention_mask"][row].bool() if "attention_mask" in batch.inputs else ...
        for name, tensor in sorted(batch.inputs.items()):
            said.update(name.encode() + tensor[row][mask].cpu().numpy().tobytes())
    return said.hexdigest()


def _digest(model: TaskModel) -> str:
    """Of everything that features are computed from."""
    head = {id(parameter) for parameter in model.head_parameters()}
    said = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            said.update(name.encode())
            said.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return said.hexdigest()
