"""Question answering: a span of the context by an encoder, an answer of its own by a model that writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.data.prepare import QUESTIONS, load_task
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models.loading import choose_device, load_encoder, load_tokenizer, pretrained_in, writes_as
from pipeline.tasks.about import About
from pipeline.tasks.base import Batch, Start, TaskModel
from pipeline.tasks.batching import shuffled
from pipeline.tasks.generation import Writing
from pipeline.tasks.room import check_length
from pipeline.tasks.spans import HEAD_CONFIG, SpanReader
from pipeline.tasks.windows import SpanData

if TYPE_CHECKING:
    from datasets import DatasetDict


class QuestionAnswering(Writing):
    """Answers to questions about a text."""

    data = QUESTIONS
    figures = ("exact_match", "token_f1")
    each = "token_f1"
    about = About(
        data="questions, contexts and answers: SQuAD's JSON, or columns of those names",
        models="encoders (a span), decoders, encoder-decoders (written)",
        objectives=("cross_entropy", "token_f1", "exact_match"),
        metrics=("loss", "exact_match", "token_f1"),
        example="pipeline run --task qa --train squad.json -S finetune.max_length=256",
    )

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """As `Task.start`: what writes goes on from question and context, an encoder gets a head for spans.

        Raises:
            UserError: an earlier stage has not run, or parameters that do not fit.
        """
        options, location = config.finetune, pretrained_in(layout)
        if writes_as(location):
            return super().start(config, layout, folder)
        rows, tokenizer = load_task(layout), load_tokenizer(location)
        check_length("finetune", options, tokenizer, location)
        encoder = load_encoder(location, config.dtype)
        model = SpanReader(encoder, encoder.config.hidden_size)
        model.eval().to(choose_device(config.device))
        data = {
            split: SpanData(
                rows[split], tokenizer, options.max_length, options.overlap, learn=split == "train"
            )
            for split in rows
        }
        train = data["train"]
        if not len(train):
            raise UserError("no answer of the training rows fits into finetune.max_length tokens; raise it")

        def batch(step: int) -> Batch:
            return train.batch(shuffled(len(train), options.batch_size, config.seed, step))

        whole = {split: data[split].by_length(options.batch_size) for split in data}
        examiner = self._examiner(config)
        return Start(model, tokenizer, batch, whole["validation"], whole["train"], whole["test"], examiner)

    def load(self, folder: Path) -> TaskModel:
        return SpanReader.load(folder) if (folder / HEAD_CONFIG).is_file() else super().load(folder)

    def _rows(self, layout: Layout) -> DatasetDict:
        """For a model that writes the question stands first: what is too long is cut at its end."""
        rows = load_task(layout)
        for split, each in rows.items():
            pairs = zip(each["question"], each["context"], strict=True)
            rows[split] = each.add_column("text", [f"{question}\n{context}" for question, context in pairs])
        return rows
