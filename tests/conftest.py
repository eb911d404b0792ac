"""Tiny models and texts, made in code: no network, no downloads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start, which run beside each other

collect_ignore = ["plugins"]  # distributions of their own, tested where they are installed

ADJECTIVES = {"up": ["good", "great", "fine"], "down": ["bad", "poor", "dull"]}
OTHERS = ["the", "a", "film", "story", "plot", "it", "was", "is", "and", "not", "slow", "long", "short"]
WORDS = [*OTHERS, *ADJECTIVES["up"], *ADJECTIVES["down"]]


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is written outside ``tmp_path``; one thread, as for the commands."""
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    torch.set_num_threads(1)


def _tokenizer(folder: Path, decoder: bool) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if decoder:
        names = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    else:
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    reads = ["input_ids", "attention_mask"] if decoder else ["input_ids", "token_type_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=reads, **names)
    made.save_pretrained(str(folder))
    return len(vocabulary)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT masked LM of two layers, tied embeddings, as a ``save_pretrained`` directory."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    size = _tokenizer(folder, decoder=False)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers, tied embeddings, as a ``save_pretrained`` directory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    size = _tokenizer(folder, decoder=True)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random causal models with parts that are not plain: OPT, Gemma, Llama, Nemotron."""
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        NemotronConfig,
        NemotronForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    parent = tmp_path_factory.mktemp("decoders")
    size = _tokenizer(parent, decoder=True)
    common = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"max_position_embeddings": 64, "pad_token_id": 3, "bos_token_id": 3, "eos_token_id": 3}
    gated = common | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    made = {
        "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **common)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**gated)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**gated)),
        "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**gated)),
    }
    folders = {name: parent / name for name in made}
    for name, model in made.items():
        _tokenizer(folders[name], decoder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model().save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder_of(bert: Path, gpt2: Path, decoders: dict[str, Path]) -> dict[str, Path]:
    """Each of them by its family's name."""
    return {"bert": bert, "gpt2": gpt2, **decoders}


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Different sentences of the tiny vocabulary, and a label that their adjective decides."""
    import random

    draw = random.Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < count:
        label = draw.choice(["up", "down"])
        word, rest = draw.choice(ADJECTIVES[label]), draw.choices(OTHERS, k=draw.randint(3, 9))
        texts[" ".join([*rest, word])] = label
    return list(texts), list(texts.values())


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with columns of other names, 120 rows."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = [f"{text},{label}" for text, label in zip(*sentences(120), strict=True)]
    path.write_text("\n".join(["review,verdict", *rows]) + "\n", encoding="utf-8")
    return path
