"""Which classifier a configuration asks for, its texts as it reads them, and how its head starts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.models.fresh import is_fresh
from pipeline.models.loading import (
    has_language_head,
    load_config,
    load_encoder,
    load_language_model,
    self_supervised_task,
)
from pipeline.noise import derive
from pipeline.space import parse
from pipeline.tasks.answered import AnswerClassifier, rows_of, start_as_words
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.classification import TextClassifier, said_of, start_head
from pipeline.tasks.phrased import completing
from pipeline.tasks.prompted import Prompting
from pipeline.tasks.template import Template

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Built:
    """A classifier, each split's texts as it reads them, and how a head starts, given a batch of texts.

    ``said`` is what the start depends on besides the model and the batch.
    """

    model: TaskModel
    tokens: dict[str, list[list[int]]]
    start: Callable[[Batch], None] = lambda sample: None
    said: tuple[str, ...] = ()


def build(config: Config, location: str, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> Built:
    """The classifier of the model at ``location`` for the labels of ``rows``, and their texts.

    Raises:
        UserError: parameters that do not fit the labels or the model.
    """
    kind = _described if config.finetune.template is None else _prompted
    return kind(config, location, rows, tokenizer)


def _described(config: Config, location: str, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> Built:
    """A classifier by a head over the encoder's features, not started yet, and each split's texts."""
    options = config.finetune
    encoder = load_encoder(location, config.dtype)
    if not 1 <= options.pooled_layers <= encoder.config.num_hidden_layers:
        raise UserError(
            f"finetune.pooled_layers is {options.pooled_layers}; "
            f"the model has {encoder.config.num_hidden_layers} layers"
        )
    tokens = {
        split: tokenizer(list(rows[split]["text"]), truncation=True, max_length=options.max_length)[
            "input_ids"
        ]
        for split in rows
    }
    labels = rows["train"].features["label"].names
    descriptions = said_of(labels, options.descriptions, "finetune.descriptions")
    model = TextClassifier(encoder, encoder.config.hidden_size, labels, options.pooled_layers)
    start = functools.partial(start_head, model, tokenizer, descriptions)
    return Built(model, tokens, start, tuple(descriptions))


def _prompted(config: Config, location: str, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> Built:
    """A classifier by the words of a template, and each split's texts in it."""
    options, kind = config.finetune, self_supervised_task(location)
    assert options.template is not None
    if load_config(location).is_encoder_decoder or (kind == "mlm" and tokenizer.mask_token is None):
        raise UserError(
            f"{config.model} completes no template: it takes a decoder, or an encoder with a mask token; "
            "leave out finetune.template"
        )
    if not has_language_head(location) or (is_fresh(config.model) and not config.pretrain.enabled):
        warnings.warn(
            f"{config.model} comes without a trained language-modelling head: what it says of a template "
            "is noise until it is trained",
            stacklevel=2,
        )
    template = Template(options.template, tokenizer, masked=kind == "mlm")
    labels = rows["train"].features["label"].names
    words = said_of(labels, options.verbalizers, "finetune.verbalizers")
    if not options.verbalizers:
        words = [f" {word}" for word in words]
    prompting = Prompting.spelling(kind, template, labels, words)
    loaded = load_language_model(location, kind, derive(config.seed, 6), config.dtype)
    if kind == "clm" and not prompting.rest and parse(options.space).backend == "head":
        return _answered(loaded, template, prompting, rows, options.max_length)
    model = completing(loaded, prompting, tokenizer.mask_token_id)
    return Built(model, _in(template, rows, options.max_length, model.spare))


def _answered(
    loaded: PreTrainedModel, template: Template, prompting: Prompting, rows: DatasetDict, max_length: int
) -> Built:
    """A classifier by a head of its own, which starts as the words' rows of the output layer."""
    words, bias = rows_of(loaded, prompting.tokens)
    model = AnswerClassifier(loaded.base_model, words.shape[1], prompting.labels)
    start = functools.partial(start_as_words, model, words, bias)
    return Built(model, _in(template, rows, max_length), start, (template.text, *prompting.words))


def _in(template: Template, rows: DatasetDict, max_length: int, spare: int = 0) -> dict[str, list[list[int]]]:
    return {split: template.tokens(list(rows[split]["text"]), max_length, spare) for split in rows}
