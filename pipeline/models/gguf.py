"""GGUF, the file format of llama.cpp: weights in quantised blocks, unpacked once into a plain directory.

The directory is what every other model is, safetensors and a tokenizer, so nothing else of the pipeline knows
of GGUF. A file is data: no code of it is run.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.loading import loading
from pipeline.models.unpacked import made_once

_MAGIC = b"GGUF"
_DAMAGED = (struct.error, IndexError, OverflowError, UnicodeDecodeError, TypeError)


def check(file: Path) -> None:
    """What can be told of a file without unpacking it.

    Raises:
        UserError: no such file, or it is not GGUF.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{file} is not a GGUF file: it does not begin with {_MAGIC.decode()}")


def plain(file: Path) -> Path:
    """The model of a GGUF file as a ``save_pretrained`` directory in the cache; unpacked on first use.

    Raises:
        UserError: no such file, not GGUF, damaged, or of an architecture that transformers cannot read.
    """
    check(file)
    doing = f"{file.name}: unpacking its weights"
    return made_once(file.stem, [file], doing, lambda out: _unpack(file.resolve(), out))


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with loading(str(file)):
        try:
            given: dict[str, Any] = {"gguf_file": file.name}
            config = AutoConfig.from_pretrained(str(file.parent), **given)
            model = _dequantized(str(file.parent), file.name, config)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **given)
        except _DAMAGED as error:
            raise UserError(f"{file} is damaged or cut off: {error}") from error
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _dequantized(folder: str, name: str, config: Any) -> Any:
    """The model with plain weights: those the file holds as floats in their dtype, blocks as float32."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GgufConfig

    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, gguf_file=name, dtype="auto", quantization_config=GgufConfig(dequantize=True)
    )
    # what marks it as quantised would have it refuse to be saved, and loaded as it is
    for owner, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
    return model
