"""Whether a model has positions for what it should read and write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import FinetuneConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.models.loading import load_config
from pipeline.models.prompt import stored_tokens
from pipeline.space import parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AFTER_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "mpnet",
    "xmod",
)
"""Models whose positions are counted from behind the padding's id."""


def check_length(
    section: str, options: TrainConfig, tokenizer: PreTrainedTokenizerBase, location: str
) -> None:
    """Raises UserError for texts that the model has no positions for, with the prompt before them."""
    config = load_config(location)
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    longest = min(tokenizer.model_max_length, positions)
    _check(f"{section}.max_length is", options.max_length, options, location, longest)


def check_room(options: FinetuneConfig, location: str) -> None:
    """Raises UserError for texts, and what is written after them, that the model has no positions for.

    An encoder-decoder has as many for what it reads as for what it writes.
    """
    config = load_config(location)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:  # positions are relative
        return
    read, written = options.max_length, options.max_new_tokens
    if config.is_encoder_decoder:
        _check("finetune.max_length is", read, options, location, longest)
        _check("finetune.max_new_tokens is", written, options, location, longest)
    else:
        what = "finetune.max_length and max_new_tokens are together"
        _check(what, read + written, options, location, longest)


def _check(what: str, needed: int, options: TrainConfig, location: str, longest: int) -> None:
    prompt = parse(options.space).options.get("tokens", 0) or stored_tokens(Path(location))
    if needed + prompt > longest:
        after = f", after a prompt of {prompt:,}" if prompt else ""
        raise UserError(f"{what} {needed:,}{after}; the model takes at most {longest:,} tokens")
