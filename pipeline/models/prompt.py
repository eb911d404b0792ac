"""A soft prompt: vectors that an encoder reads before the embeddings of each text (Lester et al. 2021).

It becomes a module of the encoder, in place, as LoRA's factors do. Whoever calls the encoder gives it texts
and gets the texts' states: what it computes at the prompt's own positions is cut off. So targets keep their
positions, and an average over a text stays one over its own tokens.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError

NAME = "soft_prompt"  # of the module, within the encoder
CACHE_NAMES = ("cache", "past_key_values")  # of what was computed for a text so far: transformers renamed it
FOLDER = "prompt"  # beside a saved model; PEFT's files, apart from the adapter that LoRA leaves
_CONFIG, _VECTORS = "adapter_config.json", "adapter_model.safetensors"
_SAMPLE = 1024  # words whose embeddings tell how large an element is


class SoftPrompt(nn.Module):
    """Vectors ``[tokens, width]`` to be read before each text."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, embeddings: Tensor) -> Tensor:
        """``[texts, length, width]`` gives ``[texts, tokens + length, width]``."""
        return torch.cat((self.vectors.expand(len(embeddings), -1, -1), embeddings), 1)


def tokens_in(model: nn.Module) -> int:
    """How many tokens are read before each text, 0 where the model has no prompt."""
    prompts = [module for module in model.modules() if isinstance(module, SoftPrompt)]
    return sum(len(prompt.vectors) for prompt in prompts)


def with_prompt(encoder: nn.Module, tokens: int, seed: int) -> None:
    """Adds a prompt of ``tokens`` words' embeddings, drawn from ``seed`` among all rows of the vocabulary.

    Words are what the encoder was trained to read (docs/architecture.md has figures). A prompt that it has
    already, from pretraining, stays as it is.

    Raises:
        UserError: an encoder that cannot have a prompt, or that has one of another length.
    """
    has = tokens_in(encoder)
    if has not in (0, tokens):
        raise UserError(f"the model comes with a prompt of {has} tokens, not {tokens}: set tokens={has}")
    if has:
        return
    if not _takes_embeddings(encoder):
        raise UserError(
            f"a prompt needs a transformer that takes inputs_embeds and reads one text, which a "
            f"{type(encoder).__name__} is not; choose another space, such as lora"
        )
    ids = np.random.default_rng(seed).integers(_words(encoder), size=tokens)
    attach(encoder, _embedded(encoder, torch.from_numpy(ids)))


def attach(encoder: nn.Module, vectors: Tensor) -> None:
    """Makes ``encoder`` read ``vectors`` before each text, in place."""
    encoder.add_module(NAME, SoftPrompt(vectors))
    encoder.register_forward_pre_hook(_read_first, with_kwargs=True)
    encoder.register_forward_hook(_cut_off, with_kwargs=True)


def embedding_scale(encoder: nn.Module) -> float:
    """The standard deviation of an element of a word's embedding.

    To two digits: the order in which another machine sums must not show in what it replays.
    """
    words = _words(encoder)
    sample = _embedded(encoder, torch.arange(0, words, max(1, words // _SAMPLE)))
    return float(f"{float(sample.cpu().double().std()):.2g}")


def save_prompt(encoder: Any, folder: Path) -> None:
    """Writes the encoder's prompt, if it has one, as the PEFT adapter directory ``prompt`` in ``folder``.

    ``PeftModel.from_pretrained`` loads it onto the model without a head that lies in ``folder``.
    """
    if not hasattr(encoder, NAME):
        return
    from peft import PromptTuningConfig, TaskType
    from safetensors.torch import save_file

    vectors = _prompt(encoder).vectors.detach()
    tokens, width = vectors.shape
    PromptTuningConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        num_virtual_tokens=tokens,
        token_dim=width,
        num_transformer_submodules=1,
        inference_mode=True,
    ).save_pretrained(str(folder / FOLDER))
    save_file({"prompt_embeddings": vectors.contiguous()}, folder / FOLDER / _VECTORS)


def load_prompt(encoder: nn.Module, folder: Path) -> None:
    """Adds the prompt that `save_prompt` left in ``folder``, if there is one."""
    if not stored_tokens(folder):
        return
    from safetensors.torch import load_file

    like = next(encoder.parameters())
    attach(encoder, load_file(folder / FOLDER / _VECTORS)["prompt_embeddings"].to(like.device, like.dtype))


def stored_tokens(folder: Path) -> int:
    """How many tokens the prompt in ``folder`` has, 0 where there is none."""
    config = folder / FOLDER / _CONFIG
    if not config.is_file():
        return 0
    return int(json.loads(config.read_text(encoding="utf-8"))["num_virtual_tokens"])


def _prompt(encoder: nn.Module) -> SoftPrompt:
    return cast(SoftPrompt, encoder.get_submodule(NAME))


def _takes_embeddings(encoder: nn.Module) -> bool:
    """Whether a text may be given as embeddings, and the states are those of its tokens."""
    from transformers import PreTrainedModel

    takes = "inputs_embeds" in inspect.signature(type(encoder).forward).parameters
    return takes and isinstance(encoder, PreTrainedModel) and not encoder.config.is_encoder_decoder


def _words(encoder: nn.Module) -> int:
    embedding: Any = encoder.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.num_embeddings)


@torch.no_grad()
def _embedded(encoder: nn.Module, ids: Tensor) -> Tensor:
    """What the encoder reads where it is given ``ids``: some embeddings scale their rows."""
    embedding: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
    found: Tensor = embedding(ids.to(next(embedding.parameters()).device))
    return found


def _read_first(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives the encoder embeddings that begin with the prompt, in place of the ids.

    Where it goes on with a text, whose prompt it has read, only the mask and the positions allow for that.
    """
    tokens = len(_prompt(encoder).vectors)
    given: dict[str, Any] = {}
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    segments = kwargs.get("token_type_ids")
    if mask is not None:
        given["attention_mask"] = nn.functional.pad(mask, (tokens, 0), value=1)
    if segments is not None:  # the prompt is of the first
        given["token_type_ids"] = nn.functional.pad(segments, (tokens, 0), value=0)
    if positions is not None:
        given["position_ids"] = positions + tokens
    if _goes_on(kwargs):
        return args, {**kwargs, **given}
    (ids,) = args or (kwargs["input_ids"],)
    embedding: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
    if positions is not None:
        own = torch.arange(tokens, device=ids.device).expand(len(ids), -1)
        given["position_ids"] = torch.cat((own, positions + tokens), 1)
    return (), {**kwargs, "input_ids": None, "inputs_embeds": _prompt(encoder)(embedding(ids)), **given}


def _goes_on(kwargs: dict[str, Any]) -> bool:
    kept = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    return kept is not None and kept.get_seq_length() > 0


def _cut_off(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Takes the prompt's own positions off the states, where they are among them."""
    if kwargs.get("inputs_embeds") is None:
        return output
    tokens = len(_prompt(encoder).vectors)
    output.last_hidden_state = output.last_hidden_state[:, tokens:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(states[:, tokens:] for states in output.hidden_states)
    return output
