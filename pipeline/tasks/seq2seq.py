"""Encoder-decoder models: a text is read whole, and its answer written beside it (T5, BART and the like)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.loading import load_language_model, load_tokenizer
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import pad
from pipeline.tasks.decoding import decode
from pipeline.tasks.writing import CONFIG, Phrasing, cache_name, decoding, texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Seq2Seq(TaskModel):
    """A ``transformers`` encoder-decoder, split below the layer that gives logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        super().__init__()
        capped = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if capped:  # behind the layer that gives them, where the rest is cut off
            raise UserError(
                f"a {type(model).__name__} caps its logits at {capped:g}: it is not supported here"
            )
        self.model = model
        self._body = (EncoderDecoder(model),)  # no module of its own: it would name every tensor twice
        self._tokenizer = tokenizer
        self.decoding = decoding(model, tokenizer, max_new_tokens, temperature)

    @property
    def whole(self) -> nn.Module:
        """With its head."""
        return self.model

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """Everything below the logits: the same modules, by the same names."""
        return self._body[0]

    @property
    def phrasing(self) -> Phrasing:
        """How its rows are made."""
        return Answered(self._tokenizer.pad_token_id, start_token(self.model))

    def features(self, batch: Batch) -> Tensor:
        """The decoder's states at the positions with a target: ``[outputs, hidden]``."""
        return self._states(**batch.inputs, use_cache=False).flatten(0, 1)[batch.positions]

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[outputs, vocabulary]``."""
        logits: Tensor = self._head(features)
        bias = getattr(self.model, "final_logits_bias", None)
        return logits if bias is None else logits + bias[0]

    def write(self, batch: Batch) -> list[str]:
        """Each answer."""
        assert batch.asked
        written = decode(_Reader(self, batch.asked.inputs), self.decoding, batch.asked.seed)
        return texts(written, self.decoding, self._tokenizer)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A ``save_pretrained`` directory, and how it writes."""
        from pipeline.models.loading import save_model

        save_model(self.model, folder)
        tokenizer.save_pretrained(str(folder))
        how = {"max_new_tokens": self.decoding.max_new_tokens, "temperature": self.decoding.temperature}
        (folder / CONFIG).write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Seq2Seq:
        """What `save` wrote."""
        how = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = load_language_model(str(folder), "seq2seq", 0, "auto")
        return cls(model, load_tokenizer(str(folder)), **how).eval()

    @property
    def _head(self) -> nn.Module:
        return head_of(self.model)

    def _states(self, **inputs: Any) -> Tensor:
        """What the head is given: only a target's logits are worth computing."""
        hook = self._head.register_forward_pre_hook(_stop)
        try:
            self.model(**inputs)
        except _Reached as reached:
            return reached.states
        finally:
            hook.remove()
        raise UserError(f"a {type(self.model).__name__} has no layer of its own that gives logits")


def head_of(model: PreTrainedModel) -> nn.Module:
    """The layer that gives logits."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(head: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Reached(args[0])


class EncoderDecoder(nn.Module):
    """The children of a model but for its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = head_of(model)
        for name, child in model.named_children():
            if all(module is not head for module in child.modules()):
                self.add_module(name, child)


class _Reader:
    """Reads the text once, and then what was written of its answer, token by token (a KV cache)."""

    def __init__(self, model: Seq2Seq, inputs: dict[str, Tensor]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._model = model
        self._mask = inputs["attention_mask"]
        encoder: Any = model.model.get_encoder()
        self._read = encoder(**inputs)
        config = model.model.config
        self._cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        takes = inspect.signature(type(model.model).forward).parameters
        self._named = cache_name(takes, model.model)
        first = start_token(model.model)
        self._start = torch.full((len(self._mask),), first, device=self._mask.device)

    def __call__(self, token: Tensor | None) -> Tensor:
        states = self._model._states(
            encoder_outputs=self._read,
            attention_mask=self._mask,
            decoder_input_ids=(self._start if token is None else token)[:, None],
            use_cache=True,
            **{self._named: self._cache},
        )
        return self._model.outputs(states[:, -1])


def start_token(model: PreTrainedModel) -> int:
    """The token that an answer begins after.

    Raises:
        UserError: the model's configuration has none.
    """
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    raise UserError(f"the configuration of the {type(model).__name__} has no decoder_start_token_id")


class Answered:
    """The `Phrasing` of an encoder-decoder: the target is the decoder's own text."""

    def __init__(self, pad_id: int, start: int) -> None:
        self._pad = pad_id
        self._start = start

    def prompts(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """As the encoder reads a text of its own."""
        rows: list[list[int]] = tokenizer(texts)["input_ids"]
        return rows

    def targets(self, texts: list[str], template: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """As the decoder learned to write them: BART, for one, begins with a token of its own."""
        rows: list[list[int]] = tokenizer(text_target=texts)["input_ids"]
        return rows

    def learned(self, prompts: list[list[int]], targets: list[list[int]]) -> Batch:
        read = pad([[self._start, *target[:-1]] for target in targets], self._pad)["input_ids"]
        width = read.shape[1]
        positions = [row * width + i for row, target in enumerate(targets) for i in range(len(target))]
        wanted = [token for target in targets for token in target]
        return Batch(
            {**self.asked(prompts), "decoder_input_ids": read},
            torch.tensor(wanted, dtype=torch.long),
            torch.tensor(positions, dtype=torch.long),
        )

    def asked(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        return pad(prompts, self._pad)
