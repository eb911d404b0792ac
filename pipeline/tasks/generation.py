"""Tasks whose model writes: by a reward, or towards target texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline import objective as objectives
from pipeline.config import Config
from pipeline.data.prepare import PAIRS, PROMPTS, load_task
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.measuring.text_evaluation import TextExaminer
from pipeline.models.loading import (
    choose_device,
    load_language_model,
    load_tokenizer,
    pretrained_in,
    writes_as,
)
from pipeline.noise import derive
from pipeline.objective import TextObjective
from pipeline.tasks.about import About
from pipeline.tasks.base import Batch, Start, TaskModel
from pipeline.tasks.batching import shuffled
from pipeline.tasks.room import check_room
from pipeline.tasks.seq2seq import Seq2Seq
from pipeline.tasks.template import TEXT, check
from pipeline.tasks.writing import CONFIG, Decoder, WritingData

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

_HELD_OUT = 9  # the seed of what is drawn in held-out batches, the same for all runs
_DRAWN = 9  # that of batches to train on comes from the run's and this


class Writing:
    """A task in which the model goes on from a text; it starts as the language model that it is."""

    reads: ClassVar[str] = "task"
    data: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]
    each: ClassVar[str]
    """Of `pipeline.measuring.scores`: how well one text was answered."""

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """The language model, its prompts, and what measures it.

        Raises:
            UserError: an earlier stage has not run, or parameters that do not fit.
        """
        options, location = config.finetune, pretrained_in(layout)
        check(options)
        template = options.template or TEXT
        rows, tokenizer = self._rows(layout), load_tokenizer(location)
        check_room(options, location)
        model = _loaded(config, location, tokenizer)
        data = {
            split: WritingData(
                rows[split],
                tokenizer,
                model.phrasing,
                template=template,
                max_length=options.max_length,
                max_new_tokens=options.max_new_tokens,
            )
            for split in rows
        }
        train = data["train"]

        def batch(step: int) -> Batch:
            rows = shuffled(len(train), options.batch_size, config.seed, step)
            return train.batch(rows, derive(config.seed, _DRAWN, step))

        whole = {split: data[split].by_length(options.batch_size, _HELD_OUT) for split in data}
        return Start(
            model,
            tokenizer,
            batch,
            whole["validation"],
            whole["train"],
            whole["test"],
            self._examiner(config),
        )

    def load(self, folder: Path) -> TaskModel:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds no model that writes; run the finetune stage first")
        return Seq2Seq.load(folder) if writes_as(str(folder)) == "seq2seq" else Decoder.load(folder)

    def yardsticks(self, start: Start) -> dict[str, dict[str, float]]:
        """The model as it starts."""
        assert start.examiner
        return {"zero_shot": start.examiner.measure(start.model, start.test)}

    def _rows(self, layout: Layout) -> DatasetDict:
        """The prepared rows: ``text``, and perhaps ``target`` or ``answers``."""
        return load_task(layout)

    def _examiner(self, config: Config) -> TextExaminer:
        @cache
        def scored() -> TextObjective | None:
            """A replay measures nothing: it must not ask for what an objective reads."""
            objective = objectives.parse(config.finetune.objective, self.load)
            return objective if isinstance(objective, TextObjective) else None

        return TextExaminer(self.figures, self.each, scored)


def _loaded(config: Config, location: str, tokenizer: PreTrainedTokenizerBase) -> Decoder | Seq2Seq:
    """The model at ``location``, on its device.

    Raises:
        UserError: it does not write.
    """
    writes, options = writes_as(location), config.finetune
    if writes is None:
        raise UserError(
            f"{config.model} does not write: {config.prepare.task} needs a decoder or an encoder-decoder"
        )
    loaded = load_language_model(location, writes, derive(config.seed, 6), config.dtype)
    kind = Seq2Seq if writes == "seq2seq" else Decoder
    model = kind(loaded, tokenizer, options.max_new_tokens, options.temperature)
    return model.eval().to(choose_device(config.device))


class Generation(Writing):
    """Completions of prompts, by a reward: any score of (prompt, completion)."""

    data = PROMPTS
    figures = ("exact_match", "token_f1")
    each = "token_f1"
    about = About(
        data="prompts, and perhaps target texts",
        models="decoders, encoder-decoders",
        objectives=("exact_match", "regex", "length", "distinct", "classifier", "./file.py:score"),
        metrics=("score", "exact_match", "token_f1"),
        example="pipeline run --task generation --model DIR --train prompts.csv "
        "--objective length,words=12 -S pretrain.enabled=false -S finetune.space=lora",
    )


class Translation(Writing):
    """Texts into texts of another language."""

    data = PAIRS
    figures = ("bleu", "chrf")
    each = "chrf"
    about = About(
        data="texts and their translations",
        models="decoders, encoder-decoders",
        objectives=("cross_entropy", "chrf", "bleu"),
        metrics=("loss", "bleu", "chrf"),
        example="pipeline run --task translation --model DIR --train pairs.tsv --text en --label es "
        "-S pretrain.enabled=false -S finetune.space=lora",
    )


class Summarization(Writing):
    """Texts into their summaries."""

    data = PAIRS
    figures = ("rouge_l", "chrf")
    each = "rouge_l"
    about = About(
        data="texts and their summaries",
        models="decoders, encoder-decoders",
        objectives=("cross_entropy", "rouge_l", "chrf"),
        metrics=("loss", "rouge_l", "chrf"),
        example="pipeline run --task summarization --model DIR --train papers.csv "
        "--text body --label title -S pretrain.enabled=false -S finetune.space=lora",
    )
