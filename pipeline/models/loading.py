"""Models of the Hugging Face world: found, loaded (safetensors only), adapted, saved."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.data.packages import PREFIX, model_path, package
from pipeline.errors import UserError, unknown
from pipeline.layout import Layout
from pipeline.models import fresh, prompt, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    # loaded as they are saved, and quantized a layer at a time: float32 would be held whole
    **dict.fromkeys(quantized.FORMATS, "auto"),
}

# what a model's class raises for values of its configuration that make no sense together
_OF_VALUES = (ZeroDivisionError, AssertionError, AttributeError, TypeError)


def choose_device(name: str) -> torch.device:
    """``auto`` is the first of CUDA, MPS and CPU that is there.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device '{name}' on this machine; try device=auto or cpu") from error
    return device


def choose_dtype(name: str) -> torch.dtype | str:
    """The dtype to load with: of that name, or ``auto``, the checkpoint's own.

    Raises:
        UserError: no such dtype.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def locate(reference: str) -> str:
    """A local directory for ``package:NAME``, a GGUF file or a path; anything else is returned as a hub id.

    Of ``fresh:REFERENCE`` it is ``fresh:`` and that, which the loaders here understand. A package is
    fetched, a GGUF file unpacked, and a LoRA adapter merged into its base, on first use.

    Raises:
        UserError: a path that does not exist or holds no model.
    """
    check(reference)
    described = _located(fresh.described_in(reference))
    return fresh.PREFIX + described if fresh.is_fresh(reference) else described


def _located(reference: str) -> str:
    path = Path(reference)
    if reference.startswith(PREFIX):
        path = model_path(reference.removeprefix(PREFIX))
    from pipeline.models import adapter

    if path.suffix == ".gguf":
        from pipeline.models.gguf import plain

        return str(plain(path))
    if adapter.is_adapter(path):
        return str(adapter.plain(path))
    return str(path) if path.is_dir() else reference


def pretrained_in(layout: Layout) -> str:
    """Where the pretrain stage left its model.

    Raises:
        UserError: it has not run.
    """
    if not (layout.pretrained / "config.json").is_file():
        raise UserError(f"no pretrained model at {layout.pretrained}; run the pretrain stage first")
    return str(layout.pretrained)


def check(reference: str) -> None:
    """What can be told of a model before anything is fetched or unpacked.

    Raises:
        UserError: no such package, or a path that does not exist or holds no model.
    """
    drawn, reference = fresh.is_fresh(reference), fresh.described_in(reference)
    path = Path(reference)
    if reference.startswith(PREFIX):
        package(reference.removeprefix(PREFIX), "model")
    elif path.suffix == ".gguf":
        from pipeline.models.gguf import check as check_gguf

        check_gguf(path)
    elif path.is_dir():
        from pipeline.models import adapter

        if adapter.is_adapter(path):
            adapter.check(path)
        elif not (path / "config.json").is_file():
            made = path / "models" / "pretrained"
            hint = f"; it is a run, whose model is in {made}" if made.is_dir() else ""
            raise UserError(f"{path} holds no model: it has no config.json{hint}")
        elif not drawn and not any(path.glob("*.safetensors")):
            raise UserError(
                f"{path} has no weights in safetensors, the only form that is loaded; `pipeline replay` "
                f"rebuilds those of a run, and {fresh.PREFIX}{reference} as the model draws new ones"
            )
    elif path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise UserError(f"no model directory at {reference}")


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model, with a padding token.

    Raises:
        UserError: there is none, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    fresh.check_tokenizer(location)
    with loading(location):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(fresh.described_in(location))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {fresh.described_in(location)} has no token to pad with; name a "
                "pad_token or an eos_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(location: str) -> Any:
    """The model's configuration; a fresh one's says what architecture it is."""
    from transformers import AutoConfig

    with loading(location):
        config = AutoConfig.from_pretrained(fresh.described_in(location))
    if fresh.is_fresh(location) and not config.architectures:
        config.architectures = fresh.named_by_type(config)
    return config


def load_encoder(location: str, dtype: str = "float32", seed: int | None = None) -> PreTrainedModel:
    """The model without a head, in eval mode, with the prompt that `save_model` left beside it.

    ``dtype`` is a name that `choose_dtype` knows; a fresh model is drawn from ``seed``.
    """
    from transformers import MODEL_MAPPING, AutoModel

    with loading(location):
        options: dict[str, Any] = {}
        config = load_config(location)
        # a pooler that nothing reads would be searched for nothing
        built: Any = MODEL_MAPPING.get(type(config), None)
        if built and "add_pooling_layer" in inspect.signature(built).parameters:
            options["add_pooling_layer"] = False
        if fresh.is_fresh(location):
            if seed is None:
                raise UserError(f"{location} is drawn from a seed, and load_encoder was given none")
            return _held(
                fresh.drawn(AutoModel, location, config, seed, choose_dtype(dtype), **options), dtype
            )
        model: PreTrainedModel = AutoModel.from_pretrained(
            location, use_safetensors=True, dtype=choose_dtype(dtype), **options
        )
        prompt.load_prompt(model, Path(location))
    return _held(model, dtype)


def _held(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The loaded model in eval mode, quantized if ``dtype`` says so."""
    if dtype in quantized.FORMATS:
        quantized.quantize(model, dtype)
    model.eval()
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """A ``save_pretrained`` directory; a prompt, which the model's class does not know, lies beside it."""
    weights = {key: value for key, value in model.state_dict().items() if prompt.NAME not in key.split(".")}
    model.save_pretrained(str(folder), state_dict=weights)
    prompt.save_prompt(model.base_model, folder)


def pass_through(reference: str, folder: Path, seed: int) -> None:
    """Saves a model, and its tokenizer if it has one, as they come, a trained language-modelling head too.

    A fresh one is drawn from ``seed``.
    """
    location = locate(reference)
    model = load_as_trained(location, seed)
    save_model(model, folder)
    if model.main_input_name == "input_ids":
        load_tokenizer(location).save_pretrained(str(folder))


def load_as_trained(location: str, seed: int) -> PreTrainedModel:
    """The model in its own dtype, with a language-model head where that was trained; a fresh one has it."""
    try:
        task = writes_as(location) or self_supervised_task(location)
        model, drawn = _language_model(location, task, seed, "auto")
    except UserError:  # an architecture that has none
        drawn = True
    return load_encoder(location, "auto", seed) if drawn else model


def load_language_model(location: str, task: str, seed: int, dtype: str = "float32") -> PreTrainedModel:
    """The model with its language-modelling head, in eval mode.

    ``task`` is ``mlm``, ``clm`` or ``seq2seq``, ``dtype`` a name that `choose_dtype` knows. Parts the
    checkpoint lacks, such as a head that was never trained, are drawn from ``seed``. A prompt beside it is
    loaded too.

    Raises:
        UserError: the model cannot be loaded, or has no such head.
    """
    model, _ = _language_model(location, task, seed, dtype)
    return model


def _language_model(location: str, task: str, seed: int, dtype: str) -> tuple[PreTrainedModel, bool]:
    """`load_language_model`, and whether a part of it was drawn."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    if task == "clm" and self_supervised_task(location) == "mlm":
        raise UserError(
            f"{location} reads its text in both directions, so the next token is no secret to it: "
            "use pretrain.task=mlm"
        )
    auto: Any = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[
        task
    ]
    return load_with_head(auto, location, seed, dtype)


def load_with_head(
    auto: Any, location: str, seed: int, dtype: str = "float32", **options: Any
) -> tuple[PreTrainedModel, bool]:
    """A model of one of transformers' ``AutoModelFor…`` in eval mode, and whether a checkpoint lacked a part.

    What it lacked is drawn from ``seed``, as all of a fresh model is; ``options`` change its configuration,
    such as ``num_labels``. A prompt beside it is loaded too.

    Raises:
        UserError: the model cannot be loaded.
    """
    model: PreTrainedModel
    if fresh.is_fresh(location):
        config = load_config(location)
        config.update(options)
        with loading(location):
            return _held(fresh.drawn(auto, location, config, seed, choose_dtype(dtype)), dtype), False
    with loading(location), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(
            location, use_safetensors=True, dtype=choose_dtype(dtype), output_loading_info=True, **options
        )
        prompt.load_prompt(model.base_model, Path(location))
    return _held(model, dtype), bool(info["missing_keys"])


def has_language_head(location: str) -> bool:
    """Whether the model in a directory was saved with its language-modelling head."""
    names = load_config(location).architectures or ()
    return any(name.endswith(("MaskedLM", "CausalLM", "LMHeadModel", "ForPreTraining")) for name in names)


def self_supervised_task(location: str) -> str:
    """``clm`` for a decoder, ``mlm`` for an encoder: what the model's architecture is for."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = load_config(location)
    if writes_as(location) == "clm":
        return "clm"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "mlm"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "clm"
    raise UserError(
        f"{location} ({config.model_type}) has neither a masked nor a causal language-modelling head"
    )


def writes_as(location: str) -> str | None:
    """``clm`` for a decoder and ``seq2seq`` for an encoder-decoder, with their heads; None for others."""
    config = load_config(location)
    names = config.architectures or ()
    if any(name.endswith(("CausalLM", "LMHeadModel")) for name in names):
        return "clm"
    if config.is_encoder_decoder and any(name.endswith("ForConditionalGeneration") for name in names):
        return "seq2seq"
    return None


@contextmanager
def loading(location: str) -> Iterator[None]:
    """Loads without the library's progress bars and reports; its errors become one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except StrictDataclassError as error:  # says what on its second line
        raise UserError(f"{location}: config.json: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, *_OF_VALUES) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = " ".join(lines[:3] if lines[0].rstrip().endswith(":") else lines[:1])  # a list follows
        offline = (
            " (no such directory here, and the hub was not reached)"
            if not os.path.exists(fresh.described_in(location))
            else ""
        )
        raise UserError(f"cannot load the model '{location}'{offline}: {first}") from error
    finally:
        logging.set_verbosity(level)


def with_lora(encoder: nn.Module, rank: int, seed: int) -> None:
    """Injects PEFT's LoRA factors on every linear layer of ``encoder``, in place; its output stays the same.

    The scale α/r is 1. A is drawn from ``seed``, B is zero.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, fan_in_fan_out=is_conv(encoder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder)
    encoder.eval()


def is_conv(encoder: nn.Module) -> bool:
    """Whether it has layers that hold their weight as GPT-2 does, inputs first."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in encoder.modules())


def make_plain(encoder: nn.Module) -> None:
    """Leaves weights as any tool reads them, in place.

    Quantized ones are in float32 again; the product of LoRA's factors is added to theirs, and the factors go.
    """
    from peft.tuners.lora import LoraLayer

    quantized.dequantize(encoder)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent = encoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
