"""Text classification by a head of its own over what a causal language model makes of a template.

The head reads the state that the next word is predicted from, and starts as the labels' words' rows of the
output layer: the start is zero-shot, as in `pipeline.tasks.prompted`, but nothing of the language model is
in the head, not even where its output layer is its embedding. So a search of the head alone computes each
text once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.tasks.base import Batch
from pipeline.tasks.classification import HEAD_CONFIG, TextClassifier, standardise


class AnswerClassifier(TextClassifier):
    """The last token's state, centred, under a linear layer; ``pooled_layers`` is not used."""

    reads = "template's answer"

    def __init__(
        self, encoder: nn.Module, hidden: int, labels: Sequence[str], pooled_layers: int = 1
    ) -> None:
        super().__init__(encoder, hidden, labels, pooled_layers)

    def pooled(self, batch: Batch) -> Tensor:
        """The state of each text's last token: float32 ``[examples, hidden]``."""
        states: Tensor = self.encoder(**batch.inputs).last_hidden_state
        last = batch.inputs["attention_mask"].sum(1) - 1
        return states[torch.arange(len(states), device=states.device), last].float()


def load(folder: Path) -> TextClassifier:
    """What either kind's ``save`` wrote. Raises UserError as `TextClassifier.load` does."""
    file = folder / HEAD_CONFIG
    reads = json.loads(file.read_text(encoding="utf-8")).get("reads") if file.is_file() else None
    return (AnswerClassifier if reads == AnswerClassifier.reads else TextClassifier).load(folder)


@torch.inference_mode()
def start_as_words(model: AnswerClassifier, rows: Tensor, bias: Tensor | None, sample: Batch) -> None:
    """Starts the head so that its logits are the words' own.

    ``rows`` ``[labels, hidden]`` and ``bias`` ``[labels]`` are of the language model's output layer;
    ``sample``, a batch of training texts, sets the features' mean and scale.
    """
    standardise(model, sample)
    rows = rows.to(model.mean)
    model.classifier.weight.copy_(rows * model.scale)
    model.classifier.bias.copy_(rows @ model.mean)
    if bias is not None:
        model.classifier.bias.add_(bias.to(model.mean))


def rows_of(model: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Of a language model's output layer the rows of ``tokens``, and their biases if there are any."""
    whole = model.get_output_embeddings()
    chosen = list(tokens)
    bias = getattr(whole, "bias", None)
    return whole.weight.detach()[chosen], None if bias is None else bias.detach()[chosen]
