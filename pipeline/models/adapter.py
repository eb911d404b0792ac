"""LoRA adapters as PEFT directories: left beside a model that was trained so, and taken in a model's place.

Both ways the files are PEFT's own, ``adapter_config.json`` and safetensors: a file is data, and no code of it
is run. What comes in is merged into its base once; nothing else of the pipeline knows of it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import fresh, loading
from pipeline.models.unpacked import made_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.tasks.base import TaskModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor's name


def save(model: TaskModel, folder: Path, base: str, rank: int) -> None:
    """Writes the factors in ``model``'s encoder, and its head where that is part of the whole model.

    ``PeftModel.from_pretrained`` loads it onto the model in ``base``, of the class that it was trained as.
    """
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    whole, encoder = model.whole, model.encoder
    inner = next((f"{name}." for name, module in whole.named_modules() if module is encoder and name), "")
    state = {inner + name: tensor for name, tensor in get_peft_model_state_dict(encoder).items()}
    modules, head = sorted({name.split(".lora_")[0] for name in state}), _head_modules(model)
    for name in head:
        state |= {f"{name}.{key}": tensor for key, tensor in whole.get_submodule(name).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        task_type=_task_type(whole),
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        modules_to_save=head or None,
        fan_in_fan_out=loading.is_conv(encoder),
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {_PREFIX + name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS)


def _head_modules(model: TaskModel) -> list[str]:
    """The children of the whole model that hold the head's parameters; none where the head is not in it."""
    head = {id(parameter) for parameter in model.head_parameters()}
    found = [name for name, parameter in model.whole.named_parameters() if id(parameter) in head]
    return sorted({name.partition(".")[0] for name in found})


def _task_type(whole: nn.Module) -> str | None:
    """What PEFT chooses a class for generation by."""
    name = type(whole).__name__
    if name.endswith(("CausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def check(folder: Path) -> None:
    """What can be told of an adapter without merging it.

    Raises:
        UserError: it is not one of LoRA in safetensors, or its base is not there.
    """
    kind = _said(folder).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of the kind {kind}; only LoRA's are merged into their base")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: adapters are read from safetensors only")
    try:
        if fresh.is_fresh(_base(folder)):
            raise UserError("a fresh model is another one in every run")
        loading.check(_base(folder))
    except UserError as error:
        raise UserError(f"the base of the adapter {folder}: {error}; {CONFIG} names it") from error


def plain(folder: Path) -> Path:
    """The base with the adapter merged into it, as a ``save_pretrained`` directory in the cache.

    Raises:
        UserError: as `check`, or the two do not fit.
    """
    check(folder)
    base = loading.locate(_base(folder))
    files = [folder / CONFIG, folder / WEIGHTS]
    files += sorted(each for each in Path(base).glob("*") if each.suffix in (".json", ".safetensors"))
    doing = f"{folder}: merging it into its base"
    return made_once(folder.resolve().name, files, doing, lambda out: _merge(folder, base, out))


def _said(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} is not an adapter's configuration")
    return content


def _base(folder: Path) -> str:
    base = _said(folder).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / CONFIG} names no base model: set base_model_name_or_path in it")
    return str(base)


def _merge(folder: Path, base: str, out: Path) -> None:
    from peft import LoraConfig, PeftModel
    from safetensors.torch import load_file

    model = loading.load_as_trained(base, 0)
    root = _adapted(model, folder, base)
    given = {key.removeprefix(_PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
    _check_ties(folder, root.state_dict(), given)
    with loading.loading(str(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the two fit is asked above
        config = LoraConfig.from_pretrained(str(folder))
        config.task_type = config.modules_to_save = None  # copies of modules would lose their ties
        PeftModel.from_pretrained(root, str(folder), config=config, torch_device="cpu").merge_and_unload()
        _take_over(root, given, folder)
    loading.save_model(model, out)
    own = (folder / "tokenizer_config.json").is_file()
    loading.load_tokenizer(str(folder) if own else base).save_pretrained(str(out))


def _take_over(root: nn.Module, given: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what was trained beside the factors into ``root``; a classifier's head may have no place."""
    known = root.state_dict().keys()
    root.load_state_dict({key: value for key, value in given.items() if key in known}, strict=False)
    left_out = {key.rpartition(".")[0] for key in given if key not in known and ".lora_" not in key}
    if left_out:
        print(f"{folder}: left out what its base has not: {', '.join(sorted(left_out))}", file=sys.stderr)


def _check_ties(folder: Path, known: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """One tensor under several names cannot take what was trained under one of them alone."""
    factored = {f"{name.split('.lora_')[0]}.weight" for name in given if ".lora_" in name}
    for name in (given.keys() | factored) & known.keys():
        own = known[name]
        tied = [each for each, other in known.items() if other.data_ptr() == own.data_ptr() and each != name]
        moved = name in factored or not torch.equal(given[name].to(own), own)
        apart = [
            each
            for each in tied
            if name in factored or each not in given or not torch.equal(given[each], given[name])
        ]
        if moved and apart:
            raise UserError(
                f"{folder}: {name} was trained apart from {apart[0]}, to which its base ties it; "
                "merge the two with PEFT, untied, and name the model that this gives"
            )


def _adapted(model: PreTrainedModel, folder: Path, base: str) -> nn.Module:
    """The model, or what is below its head: whichever the adapter's names are of."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or cut off: {error}") from error
    names = {key.removeprefix(_PREFIX).split(".lora_")[0] for key in keys if ".lora_" in key}
    roots: list[nn.Module] = [model, model.base_model]
    missing = [names - {name for name, _ in root.named_modules()} for root in roots]
    for root, lacking in zip(roots, missing, strict=True):
        if names and not lacking:
            return root
    lacking = min(missing, key=len)
    what = f"has no module {min(lacking)}" if lacking else "finds no factors in it"
    raise UserError(f"the adapter {folder} does not fit its base {base}, which {what}")
