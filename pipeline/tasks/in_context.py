"""In-context learning: a causal model reads solved examples before each text, and no weight moves.

The yardstick of Brown et al. (2020) and Malladi et al. (2023), who show 32 examples.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.measuring.predictions import Predictions
from pipeline.models.prompt import CACHE_NAMES, tokens_in
from pipeline.tasks.base import Batch, Start
from pipeline.tasks.prompted import CompletingClassifier

DEMONSTRATIONS = 32
_TOKENS = 2**13  # of demonstrations in a forward pass: each of its texts holds their keys and values
_BETWEEN = "\n\n"


@torch.inference_mode()
def in_context(start: Start) -> dict[str, float] | None:
    """Figures on the test after ``demonstrations`` training texts with their words, the run's first ones.

    They are as many as fit into the model's positions, ``DEMONSTRATIONS`` at most; None where the model
    cannot be asked: it completes no template, keeps no keys and values, reads a prompt of its own, or has
    room for none.
    """
    model = start.model
    if not isinstance(model, CompletingClassifier) or model.prompting.kind != "clm" or tokens_in(model):
        return None
    name = _cache_name(model.encoder)
    if name is None:
        return None
    opening = _opening(start)
    ids, count = _demonstrations(start, model, opening)
    if not count:
        return None
    device = next(model.parameters()).device
    kept = {name: DynamicCache(config=model.model.config)}
    model.encoder(input_ids=torch.tensor([ids], device=device), use_cache=True, **kept)
    parts = []
    for batch in _pieces(start.test, max(1, _TOKENS // (len(ids) * model.copies))):
        batch = batch.to(device)
        logits = model.outputs(_features(model, batch, kept, len(ids), opening))
        parts.append(Predictions.of(logits, batch.targets))
    return {**Predictions.joined(parts).figures_with_intervals(), "demonstrations": float(count)}


def _cache_name(encoder: nn.Module) -> str | None:
    """What the encoder calls the keys and values it is given: the name changed in transformers 5."""
    taken = inspect.signature(type(encoder).forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


def _opening(start: Start) -> int:
    """How many special tokens begin a text: they stand once, before the demonstrations."""
    tokenizer: Any = start.tokenizer
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((i for i, each in enumerate(special) if not each), len(special))


def _demonstrations(start: Start, model: CompletingClassifier, opening: int) -> tuple[list[int], int]:
    """Their ids in a row, and how many they are."""
    tokenizer: Any = start.tokenizer
    between = tokenizer(_BETWEEN, add_special_tokens=False)["input_ids"]
    room = getattr(model.model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    room -= max(model.read_shape(batch)[1] for batch in start.test)
    ids: list[int] = []
    count = 0
    for row, target in itertools.islice(_drawn(start), DEMONSTRATIONS):
        shown = [*(row[opening:] if ids else row), *model.prompting.spelled(target), *between]
        if len(ids) + len(shown) > room:
            break
        ids, count = ids + shown, count + 1
    return ids, count


def _drawn(start: Start) -> Iterator[tuple[list[int], int]]:
    """Training texts and labels in the order in which training meets them, each once."""
    seen: set[int] = set()
    for step in itertools.count():
        batch = start.batch(step)
        assert batch.examples is not None
        for i, example in enumerate(batch.examples):
            if example in seen:
                return  # the next epoch has begun
            seen.add(example)
            mask = batch.inputs["attention_mask"][i].bool()
            yield batch.inputs["input_ids"][i][mask].tolist(), int(batch.targets[i])
        if len(seen) >= DEMONSTRATIONS:
            return


def _pieces(batches: list[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        for i in range(0, len(batch.targets), rows):
            inputs = {name: tensor[i : i + rows] for name, tensor in batch.inputs.items()}
            yield Batch(inputs, batch.targets[i : i + rows])


def _features(
    model: CompletingClassifier, batch: Batch, kept: dict[str, Any], length: int, opening: int
) -> Tensor:
    """Hidden states at the answers of texts that stand after ``length`` tokens read before."""
    past, rows = copy.deepcopy(kept), len(batch.targets) * model.copies
    for cache in past.values():
        cache.batch_repeat_interleave(rows)
    texts = {name: tensor[:, opening:] for name, tensor in batch.inputs.items()}
    read = model.rows(texts)
    whole = torch.cat((read["attention_mask"].new_ones(rows, length), read["attention_mask"]), 1)
    states: Tensor = model.encoder(**{**read, "attention_mask": whole}, **past).last_hidden_state
    return model.at_words(states, texts["attention_mask"])
