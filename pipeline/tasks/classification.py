"""Text classification by an encoder, a pooled sentence embedding and a linear head.

The head starts from label descriptions, not from noise: row k is the embedding of the sentence that describes
label k. Without such a start zeroth-order methods fail (Malladi et al. 2023, table 4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError, nearest
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_FILE, HEAD_CONFIG = "classifier.safetensors", "classifier.json"
START_FILE = "start.safetensors"  # the head before training: a replay elsewhere must not compute it again


class TextClassifier(TaskModel):
    """Mean-pooled, length-normalised, centred hidden states under a linear layer.

    ``reads`` says what of a text it reads, in the file that is kept of it.

    ``mean`` (``[hidden]``) and ``scale`` (``[]``) are constants of the training texts. Embeddings share a
    large common part (Ethayarajh 2019), along which every perturbation would shift all logits alike: noise
    to a method that learns from perturbations.

    ``pooled_layers`` is how many of the last layers' states are averaged: the last layer is shaped by what
    the encoder was trained for, and the ones below often know more of another task (Peters et al. 2018).
    """

    reads = "text"

    def __init__(self, encoder: nn.Module, hidden: int, labels: Sequence[str], pooled_layers: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = list(labels)
        self.pooled_layers = pooled_layers
        self.classifier = nn.Linear(hidden, len(labels))
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("scale", torch.tensor(hidden**-0.5))
        self.mean: Tensor
        self.scale: Tensor

    def features(self, batch: Batch) -> Tensor:
        """Embeddings of mean 0 and variance about 1: float32 ``[examples, hidden]``."""
        return (self.pooled(batch) - self.mean) / self.scale

    def pooled(self, batch: Batch) -> Tensor:
        """Sentence embeddings of length 1: float32 ``[examples, hidden]``."""
        every = self.encoder(**batch.inputs, output_hidden_states=True).hidden_states
        states: Tensor = torch.stack(every[-self.pooled_layers :]).float().mean(0)
        mask = batch.inputs["attention_mask"][..., None].to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[examples, labels]``."""
        logits: Tensor = self.classifier(features)
        return logits

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The encoder as a ``save_pretrained`` directory, the head as safetensors beside it."""
        from pipeline.models.loading import save_model

        save_model(cast("PreTrainedModel", self.encoder), folder)
        tokenizer.save_pretrained(str(folder))
        self.save_head(folder / HEAD_FILE)
        head = {"labels": self.labels, "pooled_layers": self.pooled_layers, "reads": self.reads}
        (folder / HEAD_CONFIG).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")

    def save_head(self, path: Path) -> None:
        """The head and the features' constants, as safetensors."""
        from safetensors.torch import save_file

        save_file(self.head(), path)

    def load_head(self, path: Path) -> None:
        """What `save_head` wrote, in place."""
        from safetensors.torch import load_file

        self.set_head(load_file(path))

    def head(self) -> dict[str, Tensor]:
        """A copy of the head and the features' constants, by name."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self._head().items()}

    def set_head(self, values: Mapping[str, Tensor]) -> None:
        """Puts what `head` gave in place."""
        with torch.no_grad():
            for name, tensor in values.items():
                self._head()[name].copy_(tensor)

    def _head(self) -> dict[str, Tensor]:
        return {**self.classifier.state_dict(), "mean": self.mean, "scale": self.scale}

    @classmethod
    def check(cls, folder: Path) -> dict[str, Any]:
        """What ``folder`` says of its head. Raises UserError as `load` does."""
        if not (folder / HEAD_CONFIG).is_file():
            raise UserError(f"{folder} holds no classifier; run the finetune stage first")
        head: dict[str, Any] = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
        if (reads := head.get("reads", TextClassifier.reads)) != cls.reads:
            raise UserError(f"{folder} holds a classifier of a {reads}, where one of a {cls.reads} is needed")
        return head

    @classmethod
    def load(cls, folder: Path) -> TextClassifier:
        """What `save` wrote.

        Raises:
            UserError: the folder holds no classifier, or one of another class.
        """
        from safetensors.torch import load_file

        from pipeline.models.loading import load_encoder

        head = cls.check(folder)
        encoder = load_encoder(str(folder), "auto")
        values = load_file(folder / HEAD_FILE)
        model = cls(encoder, len(values["mean"]), head["labels"], head["pooled_layers"])
        model.set_head(values)
        return model.eval()


class ClassificationData:
    """One split, its texts as ids; batches by number, padded to their own longest text."""

    def __init__(self, tokens: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> None:
        self._tokens = tokens
        self._pad = pad_id
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, examples: Sequence[int]) -> Batch:
        """The batch of those rows."""
        tokens = [self._tokens[i] for i in examples]
        inputs = pad(tokens, self._pad)
        return Batch(inputs, torch.from_numpy(self.labels[list(examples)]), examples=tuple(examples))

    def by_length(self, batch_size: int) -> list[Batch]:
        """Every row once, rows of like length together."""
        order = sorted(range(len(self)), key=lambda i: len(self._tokens[i]))
        return [self.batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def said_of(labels: Sequence[str], given: dict[str, str] | None, parameter: str) -> list[str]:
    """A text per label: the one given by ``parameter``, or the label's own words.

    Raises:
        UserError: texts that do not fit the labels.
    """
    if not given:
        return [label.replace("_", " ") for label in labels]
    for name in given:
        if name not in labels:
            hint = nearest(str(name), labels) or f"; the labels are {', '.join(labels)}"
            raise UserError(f"{parameter} names the label '{name}', which the data has not{hint}")
    missing = [label for label in labels if label not in given]
    if missing:
        raise UserError(f"{parameter} says nothing of the label '{missing[0]}'")
    return [str(given[label]) for label in labels]


@torch.inference_mode()
def start_head(
    model: TextClassifier, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], sample: Batch
) -> None:
    """Starts the head from label sentences, in place, without a label.

    Weights are the sentences' embeddings less their mean, the bias is zero. ``sample``, a batch of training
    texts, sets the features' mean and scale, and the weights' scale so that logits have a standard deviation
    of one half: similarity says which label, never how sure.
    """
    features, device = standardise(model, sample), model.mean.device
    tokens = tokenizer(list(sentences))["input_ids"]
    described = model.features(Batch(pad(tokens, tokenizer.pad_token_id), torch.empty(0)).to(device))
    weight = described - described.mean(0)
    logits = features @ weight.T
    model.classifier.weight.copy_(weight * (0.5 / logits.std().clamp(min=1e-6)))
    model.classifier.bias.zero_()


@torch.inference_mode()
def standardise(model: TextClassifier, sample: Batch) -> Tensor:
    """Sets the features' mean and scale by ``sample``, a batch of texts; its features as they then are."""
    features = model.features(sample.to(next(model.parameters()).device))
    mean, scale = features.mean(0), (features - features.mean(0)).pow(2).mean().sqrt()
    model.mean.add_(mean * model.scale)
    model.scale.mul_(scale)
    return (features - mean) / scale
