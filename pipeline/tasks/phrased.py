"""Classification by words of several tokens that complete a template.

A label's score is the mean log-probability of its word's tokens, so that a long word is not punished for its
length (Brown et al. 2020, section 2.4; the default of Malladi et al. 2023). Of one token that is its
log-probability; a softmax over the labels' scores then is that of `PromptedClassifier`.

A causal model reads each token after the template and the tokens before it, the true ones. A masked model
reads as many masks as the word has tokens, all at once, and one row serves all words of a length ("PET with
multiple masks" of Schick & Schütze 2021, arXiv 2009.07118, as it is trained).

A token's probability is among the whole vocabulary's, which is computed, and searched where it is in the
space; and a text is read as often as the words have different beginnings, or lengths. Words of one token need
neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.errors import UserError
from pipeline.tasks.base import Batch
from pipeline.tasks.prompted import PROMPTED_FILE, CompletingClassifier, PromptedClassifier, Prompting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def completing(model: PreTrainedModel, prompting: Prompting, mask_token: int | None) -> CompletingClassifier:
    """The classifier that suits the words; ``mask_token`` is the id of a masked model's mask."""
    if prompting.rest:
        return PhrasedClassifier(model, prompting, mask_token)
    return PromptedClassifier(model, prompting)


def load(folder: Path) -> CompletingClassifier:
    """What `CompletingClassifier.save` wrote.

    Raises:
        UserError: the folder holds no prompted classifier.
    """
    from pipeline.models.loading import load_language_model, load_tokenizer

    path = folder / PROMPTED_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no prompted classifier; run the finetune stage first")
    prompting = Prompting(**json.loads(path.read_text(encoding="utf-8")))
    model = load_language_model(str(folder), prompting.kind, 0, "auto")
    mask_token = load_tokenizer(str(folder)).mask_token_id if prompting.rest else None
    return completing(model, prompting, mask_token).eval()


class PhrasedClassifier(CompletingClassifier):
    """A language model that reads each text with what its words' tokens are predicted from.

    ``inserted`` (int64 ``[copies, spare]``, filled with 0) is what stands behind a text's answer in each of
    its rows, ``counts`` (``[copies]``) how much of it. A slot, ``slots`` (``[2, slots]``), is a row and how
    far behind the answer a token is predicted in it.
    """

    def __init__(self, model: PreTrainedModel, prompting: Prompting, mask_token: int | None) -> None:
        super().__init__(model, prompting)
        words = [prompting.spelled(label) for label in range(len(prompting.labels))]
        read = _read(words, mask_token if prompting.kind == "mlm" else None)
        self.copies, self.spare = len(read), max(map(len, read))
        self._lengths = [len(word) for word in words]
        places = [(_row(read, word, i, prompting.kind), i) for word in words for i in range(len(word))]
        slots = list(dict.fromkeys(places))
        whole: Any = model  # typed in part
        self.computed = len(slots) * len(whole.get_output_embeddings().weight)
        # kept as buffers: features are a function of them
        filled = [[*row, *[0] * (self.spare - len(row))] for row in read]
        self.register_buffer("inserted", torch.tensor(filled))
        self.register_buffer("counts", torch.tensor([len(row) for row in read]))
        self.register_buffer("slots", torch.tensor(slots).T)
        self.register_buffer("slot_of", torch.tensor([slots.index(place) for place in places]))
        self.register_buffer("tokens", torch.tensor([token for word in words for token in word]))
        self.inserted: Tensor
        self.counts: Tensor
        self.slots: Tensor
        self.slot_of: Tensor
        self.tokens: Tensor

    def read_shape(self, batch: Batch) -> torch.Size:
        examples, length = super().read_shape(batch)
        return torch.Size((examples * self.copies, length + self.spare))

    def rows(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        width = ids.shape[1] + self.spare
        column, counts = torch.arange(width, device=ids.device), self.counts[:, None]
        behind = column - self.places(mask)[:, None, None] - 1  # [examples, 1, width]
        inside = (behind >= 0) & (behind < counts)
        source = column - torch.where(behind >= counts, counts, 0)
        shape = (len(ids), self.copies, width)

        def with_inserted(values: Tensor, new: Tensor) -> Tensor:
            old = pad(values, (0, self.spare))[:, None].expand(shape).gather(2, source)
            put = new.expand(shape[0], -1, -1).gather(2, behind.clamp(0, self.spare - 1).expand(shape))
            return torch.where(inside, put, old).flatten(0, 1)

        return {
            "input_ids": with_inserted(ids, self.inserted),
            "attention_mask": with_inserted(mask, torch.ones_like(self.inserted)),
        }

    def at_words(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[examples, slots, hidden]``."""
        row, behind = self.slots
        example = torch.arange(len(mask), device=states.device)[:, None]
        each = states.view(len(mask), self.copies, *states.shape[1:])
        return each[example, row, self.places(mask)[:, None] + behind]

    def outputs(self, features: Tensor) -> Tensor:
        """The labels' scores, float32 ``[examples, labels]``."""
        logits = self.logits(features).float()
        chosen = logits[:, self.slot_of, self.tokens] - logits.logsumexp(-1)[:, self.slot_of]
        return torch.stack([word.mean(-1) for word in torch.split(chosen, self._lengths, -1)], -1)


def _read(words: Sequence[Sequence[int]], mask_token: int | None) -> list[list[int]]:
    """What must stand behind the answer so that every token of every word is predicted somewhere.

    Of a causal model the tokens before a word's last, unless another word begins with them; of a masked one a
    mask for each token after the first.
    """
    if mask_token is not None:
        return [[mask_token] * (length - 1) for length in sorted({len(word) for word in words})]
    before = [list(each) for each in dict.fromkeys(tuple(word[:-1]) for word in words)]
    return [row for row in before if not any(other[: len(row)] == row and other != row for other in before)]


def _row(read: Sequence[Sequence[int]], word: Sequence[int], i: int, kind: str) -> int:
    """The first row of what `_read` gave in which the word's token ``i`` is predicted as it should be."""
    if kind == "mlm":
        return next(row for row, masks in enumerate(read) if len(masks) == len(word) - 1)
    return next(row for row, before in enumerate(read) if list(before[:i]) == list(word[:i]))
