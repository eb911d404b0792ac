"""Models that start from nothing: a configuration and a seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.models.loading import (
    check,
    load_as_trained,
    load_encoder,
    load_language_model,
    load_tokenizer,
    locate,
    writes_as,
)
from pipeline.noise import derive
from tests.conftest import sentences
from tests.test_cli import kill_within, pipeline


def described(folder: Path, out: Path) -> Path:
    """All of a model's directory but its weights."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    known = json.loads(file.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in known.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_fresh_model_is_what_transformers_draws_by_the_seed(
    folder_of: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """The fixtures were drawn by seed 0."""
    folder = described(folder_of[family], tmp_path / "described")
    task = "mlm" if family == "bert" else "clm"
    drawn = load_language_model(locate(f"fresh:{folder}"), task, 0)
    given = load_language_model(str(folder_of[family]), task, 0)
    for name, value in given.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], value), name
    other = load_language_model(locate(f"fresh:{folder}"), task, 1)
    assert not torch.equal(other.get_input_embeddings().weight, given.get_input_embeddings().weight)
    assert not drawn.training


def test_weights_that_lie_beside_it_are_left(gpt2: Path) -> None:
    drawn = load_language_model(locate(f"fresh:{gpt2}"), "clm", 1)
    given = load_language_model(str(gpt2), "clm", 1)
    assert not torch.equal(drawn.get_input_embeddings().weight, given.get_input_embeddings().weight)


def test_drawing_leaves_the_random_numbers_of_others_alone(gpt2: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_language_model(locate(f"fresh:{gpt2}"), "clm", 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("family", "wanted"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM")])
def test_a_configuration_by_hand_need_not_name_its_class(
    folder_of: dict[str, Path], family: str, wanted: str, tmp_path: Path
) -> None:
    folder = described(folder_of[family], tmp_path / "described")
    edit(folder, architectures=None)
    assert type(load_as_trained(locate(f"fresh:{folder}"), 0)).__name__ == wanted


def test_an_encoder_decoder_by_hand_writes(bert: Path, tmp_path: Path) -> None:
    from transformers import T5Config

    load_tokenizer(str(bert)).save_pretrained(str(tmp_path))
    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    assert writes_as(f"fresh:{tmp_path}") == "seq2seq"
    assert type(load_as_trained(f"fresh:{tmp_path}", 0)).__name__ == "T5ForConditionalGeneration"


def test_what_reads_no_text_can_be_fresh(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(tmp_path)
    first, again, other = (load_as_trained(f"fresh:{tmp_path}", seed) for seed in (0, 0, 1))
    weights = [model.state_dict()["embeddings.cls_token"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_held_in_few_bits_and_in_half_precision(gpt2: Path) -> None:
    half = load_language_model(f"fresh:{gpt2}", "clm", 0, "bfloat16")
    assert half.dtype == torch.bfloat16
    held = load_language_model(f"fresh:{gpt2}", "clm", 0, "int8")
    assert any(value.dtype == torch.int8 for value in held.buffers())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(gpt2: Path, tmp_path: Path) -> None:
    folder = described(gpt2, tmp_path / "described")
    edit(folder, vocab_size=10)
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens and config.json a vocab_size of 10"):
        load_language_model(f"fresh:{folder}", "clm", 0)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        check(f"fresh:{tmp_path}")
    with pytest.raises(UserError, match=r"no model directory at \./nothing"):
        check("fresh:./nothing")
    with pytest.raises(UserError, match="unknown package 'minilmm'"):
        check("fresh:package:minilmm")


def test_weights_that_are_missing_are_not_drawn_unasked(gpt2: Path, tmp_path: Path) -> None:
    folder = described(gpt2, tmp_path / "described")
    with pytest.raises(UserError, match=rf"no weights in safetensors.*fresh:{folder} as the model draws new"):
        check(str(folder))
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(str(folder), "clm", 0)


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("gpt2", {"n_embd": "8"}, r"config\.json: .*n_embd.*expected int"),
        ("gpt2", {"n_head": 0}, "division|modulo"),
        ("llama", {"pad_token_id": 500}, "within num_embeddings"),
        ("gpt2", {"dtype": "float31"}, "float31"),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_line(
    folder_of: dict[str, Path], family: str, values: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = described(folder_of[family], tmp_path / "described")
    edit(folder, **values)
    with pytest.raises(UserError, match=said) as caught:
        load_as_trained(locate(f"fresh:{folder}"), 0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_pad_is_one_line(gpt2: Path, tmp_path: Path) -> None:
    folder = described(gpt2, tmp_path / "described")
    file = folder / "tokenizer_config.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({key: value for key, value in known.items() if key != "eos_token"}))
    with pytest.raises(UserError, match="has no token to pad with"):
        load_tokenizer(f"fresh:{folder}")


def test_a_fresh_encoder_needs_a_seed(bert: Path) -> None:
    with pytest.raises(UserError, match="drawn from a seed"):
        load_encoder(f"fresh:{bert}")


def test_a_run_whose_configuration_was_edited_does_not_go_on(gpt2: Path, tmp_path: Path) -> None:
    """Over norms, which start alike whatever the weights are: their own digest tells nothing."""
    folder = described(gpt2, tmp_path / "gpt")
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(200)[0]), encoding="utf-8")
    arguments = ["run", "--task", "none", "--model", "fresh:gpt", "-S", "prepare.corpus=[corpus.txt]"]
    arguments += ["-S", "prepare.corpus_validation_size=40", "-S", "pretrain.space=norms", "--name", "mine"]
    arguments += ["-S", "pretrain.evaluate_every=8", "-S", "pretrain.forward_passes=4000"]
    kill_within(tmp_path / "runs" / "mine" / "models" / ".pretrained.partial", arguments, tmp_path)
    edit(folder, initializer_range=0.5)
    done = pipeline("run", "--resume", "mine", home=tmp_path)
    assert done.returncode == 2
    assert "config.json was changed since the run began" in done.stderr


def test_an_adapter_of_a_fresh_base_is_refused(tmp_path: Path) -> None:
    said = {"peft_type": "LORA", "base_model_name_or_path": "fresh:./gpt"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="a fresh model is another one in every run"):
        check(str(tmp_path))


@pytest.mark.parametrize("space", ["full", "lora,rank=2"])
def test_pretraining_from_nothing_repeats_and_replays(gpt2: Path, space: str, tmp_path: Path) -> None:
    described(gpt2, tmp_path / "gpt")
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(200)[0]), encoding="utf-8")
    common = ["run", "--task", "none", "--model", "fresh:gpt", "-S", "prepare.corpus=[corpus.txt]"]
    common += ["-S", "prepare.corpus_validation_size=40", "-S", "pretrain.forward_passes=64"]
    common += [
        "-S",
        f"pretrain.space={space}",
        "-S",
        "pretrain.batch_size=16",
        "-S",
        "pretrain.evaluate_every=32",
    ]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        done = pipeline(*common, "--name", name, "--seed", seed, home=tmp_path)
        assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    models = {name: load_file(runs / name / "models" / "pretrained" / "model.safetensors") for name in "abc"}
    assert all(torch.equal(value, models["b"][key]) for key, value in models["a"].items())
    assert not all(torch.equal(value, models["c"][key]) for key, value in models["a"].items())
    assert not (runs / "a" / "models" / "pretrained" / "adapter").exists()
    assert "identical" in pipeline("replay", "a", home=tmp_path).stdout
    assert "pretrain/bits_per_byte" in json.loads((runs / "a" / "metrics.json").read_text(encoding="utf-8"))


def test_a_fresh_model_goes_to_the_task_as_pretraining_would_have_begun(
    bert: Path, table: Path, tmp_path: Path
) -> None:
    described(bert, tmp_path / "bert")
    done = pipeline(
        *("run", "--model", "fresh:bert", "--train", str(table), "--text", "review", "--label", "verdict"),
        *("--forward-passes", "64", "--no-baselines", "--name", "mine", "--seed", "3"),
        *("-S", "pretrain.enabled=false", "-S", "finetune.space=full", "-S", "prepare.test_size=20"),
        *("-S", "prepare.validation_size=20"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "identical" in pipeline("replay", "mine", home=tmp_path).stdout
    saved = load_file(tmp_path / "runs" / "mine" / "models" / "pretrained" / "model.safetensors")
    begun = load_language_model(f"fresh:{bert}", "mlm", derive(3, 6)).state_dict()
    assert all(torch.equal(begun[name], value) for name, value in saved.items())


def test_a_model_in_a_file_of_parameters_is_meant_from_where_it_was_read(gpt2: Path, tmp_path: Path) -> None:
    described(gpt2, tmp_path / "gpt")
    (tmp_path / "mine.yaml").write_text("model: fresh:./gpt\nprepare: {task: none}\n", encoding="utf-8")
    done = pipeline("run", "--config", "mine.yaml", "--dry-run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"model: fresh:{tmp_path / 'gpt'}" in done.stdout


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer*"])
def test_a_tokenizer_that_is_not_there_is_said(gpt2: Path, name: str, tmp_path: Path) -> None:
    folder = described(gpt2, tmp_path / "described")
    for file in folder.glob(name):
        file.unlink()
    said = "has no tokenizer: tokenizer.json is missing" if "*" in name else r"one of:\s+\S+"
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(f"fresh:{folder}")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_spelt_wrong_is_told(gpt2: Path, tmp_path: Path) -> None:
    folder = described(gpt2, tmp_path / "described")
    edit(folder, vocab_size=None, vocab_sz=40)
    with pytest.warns(UserWarning, match="GPT2Config has no key 'vocab_sz'; did you mean 'vocab_size'?"):
        load_as_trained(f"fresh:{folder}", 0)


def test_what_a_library_wrote_is_spelt_right(
    folder_of: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    for folder in folder_of.values():
        load_as_trained(f"fresh:{folder}", 0)
    assert not [each for each in recwarn if "has no key" in str(each.message)]
