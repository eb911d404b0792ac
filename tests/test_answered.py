"""A head of its own over a template's answer: it starts as the language model, and moves nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.optimizer import Explicit
from pipeline.space import parse
from pipeline.space.kinds import build
from pipeline.tasks.answered import AnswerClassifier, load, rows_of, start_as_words
from pipeline.tasks.classification import TextClassifier
from tests.test_cli import pipeline, small
from tests.test_prompted import WORDS, completing_model


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_it_starts_as_the_language_model_and_is_kept(
    family: str, folder_of: dict[str, Path], tmp_path: Path
) -> None:
    prompted, batch = completing_model(folder_of[family], WORDS)
    with torch.inference_mode():
        before = prompted(batch)
    with prompted._restored():  # type: ignore[attr-defined]
        words, bias = rows_of(prompted.model, prompted.prompting.tokens)
    model = AnswerClassifier(prompted.encoder, words.shape[1], ["down", "up"]).eval()
    start_as_words(model, words, bias, batch)
    with torch.inference_mode():
        features, logits = model.features(batch), model(batch)
    torch.testing.assert_close(logits, before, rtol=1e-4, atol=1e-4)
    assert features.mean(0).abs().max() < 1e-4
    assert float(features.pow(2).mean()) == pytest.approx(1, rel=1e-4)
    model.save(tmp_path, load_tokenizer(str(folder_of[family])))
    with torch.inference_mode():
        assert torch.equal(load(tmp_path)(batch), logits)
    with pytest.raises(UserError, match="holds a classifier of a template's answer, where one of a text"):
        TextClassifier.load(tmp_path)


def test_states_may_be_narrower_than_the_model_within(folder_of: dict[str, Path], tmp_path: Path) -> None:
    """As OPT-350m's, which are projected on their way out."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig.from_pretrained(folder_of["opt"], word_embed_proj_dim=16)
    narrow = OPTForCausalLM(config)
    model = AnswerClassifier(narrow.base_model, 16, ["down", "up"]).eval()
    _, batch = completing_model(folder_of["opt"], WORDS)
    with torch.inference_mode():
        logits = model(batch)
    model.save(tmp_path, load_tokenizer(str(folder_of["opt"])))
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path)(batch), logits)


def test_a_model_that_scales_its_logits_is_begun_with_and_one_that_caps_them_is_refused(
    folder_of: dict[str, Path],
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    common = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 3}
    scaled = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=4.0)).eval()
    rows, bias = rows_of(scaled, [5, 7])
    ids = torch.tensor([[6, 9, 11]])
    with torch.inference_mode():
        states = scaled.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(states @ rows.T, scaled(input_ids=ids).logits[..., [5, 7]])
    assert bias is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        capped = Gemma2ForCausalLM(Gemma2Config(**common, final_logit_softcapping=3.0)).eval()
    with pytest.raises(UserError, match="gives other logits than its last layer does"):
        rows_of(capped, [5, 7])


def test_a_search_of_the_head_reads_each_text_once(folder_of: dict[str, Path]) -> None:
    prompted, batch = completing_model(folder_of["gpt2"], WORDS)
    model = AnswerClassifier(prompted.encoder, 32, ["down", "up"]).eval()
    space = build(parse("head"), model, 0)
    assert space.size == 2 * 32 + 2
    engine = Engine(model, space, 10, 0)
    read = []
    model.encoder.register_forward_hook(lambda *_: read.append(1))
    inputs = {name: tensor.clone() for name, tensor in batch.inputs.items()}
    again = type(batch)(inputs, batch.targets, examples=tuple(range(8)))
    for step in range(3):
        engine.bind(again, step).losses([Explicit(torch.zeros(space.size))])
    assert len(read) == 1


def test_a_run_moves_the_head_alone_and_is_replayed(
    folder_of: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--name", "mine"]
    given += [*small(folder_of["gpt2"]), "-S", "pretrain.enabled=false", "-S", "finetune.space=head"]
    given += ["-S", "finetune.template='{text} it was'", "-S", "evaluate.adamw=false"]
    given += ["-S", "finetune.verbalizers={down: ' bad', up: ' good'}", "-S", "finetune.learning_rate=0.05"]
    done = pipeline(*given, home=tmp_path)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "runs" / "mine"
    metrics = json.loads((root / "metrics.json").read_text("utf-8"))
    assert metrics["coordinates"] == 66
    assert metrics["test/loss"] != metrics["zero_shot/loss"]
    assert "linear_probe/accuracy" in metrics
    kept = AutoModel.from_pretrained(root / "models" / "finetuned").state_dict()
    given_weights = AutoModel.from_pretrained(folder_of["gpt2"]).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in given_weights.items())
    assert "identical" in pipeline("replay", "mine", home=tmp_path).stdout
