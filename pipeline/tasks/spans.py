"""Answers as spans of a context: an encoder and a head that says where an answer begins and ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.tasks.base import Asked, Batch, TaskModel
from pipeline.tasks.batching import pad

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_FILE, HEAD_CONFIG = "spans.safetensors", "spans.json"
LONGEST = 30  # tokens of an answer
_NOWHERE = -1e4  # the logit of a token outside the context
_WITHIN = "context_mask"  # beside what the encoder reads: which tokens are the context's


class SpanReader(TaskModel):
    """An encoder's states under a linear layer: for each token, whether an answer begins or ends there.

    The layer starts from zero: no token is likelier than another. Outputs are two an example, the beginning
    and the end, each over the tokens.
    """

    def __init__(self, encoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.span = nn.Linear(hidden, 2)
        nn.init.zeros_(self.span.weight)
        nn.init.zeros_(self.span.bias)

    def features(self, batch: Batch) -> Tensor:
        """States, and behind them 0 for the context's tokens: float32 ``[examples, tokens, hidden + 1]``."""
        inputs = dict(batch.inputs)
        outside = inputs.pop(_WITHIN) == 0
        states = self.encoder(**inputs).last_hidden_state.float()
        return torch.cat((states, _NOWHERE * outside[..., None].float()), -1)

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[2 · examples, tokens]``: of each example the beginning, then the end."""
        logits: Tensor = self.span(features[..., :-1]) + features[..., -1:]
        return logits.transpose(1, 2).flatten(0, 1)

    def write(self, batch: Batch) -> list[str]:
        """The likeliest span of each example, of at most `LONGEST` tokens."""
        assert batch.asked
        begins, ends = self(batch).log_softmax(-1).view(len(batch.asked.prompts), 2, -1).unbind(1)
        joint = begins[:, :, None] + ends[:, None, :]
        allowed = torch.ones_like(joint[0], dtype=torch.bool).triu().tril(LONGEST - 1)
        where = joint.masked_fill(~allowed, float("-inf")).flatten(1).argmax(-1)
        rows = torch.arange(len(where), device=where.device)
        first = batch.asked.inputs["first"][rows, where // joint.shape[-1]].tolist()
        last = batch.asked.inputs["last"][rows, where % joint.shape[-1]].tolist()
        return [text[i:j] for text, i, j in zip(batch.asked.prompts, first, last, strict=True)]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The encoder as a ``save_pretrained`` directory, the head as safetensors beside it."""
        from safetensors.torch import save_file

        from pipeline.models import save_model

        save_model(cast("PreTrainedModel", self.encoder), folder)
        tokenizer.save_pretrained(str(folder))
        save_file(
            {name: each.contiguous() for name, each in self.span.state_dict().items()}, folder / HEAD_FILE
        )
        (folder / HEAD_CONFIG).write_text(json.dumps({"longest": LONGEST}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SpanReader:
        """What `save` wrote."""
        from safetensors.torch import load_file

        from pipeline.models import load_encoder

        encoder = load_encoder(str(folder), "auto")
        model = cls(encoder, encoder.config.hidden_size)
        model.span.load_state_dict(load_file(folder / HEAD_FILE))
        return model.eval()


class SpanData:
    """One split of questions, tokenized once. A context too long is cut at its end.

    With ``answerable`` questions whose answer was cut off are left out; else the context's last token stands
    for it, so that it counts as not found.
    """

    def __init__(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, answerable: bool
    ) -> None:
        try:
            read = tokenizer(
                list(rows["question"]),
                list(rows["context"]),
                truncation="only_second",
                max_length=max_length,
                return_offsets_mapping=True,
            )
        except Exception as error:  # of the tokenizers' own kind
            raise UserError(
                f"finetune.max_length is {max_length}: a question leaves no room for its context; raise it "
                f"({' '.join(str(error).split())})"
            ) from error
        self._pad = tokenizer.pad_token_id
        self._names = [name for name in ("token_type_ids",) if name in read]
        self._read = read
        self._within = [[int(part == 1) for part in read.sequence_ids(i)] for i in range(len(rows))]
        self._contexts, self._answers = list(rows["context"]), list(rows["answers"])
        found = [self._place(i, rows["starts"][i][0]) for i in range(len(rows))]
        self._places = [self._last(i) if place is None else place for i, place in enumerate(found)]
        self._rows = [i for i, place in enumerate(found) if place is not None or not answerable]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The batch of those rows."""
        rows = [self._rows[i] for i in rows]
        inputs = pad([self._read["input_ids"][i] for i in rows], self._pad)
        for name in self._names:
            inputs[name] = pad([self._read[name][i] for i in rows], 0)["input_ids"]
        inputs[_WITHIN] = pad([self._within[i] for i in rows], 0)["input_ids"]
        offsets = [self._read["offset_mapping"][i] for i in rows]
        asked = Asked(
            {
                "first": pad([[i for i, _ in each] for each in offsets], 0)["input_ids"],
                "last": pad([[j for _, j in each] for each in offsets], 0)["input_ids"],
            },
            tuple(self._contexts[i] for i in rows),
            tuple(tuple(self._answers[i]) for i in rows),
            (2,) * len(rows),
            0,
        )
        return Batch(inputs, torch.tensor([place for i in rows for place in self._places[i]]), asked=asked)

    def by_length(self, batch_size: int) -> list[Batch]:
        """Every row once, rows of like length together."""
        order = sorted(range(len(self)), key=lambda i: len(self._read["input_ids"][self._rows[i]]))
        return [self.batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]

    def _place(self, row: int, start: int) -> tuple[int, int] | None:
        """The first answer's first and last token; None where it was cut off."""
        end = start + len(self._answers[row][0])
        offsets: list[Any] = self._read["offset_mapping"][row]
        tokens = [
            i
            for i, (first, last) in enumerate(offsets)
            if self._within[row][i] and first < end and last > start
        ]
        whole = tokens and offsets[tokens[-1]][1] >= end and offsets[tokens[0]][0] <= start
        return (tokens[0], tokens[-1]) if whole else None

    def _last(self, row: int) -> tuple[int, int]:
        last = max(i for i, within in enumerate(self._within[row]) if within)
        return last, last
