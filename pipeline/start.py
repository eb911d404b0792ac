"""Where training starts: data, model, head and space, built alike by the stages and by replay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import objective
from pipeline import space as spaces
from pipeline.config import Config, TrainConfig
from pipeline.data.prepare import load_corpus, load_task
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models import (
    choose_device,
    load_config,
    load_encoder,
    load_language_model,
    load_tokenizer,
    locate,
    self_supervised_task,
)
from pipeline.noise import derive
from pipeline.registry import Spec
from pipeline.tasks.base import Batch
from pipeline.tasks.batching import shuffled
from pipeline.tasks.classification import ClassificationData, TextClassifier, describe, start_head
from pipeline.tasks.language_modelling import CorpusData, LanguageModel, validation_batches
from pipeline.trainer import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF_SUPERVISED = ("auto", "mlm", "clm")
_SAMPLE = 256  # training texts that set the head's scale and bias


@dataclass
class Pretraining:
    """The start of the pretrain stage."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    train: CorpusData
    validation: list[Batch]
    task: str
    space: spaces.Space
    seed: int
    batch_size: int

    def batch(self, step: int) -> Batch:
        """Batch ``step``, with masks of its own."""
        rows = shuffled(len(self.train), self.batch_size, self.seed, step)
        return self.train.batch(rows, derive(self.seed, 5, step))


@dataclass
class Finetuning:
    """The start of the finetune stage, which is also the zero-shot classifier."""

    model: TextClassifier
    tokenizer: PreTrainedTokenizerBase
    train: ClassificationData
    validation: ClassificationData
    test: ClassificationData
    seed: int
    batch_size: int

    def batch(self, step: int) -> Batch:
        """Batch ``step``."""
        return self.train.batch(shuffled(len(self.train), self.batch_size, self.seed, step))


def pretraining(config: Config, layout: Layout) -> Pretraining:
    """The language model, its corpus and its space.

    Raises:
        UserError: prepare has not run, the model cannot be loaded, or the space is not in it.
    """
    options, location = config.pretrain, locate(config.model)
    task = self_supervised_task(location) if options.task == "auto" else options.task
    tokenizer = load_tokenizer(location)
    _check_length("pretrain", options, tokenizer, load_config(location))
    if task == "mlm" and tokenizer.mask_token_id is None:
        raise UserError(f"{config.model} has no mask token; use pretrain.task=clm")
    corpus = load_corpus(layout)
    data = {
        split: CorpusData(
            corpus[split]["text"],
            tokenizer,
            max_length=options.max_length,
            task=task,
            mask_probability=options.mask_probability,
        )
        for split in ("train", "validation")
    }
    model = LanguageModel(load_language_model(location, task, derive(config.seed, 6), config.dtype))
    space = _searched(options, model, config)
    validation = validation_batches(
        data["validation"], options.validation_examples, options.batch_size, config.seed
    )
    return Pretraining(
        model, tokenizer, data["train"], validation, task, space, config.seed, options.batch_size
    )


def classifier(config: Config, layout: Layout, head: Path | None = None) -> Finetuning:
    """The pretrained encoder under a head that starts from label descriptions, and the task's data.

    The head is taken from the file ``head`` if it is there; else it is computed, and kept there.

    Raises:
        UserError: an earlier stage has not run, or descriptions that do not fit the labels.
    """
    if not (layout.pretrained / "config.json").is_file():
        raise UserError(f"no pretrained model at {layout.pretrained}; run the pretrain stage first")
    options, location = config.finetune, str(layout.pretrained)
    rows, tokenizer, encoder = (
        load_task(layout),
        load_tokenizer(location),
        load_encoder(location, config.dtype),
    )
    labels = rows["train"].features["label"].names
    data = {split: ClassificationData(rows[split], tokenizer, options.max_length) for split in rows}
    _check_length("finetune", options, tokenizer, encoder.config)
    device = choose_device(config.device)
    if not 1 <= options.pooled_layers <= encoder.config.num_hidden_layers:
        raise UserError(
            f"finetune.pooled_layers is {options.pooled_layers}; "
            f"the model has {encoder.config.num_hidden_layers} layers"
        )
    model = TextClassifier(encoder, encoder.config.hidden_size, labels, options.pooled_layers)
    model.eval().to(device)
    if head and head.is_file():
        model.load_head(head)
    else:
        sample = shuffled(len(data["train"]), _SAMPLE, derive(config.seed, 7), 0)
        start_head(model, tokenizer, describe(labels, options.descriptions), data["train"].batch(sample))
        if head:
            model.save_head(head)
    return Finetuning(
        model,
        tokenizer,
        data["train"],
        data["validation"],
        data["test"],
        config.seed,
        options.batch_size,
    )


def finetuning_space(config: Config, start: Finetuning) -> spaces.Space:
    """The space that ``finetune.space`` names, over the classifier."""
    return _searched(config.finetune, start.model, config)


def training(options: TrainConfig, config: Config, patience: int = 0) -> Training:
    """A section of the configuration as the trainer takes it."""
    offered: dict[str, Any] = {
        "epsilon": options.epsilon,
        "sigma": options.sigma,
        "learning_rate": options.learning_rate,
    }
    return Training(
        optimizer=Spec.parse(options.optimizer),
        space=spaces.parse(options.space),
        forward_passes=options.forward_passes,
        evaluate_every=options.evaluate_every,
        run_seed=config.seed,
        patience=patience,
        objective=objective.parse(options.objective),
        provenance=config.to_dict(),
        defaults={key: value for key, value in offered.items() if value is not None},
    )


def _check_length(section: str, options: TrainConfig, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    positions = getattr(model, "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(tokenizer.model_max_length, positions)
    if options.max_length > longest:
        raise UserError(
            f"{section}.max_length is {options.max_length}; the model takes at most {longest:,} tokens"
        )


def _searched(options: TrainConfig, model: Any, config: Config) -> spaces.Space:
    spec = spaces.parse(options.space)
    spaces.prepare_model(spec, model, derive(config.seed, 8))
    model.eval().to(choose_device(config.device))
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the yardstick needs it; PEFT freezes what it wraps
    return spaces.build(spec, model, config.seed)
