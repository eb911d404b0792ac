"""Models that start from nothing: a configuration, and weights drawn from the run's seed."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "fresh:"


def is_fresh(reference: str) -> bool:
    """Whether only the configuration and the tokenizer that ``reference`` names are taken."""
    return reference.startswith(PREFIX)


def described_in(reference: str) -> str:
    """Where configuration and tokenizer lie, of a fresh model; of another, where all of it lies."""
    return reference.removeprefix(PREFIX)


def digests(reference: str) -> dict[str, str]:
    """SHA-256 by path of what a directory's fresh model is drawn from, which people edit; else empty."""
    folder = Path(described_in(reference))
    if not is_fresh(reference) or not folder.is_dir():
        return {}
    files = sorted(file for pattern in ("*.json", "*.txt", "*.model") for file in folder.glob(pattern))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def named_by_type(config: Any) -> list[str]:
    """The architecture that a configuration without ``architectures`` means: a language model.

    Empty where its type has none.
    """
    from transformers.models.auto import modeling_auto as auto

    kinds = [auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if config.is_encoder_decoder:
        kinds = [auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES]
    return [kind[config.model_type] for kind in kinds if config.model_type in kind][:1]


def drawn(
    auto: Any, reference: str, config: Any, seed: int, dtype: torch.dtype | str, **options: Any
) -> PreTrainedModel:
    """A model of one of transformers' ``AutoModel…`` from ``config``, drawn from ``seed`` on the CPU.

    Raises:
        UserError: a configuration that is none of a model, or too few tokens for the tokenizer beside it.
    """
    import torch

    _check_keys(reference, config)
    _check_vocabulary(reference, config)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **options)
    return model


def check_tokenizer(reference: str) -> None:
    """Raises UserError for a directory without a tokenizer, of which transformers makes an empty one."""
    folder = Path(described_in(reference))
    if folder.is_dir() and not any(any(folder.glob(name)) for name in ("*token*", "vocab*", "*.model")):
        raise UserError(f"{folder} has no tokenizer: tokenizer.json is missing beside config.json")


def _check_keys(reference: str, config: Any) -> None:
    """Warns of a key like one of the configuration's own, which transformers takes for an extra."""
    file = Path(described_in(reference)) / "config.json"
    if not file.is_file():
        return
    known = {*type(config)().to_dict(), *config.attribute_map}
    for key in json.loads(file.read_text(encoding="utf-8")).keys() - known:
        if hint := nearest(key, known):
            warnings.warn(f"{file}: {type(config).__name__} has no key '{key}'{hint}", stacklevel=2)


def _check_vocabulary(reference: str, config: Any) -> None:
    """Raises UserError where a token would have no embedding: what is made by hand need not fit."""
    from pipeline.models.loading import load_tokenizer

    size = getattr(config, "vocab_size", None)
    if size is None:  # it reads no text
        return
    tokens = len(load_tokenizer(reference))
    if tokens > size:
        raise UserError(
            f"{reference}: its tokenizer has {tokens:,} tokens and config.json a vocab_size of {size:,}; "
            f"set vocab_size to {tokens} or more"
        )
