"""The built-in tasks: where they start from, what they stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.config import Config
from pipeline.data.prepare import load_corpus, load_task
from pipeline.engine import shared
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.measuring.evaluation import features, linear_probe, majority, predictions
from pipeline.models.loading import (
    choose_device,
    load_language_model,
    load_tokenizer,
    locate,
    pretrained_in,
)
from pipeline.noise import derive
from pipeline.tasks.about import About
from pipeline.tasks.answered import load as load_headed
from pipeline.tasks.base import Batch, Start, TaskModel
from pipeline.tasks.batching import shuffled
from pipeline.tasks.classification import (
    START_FILE,
    ClassificationData,
    TextClassifier,
)
from pipeline.tasks.classifiers import Built, build
from pipeline.tasks.in_context import in_context
from pipeline.tasks.language_modelling import CorpusData, LanguageModel, validation_batches
from pipeline.tasks.phrased import load as load_completing
from pipeline.tasks.prompted import PROMPTED_FILE
from pipeline.tasks.room import check_length
from pipeline.tasks.template import check

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 256  # training texts that set the head's scale and bias


class Classification:
    """Text classification: by the language model in a template's words, or by a head over its features."""

    reads: ClassVar[str] = "task"
    about = About(
        data="texts and their labels",
        models="encoders, decoders",
        objectives=("cross_entropy", "error", "f1", "margin", "squared_error", "cosine", "kl"),
        metrics=("accuracy", "loss", "f1 (macro)", "mcc", "calibration error"),
        example="pipeline run --train my.csv --text review --label verdict",
    )

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """The classifier before training, which is also the zero-shot one. Its head is kept in ``folder``.

        Raises:
            UserError: an earlier stage has not run, or parameters that do not fit the labels or the model.
        """
        options, location = config.finetune, pretrained_in(layout)
        check(options)
        rows, tokenizer = load_task(layout), load_tokenizer(location)
        check_length("finetune", options, tokenizer, location)
        built = build(config, location, rows, tokenizer)
        model = built.model
        data = {
            split: ClassificationData(built.tokens[split], rows[split]["label"], tokenizer.pad_token_id)
            for split in rows
        }
        train = data["train"]
        model.eval().to(choose_device(config.device))
        if isinstance(model, TextClassifier):
            sample = train.batch(shuffled(len(train), _SAMPLE, derive(config.seed, 7), 0))
            read = (str(layout.prepared.resolve()), str(layout.pretrained.resolve()))
            _start_head(model, built, config, sample, folder, read)

        def batch(step: int) -> Batch:
            return train.batch(shuffled(len(train), options.batch_size, config.seed, step))

        whole = {split: data[split].by_length(options.batch_size) for split in data}
        return Start(model, tokenizer, batch, whole["validation"], whole["train"], whole["test"])

    def load(self, folder: Path) -> TaskModel:
        prompted = (folder / PROMPTED_FILE).is_file()
        return load_completing(folder) if prompted else load_headed(folder)

    def yardsticks(self, start: Start) -> dict[str, dict[str, float]]:
        """The most frequent label, the classifier as it starts, and a linear probe on its features.

        A causal model in a template also learns in context.
        """
        shown = in_context(start)
        return {
            "majority": majority(start.train, start.test),
            "zero_shot": predictions(
                start.model, start.test, features(start.model, start.test)
            ).figures_with_intervals(),
            **({"in_context": shown} if shown else {}),
            "linear_probe": linear_probe(start.model, start.train, start.validation, start.test),
        }


def _start_head(
    model: TextClassifier,
    built: Built,
    config: Config,
    sample: Batch,
    folder: Path | None,
    read: tuple[str, str],
) -> None:
    """The head as ``folder`` has it; else as it is ``built`` to start, and kept there.

    Runs of one process that ``read`` the same data and model share it.
    """
    head = folder / START_FILE if folder else None
    if head and head.is_file():
        model.load_head(head)
        return
    options = config.finetune

    def started() -> dict[str, Tensor]:
        built.start(sample)
        return model.head()

    how = (config.seed, config.dtype, config.device, options.pooled_layers, options.max_length)
    model.set_head(shared.once(("head", *read, *built.said, *how), started))
    if head:
        model.save_head(head)


class _LanguageModelling:
    """Self-supervised learning on the corpus."""

    reads: ClassVar[str] = "corpus"
    name: ClassVar[str]

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """The language model and its corpus.

        Raises:
            UserError: prepare has not run, or the model cannot be loaded.
        """
        options, location = config.pretrain, locate(config.model)
        tokenizer = load_tokenizer(location)
        check_length("pretrain", options, tokenizer, location)
        if self.name == "mlm" and tokenizer.mask_token_id is None:
            raise UserError(f"{config.model} has no mask token; use pretrain.task=clm")
        corpus = load_corpus(layout)
        data = {
            split: CorpusData(
                corpus[split]["text"],
                tokenizer,
                max_length=options.max_length,
                task=self.name,
                mask_probability=options.mask_probability,
            )
            for split in ("train", "validation")
        }
        train = data["train"]
        loaded = load_language_model(location, self.name, derive(config.seed, 6), config.dtype)

        def batch(step: int) -> Batch:
            """Each with masks of its own."""
            rows = shuffled(len(train), options.batch_size, config.seed, step)
            return train.batch(rows, derive(config.seed, 5, step))

        validation = validation_batches(
            data["validation"], options.validation_examples, options.batch_size, config.seed
        )
        return Start(LanguageModel(loaded), tokenizer, batch, validation)

    def load(self, folder: Path) -> LanguageModel:
        return LanguageModel(load_language_model(str(folder), self.name, 0, "auto"))

    def yardsticks(self, start: Start) -> dict[str, dict[str, float]]:
        return {}


class MaskedLM(_LanguageModelling):
    """Masked language modelling (Devlin et al. 2019)."""

    name = "mlm"
    about = About(
        data="unlabelled texts",
        models="encoders",
        objectives=("cross_entropy",),
        metrics=("loss", "perplexity", "accuracy"),
        example="pipeline run --task none -S prepare.corpus=[my.txt] -S pretrain.task=mlm",
    )


class CausalLM(_LanguageModelling):
    """Causal language modelling."""

    name = "clm"
    about = About(
        data="unlabelled texts",
        models="decoders",
        objectives=("cross_entropy",),
        metrics=("loss", "perplexity", "accuracy", "bits per byte"),
        example="pipeline run --task none --model DIR -S prepare.corpus=[my.txt] -S pretrain.task=clm "
        "-S pretrain.space=full",
    )
