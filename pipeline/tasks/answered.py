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

from pipeline import noise
from pipeline.errors import UserError
from pipeline.tasks.base import Batch
from pipeline.tasks.classification import HEAD_CONFIG, TextClassifier, standardise
from pipeline.tasks.language_modelling import LanguageModel

_TRIED, _LARGE = 8, 100.0  # states that the output layer is tried with: so large that a cap shows
_ROUNDING = 0.01  # of half precision, in a factor that is 1


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


@torch.inference_mode()
def rows_of(model: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Of a language model's output layer the rows of ``tokens``, and their biases if there are any.

    They are multiplied by what the model multiplies its logits by (Granite, Cohere).

    Raises:
        UserError: it does something else to them, such as to cap them (Gemma 2).
    """
    whole = model.get_output_embeddings()
    chosen = list(tokens)
    rows, bias = whole.weight.detach()[chosen].float(), getattr(whole, "bias", None)
    bias = None if bias is None else bias.detach()[chosen].float()
    states = noise.direction(0, 0, _TRIED * rows.shape[1], "gaussian", rows.device).view(_TRIED, -1)
    states = (states * _LARGE).to(whole.weight.dtype)
    plain = torch.nn.functional.linear(states.float(), rows, bias)
    own = LanguageModel(model).logits(states[None])[0][:, chosen].float()
    factor = float((own * plain).sum() / plain.square().sum())
    if not torch.allclose(own, plain * factor, rtol=0.05, atol=0.02 * float(own.abs().max())):
        raise UserError(
            f"a {type(model).__name__} gives other logits than its last layer does, which a head of its own "
            "cannot begin with: choose another space than head, such as lora"
        )
    factor = 1.0 if abs(factor - 1.0) < _ROUNDING else factor
    return rows * factor, None if bias is None else bias * factor
