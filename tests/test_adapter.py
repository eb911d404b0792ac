"""LoRA adapters, out and in, held against PEFT's own reading of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import adapter
from pipeline.models.loading import check, load_language_model, load_tokenizer, locate, make_plain
from pipeline.tasks.classification import TextClassifier
from tests.test_cli import pipeline, small
from tests.test_engine import searched
from tests.test_prompted import WORDS, WORDS_GIVEN, completing_model

# peft asks transformers in a way that the next major release will not know
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 7, 5, 6, 11]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def auto(family: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    said: Tensor = model.eval()(input_ids=IDS).logits
    return said


def trained(folder: Path, words: list[str], out: Path) -> None:
    """``base``, ``adapter`` and ``merged`` of a model whose factors and head have moved."""
    model, _ = completing_model(folder, words)
    tokenizer = load_tokenizer(str(folder))
    model.save(out / "base", tokenizer)
    space = searched("lora,rank=2", model)
    space.place(0.3 * torch.randn(space.size, generator=torch.Generator().manual_seed(0)))
    model.save_adapter(out / "adapter", str(out / "base"), 2)
    make_plain(model.encoder)
    model.save(out / "merged", tokenizer)


@pytest.mark.parametrize("words", [WORDS, [" not bad", " good"]], ids=["single", "several"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "gemma", "llama"])
def test_peft_makes_the_finetuned_model_of_base_and_adapter(
    family: str, words: list[str], folder_of: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    trained(folder_of[family], words, tmp_path)
    base, ours = (logits(auto(family).from_pretrained(tmp_path / name)) for name in ("base", "merged"))
    tuned = PeftModel.from_pretrained(auto(family).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    theirs = logits(tuned)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, ours, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_adapter_in_a_models_place_is_merged_once(
    family: str, folder_of: dict[str, Path], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(folder_of[family], WORDS, tmp_path)
    folder = str(tmp_path / "adapter")
    check(folder)
    assert not cache.exists()
    plain = locate(folder)
    assert f"{folder}: merging it into its base, once, into" in capsys.readouterr().err
    merged = logits(auto(family).from_pretrained(plain))
    ours = logits(auto(family).from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(plain).get_vocab() == load_tokenizer(str(tmp_path / "base")).get_vocab()
    assert locate(folder) == plain
    assert capsys.readouterr().err == ""
    # another base is another model
    model = auto(family).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        list(model.parameters())[1].add_(
            1.0
        )  # the first is the embedding, which the adapter's head holds too
    model.save_pretrained(tmp_path / "base")
    assert locate(folder) != plain


def test_an_adapter_made_by_peft_is_read_as_peft_reads_it(gpt2: Path, tmp_path: Path) -> None:
    """Rank-stabilised, of a few layers, another α, DoRA's magnitudes."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=True,
        use_dora=True,
        target_modules=["c_attn"],
        layers_to_transform=[1],
        fan_in_fan_out=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(auto("gpt2").from_pretrained(gpt2), config)
    tuned.save_pretrained(tmp_path / "given")
    merged = load_language_model(locate(str(tmp_path / "given")), "clm", 0)
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=1e-4, atol=1e-4)


def test_a_head_that_the_base_has_not_is_left_out(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert)
    config = LoraConfig(target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    tuned: Any = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "given")
    plain = locate(str(tmp_path / "given"))
    assert "left out what its base has not: classifier" in capsys.readouterr().err
    merged = auto("bert").from_pretrained(plain)
    with torch.inference_mode():
        ours = merged.bert(input_ids=IDS).last_hidden_state
        theirs = tuned.base_model.model.bert(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_layer_trained_apart_from_its_tie_is_refused(gpt2: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    with pytest.warns(UserWarning, match="tied"):
        tuned: Any = get_peft_model(auto("gpt2").from_pretrained(gpt2), config)
    tuned.save_pretrained(tmp_path / "as-it-was")
    assert torch.equal(
        logits(load_language_model(locate(str(tmp_path / "as-it-was")), "clm", 0)), logits(tuned)
    )
    with torch.no_grad():
        tuned.base_model.model.lm_head.modules_to_save.default.weight.add_(1.0)
    tuned.save_pretrained(tmp_path / "moved")
    apart = r"lm_head\.weight was trained apart from transformer\.wte\.weight"
    with pytest.raises(UserError, match=apart):
        locate(str(tmp_path / "moved"))
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="tied"):
        tuned = get_peft_model(auto("gpt2").from_pretrained(gpt2), config)
    with pytest.warns(UserWarning, match="embedding"):
        tuned.save_pretrained(tmp_path / "factors")
    with pytest.raises(UserError, match=apart):
        locate(str(tmp_path / "factors"))


def _changed(folder: Path, **values: Any) -> None:
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_merged_is_one_line(gpt2: Path, bert: Path, tmp_path: Path) -> None:
    trained(gpt2, WORDS, tmp_path)
    folder = tmp_path / "adapter"
    for name, values, error in (
        ("kind", {"peft_type": "PROMPT_TUNING"}, "adapter of the kind PROMPT_TUNING; only LoRA's are merged"),
        ("nameless", {"base_model_name_or_path": None}, "names no base model: set base_model_name_or_path"),
        ("gone", {"base_model_name_or_path": "/no/model"}, "no model directory at /no/model; adapter_config"),
    ):
        shutil.copytree(folder, tmp_path / name)
        _changed(tmp_path / name, **values)
        with pytest.raises(UserError, match=error) as caught:
            check(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / adapter.WEIGHTS).rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors: adapters are read from safet"):
        locate(str(tmp_path / "pickled"))
    (tmp_path / "pickled" / adapter.CONFIG).write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        locate(str(tmp_path / "pickled"))
    _changed(folder, base_model_name_or_path=str(bert))
    with pytest.raises(UserError, match=r"not fit its base .*, which has no module (transformer\.)?h\.0"):
        locate(str(folder))
    (folder / adapter.WEIGHTS).write_bytes(b"none")
    with pytest.raises(UserError, match="is damaged or cut off"):
        locate(str(folder))


def test_a_run_goes_on_from_another_runs_adapter(bert: Path, table: Path, tmp_path: Path) -> None:
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--no-baselines"]
    given += ["-S", "pretrain.enabled=false", "-S", "finetune.space=lora,rank=2"]
    done = pipeline(*given, *small(bert), "--name", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    first = tmp_path / "runs" / "mine" / "models"
    done = pipeline(*given, *small(first / "finetuned" / "adapter"), "--name", "other", home=tmp_path)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "runs" / "other" / "models" / "pretrained"
    before = TextClassifier.load(first / "finetuned").encoder.state_dict()
    after = auto("bert").from_pretrained(second).bert.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_run_leaves_the_adapter_of_a_model_in_a_template(
    family: str, folder_of: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    template = "{text} it was" + (" {mask}" if family == "bert" else "")
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--no-baselines"]
    given += [*small(folder_of[family]), "-S", "pretrain.enabled=false", "-S", "finetune.space=lora,rank=2"]
    done = pipeline(
        *given, *WORDS_GIVEN, "-S", f"finetune.template='{template}'", "--name", "mine", home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    models = tmp_path / "runs" / "mine" / "models"
    base = auto(family).from_pretrained(models / "pretrained")
    tuned = PeftModel.from_pretrained(base, models / "finetuned" / "adapter")
    ours = logits(auto(family).from_pretrained(models / "finetuned"))
    torch.testing.assert_close(ours, logits(tuned), rtol=1e-4, atol=1e-4)
