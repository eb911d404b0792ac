"""Answers as spans of a context: an encoder and a head that says where an answer begins and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.windows import WITHIN, windows_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_FILE, HEAD_CONFIG = "spans.safetensors", "spans.json"
LONGEST = 30  # tokens of an answer
_NOWHERE = -1e4  # the logit of a token outside the context


class SpanReader(TaskModel):
    """An encoder's states under a linear layer: for each token, whether an answer begins or ends there.

    The layer starts from zero: no token is likelier than another. Outputs are two an example, the beginning
    and the end, each over the tokens. An answer has at most ``longest`` tokens.
    """

    def __init__(self, encoder: nn.Module, hidden: int, longest: int = LONGEST) -> None:
        super().__init__()
        self.encoder = encoder
        self._longest = longest
        self.span = nn.Linear(hidden, 2)
        nn.init.zeros_(self.span.weight)
        nn.init.zeros_(self.span.bias)

    def features(self, batch: Batch) -> Tensor:
        """States, and behind them 0 for the context's tokens: float32 ``[examples, tokens, hidden + 1]``.

        The windows of an example are one after another: its tokens are those of all of them.
        """
        inputs = dict(batch.inputs)
        outside = inputs.pop(WITHIN) == 0
        states = self.encoder(**inputs).last_hidden_state.float()
        every = torch.cat((states, _NOWHERE * outside[..., None].float()), -1)
        return every.view(-1, windows_in(batch) * every.shape[1], every.shape[2])

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[2 · examples, tokens]``: of each example the beginning, then the end."""
        logits: Tensor = self.span(features[..., :-1]) + features[..., -1:]
        return logits.transpose(1, 2).flatten(0, 1)

    def write(self, batch: Batch) -> list[str]:
        """The likeliest span of each example, within one window."""
        assert batch.asked
        count, windows = len(batch.asked.prompts), windows_in(batch)
        # an example's probabilities are over all its windows: their spans compare
        logits = self(batch).log_softmax(-1).view(count, 2, windows, -1)
        begins, ends = logits.transpose(1, 2).flatten(0, 1).unbind(1)
        joint = begins[:, :, None] + ends[:, None, :]
        allowed = torch.ones_like(joint[0], dtype=torch.bool).triu().tril(self._longest - 1)
        spans = joint.masked_fill(~allowed, float("-inf")).flatten(1)
        best = spans.amax(-1).view(count, windows).argmax(-1)
        rows = torch.arange(count, device=best.device) * windows + best
        where = spans[rows].argmax(-1)
        first = batch.asked.inputs["first"][rows, where // joint.shape[-1]].tolist()
        last = batch.asked.inputs["last"][rows, where % joint.shape[-1]].tolist()
        return [text[i:j] for text, i, j in zip(batch.asked.prompts, first, last, strict=True)]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The encoder as a ``save_pretrained`` directory, the head as safetensors beside it."""
        from safetensors.torch import save_file

        from pipeline.models.loading import save_model

        save_model(cast("PreTrainedModel", self.encoder), folder)
        tokenizer.save_pretrained(str(folder))
        save_file(
            {name: each.contiguous() for name, each in self.span.state_dict().items()}, folder / HEAD_FILE
        )
        (folder / HEAD_CONFIG).write_text(json.dumps({"longest": self._longest}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SpanReader:
        """What `save` wrote."""
        from safetensors.torch import load_file

        from pipeline.models.loading import load_encoder

        encoder = load_encoder(str(folder), "auto")
        how = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
        model = cls(encoder, encoder.config.hidden_size, how["longest"])
        model.span.load_state_dict(load_file(folder / HEAD_FILE))
        return model.eval()
