"""Models that write: a decoder that goes on from a prompt, and the batches it learns and is measured on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.loading import load_language_model, load_tokenizer
from pipeline.models.prompt import CACHE_NAMES
from pipeline.noise import derive
from pipeline.tasks.base import Asked, Batch
from pipeline.tasks.batching import pad, pad_left
from pipeline.tasks.decoding import Decoding, decode
from pipeline.tasks.language_modelling import LanguageModel
from pipeline.tasks.template import TEXT, open_end

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "writing.json"


class Decoder(LanguageModel):
    """A causal language model that goes on from what it is asked, until it writes an end."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        super().__init__(model)
        self._tokenizer = tokenizer
        self.decoding = decoding(model, tokenizer, max_new_tokens, temperature)

    @property
    def phrasing(self) -> Phrasing:
        """How its rows are made."""
        return Continued(self._tokenizer.pad_token_id)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A ``save_pretrained`` directory, and how it writes."""
        super().save(folder, tokenizer)
        how = {"max_new_tokens": self.decoding.max_new_tokens, "temperature": self.decoding.temperature}
        (folder / CONFIG).write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Decoder:
        """What `save` wrote."""
        how = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        location = str(folder)
        return cls(load_language_model(location, "clm", 0, "auto"), load_tokenizer(location), **how).eval()

    def write(self, batch: Batch) -> list[str]:
        """Each completion, without its prompt."""
        assert batch.asked
        written = decode(_Reader(self, batch.asked.inputs), self.decoding, batch.asked.seed)
        return texts(written, self.decoding, self._tokenizer)


class _Reader:
    """Reads prompts once and then token by token, with what was computed before kept (a KV cache)."""

    def __init__(self, model: LanguageModel, inputs: dict[str, Tensor]) -> None:
        from transformers import DynamicCache

        self._model = model
        self._ids, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self._cache = DynamicCache(config=model.model.config)
        # a prompt's first token is at position 0, whatever stands before it to fill the row
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        takes = inspect.signature(type(model.encoder).forward).parameters
        self._told = "position_ids" in takes
        self._named = cache_name(takes, model.model)

    def __call__(self, token: Tensor | None) -> Tensor:
        if token is not None:
            self._ids = token[:, None]
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(token), 1)), 1)
            self._positions = self._positions[:, -1:] + 1
        more: dict[str, Any] = {"position_ids": self._positions} if self._told else {}
        more[self._named] = self._cache
        read = self._model.encoder(
            input_ids=self._ids,
            attention_mask=self._mask,
            use_cache=True,
            **more,
        )
        return self._model.outputs(read.last_hidden_state[:, -1])


def cache_name(takes: Mapping[str, Any], model: nn.Module) -> str:
    """What a forward pass that takes those parameters calls the keys and values that were computed before.

    Raises:
        UserError: it takes none.
    """
    for name in CACHE_NAMES:
        if name in takes:
            return name
    raise UserError(f"a {type(model).__name__} keeps no keys and values, by which a text is written")


def texts(written: Tensor, options: Decoding, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What was written, up to its end, without marks of the tokenizer's own."""
    rows = []
    for row in written.tolist():
        ends = [i for i, token in enumerate(row) if token in options.stop]
        rows.append(row[: ends[0]] if ends else row)
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def decoding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> Decoding:
    """How ``model`` writes; it ends where its configuration or its tokenizer says that a text does.

    The tokenizer's end is what targets are trained to end with.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    stop = tuple(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if end is not None))
    first = getattr(model.generation_config, "forced_bos_token_id", None)
    return Decoding(max_new_tokens, temperature, stop, stop[0] if stop else -1, first)


class Phrasing(Protocol):
    """How a row becomes what a model reads and should write."""

    def prompts(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Tokens of what is read."""
        ...

    def targets(self, texts: list[str], template: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Tokens of what should be written, behind prompts of ``template``; without an end."""
        ...

    def learned(self, prompts: list[list[int]], targets: list[list[int]]) -> Batch:
        """The batch on which the targets' tokens are predicted."""
        ...

    def asked(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        """What is read before the first word is written."""
        ...


class Continued:
    """A decoder's `Phrasing`: the target goes on from the prompt."""

    def __init__(self, pad_id: int) -> None:
        self._pad = pad_id

    def prompts(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Each with its end open, whatever the tokenizer would close it with."""
        found = tokenizer(texts, return_special_tokens_mask=True)
        rows = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        return [list(ids)[: open_end(special)] for ids, special in rows]

    def targets(self, texts: list[str], template: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Each after a space, where the template does not end in one."""
        lead = "" if template[-1].isspace() else " "
        rows: list[list[int]] = tokenizer([lead + text for text in texts], add_special_tokens=False)[
            "input_ids"
        ]
        return rows

    def learned(self, prompts: list[list[int]], targets: list[list[int]]) -> Batch:
        inputs = pad([prompt + target for prompt, target in zip(prompts, targets, strict=True)], self._pad)
        width = inputs["input_ids"].shape[1]
        positions = [
            row * width + len(prompt) - 1 + i
            for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
            for i in range(len(target))
        ]
        wanted = [token for target in targets for token in target]
        return Batch(
            inputs, torch.tensor(wanted, dtype=torch.long), torch.tensor(positions, dtype=torch.long)
        )

    def asked(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        return pad_left(prompts, self._pad)


class WritingData:
    """One split of prompts and, perhaps, target texts, tokenized once.

    ``template`` is what a text is put into, at ``{text}``. Where that has more than ``max_length`` tokens,
    the text's end is cut off, never the template's; a target is cut to ``max_new_tokens``, its end included.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        phrasing: Phrasing,
        *,
        template: str,
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        self._phrasing = phrasing
        self._prompts = prompts = [_filled(template, text, tokenizer, max_length) for text in rows["text"]]
        self._tokens = phrasing.prompts(prompts, tokenizer) if prompts else []
        self._references = _references(rows)
        written = [] if self._references is None else [several[0] for several in self._references]
        tokens = phrasing.targets(written, template, tokenizer) if written else []
        self._targets = [_ended(row, tokenizer.eos_token_id)[:max_new_tokens] for row in tokens]

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, rows: Sequence[int], seed: int) -> Batch:
        """The batch of those rows; what is drawn while they are answered starts from ``seed``."""
        prompts = [self._tokens[i] for i in rows]
        targets = [self._targets[i] for i in rows] if self._targets else [[] for _ in rows]
        learned = self._phrasing.learned(prompts, targets)
        references = None if self._references is None else tuple(self._references[i] for i in rows)
        asked = Asked(
            self._phrasing.asked(prompts),
            tuple(self._prompts[i] for i in rows),
            references,
            tuple(map(len, targets)),
            seed,
        )
        return Batch(learned.inputs, learned.targets, learned.positions, None, asked)

    def by_length(self, batch_size: int, seed: int) -> list[Batch]:
        """Every row once, prompts of like length together."""
        order = sorted(range(len(self)), key=lambda i: len(self._tokens[i]))
        return [
            self.batch(order[i : i + batch_size], derive(seed, 10, i))
            for i in range(0, len(order), batch_size)
        ]


def _ended(row: list[int], end: int | None) -> list[int]:
    return row if end is None or row[-1:] == [end] else [*row, end]


def _references(rows: Dataset) -> list[tuple[str, ...]] | None:
    """What may be written of each row: its target, or any of its answers."""
    if "answers" in rows.column_names:
        return [tuple(answers) for answers in rows["answers"]]
    return [(target,) for target in rows["target"]] if "target" in rows.column_names else None


def _filled(template: str, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """``template`` with as much of ``text`` as ``max_length`` tokens hold."""
    whole = template.replace(TEXT, text)
    over = len(tokenizer(whole)["input_ids"]) - max_length
    if over <= 0:
        return whole
    ends = [
        end
        for _, end in tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    ]
    for kept in range(len(ends) - over, 0, -1):  # at a cut, tokens may be others than in the whole
        filled = template.replace(TEXT, text[: ends[kept - 1]])
        if len(tokenizer(filled)["input_ids"]) <= max_length:
            return filled
    raise UserError(
        f"finetune.max_length is {max_length}, which leaves no room for a text in the template "
        f"'{' '.join(template.split())}'; raise it, or shorten finetune.template"
    )
