"""A soft prompt: where it starts, what reads it, what is searched of it, and how it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import space as spaces
from pipeline.config import FinetuneConfig
from pipeline.engine import scorer
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_encoder, load_language_model, load_tokenizer
from pipeline.models.prompt import embedding_scale
from pipeline.optimizer import Candidate, Explicit, LowRank, Seeded
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.classification import TextClassifier
from pipeline.tasks.language_modelling import LanguageModel
from pipeline.tasks.room import check_length
from pipeline.trajectory import Trajectory
from tests.test_cli import pipeline, small
from tests.test_engine import classifier, language_model, searched, translator
from tests.test_training import run

PROMPT = "prompt,tokens=3,dimension=20"
# the head is not searched: it must tell the labels apart from the start
DESCRIBED = "finetune.descriptions={up: a good film, down: a bad film}"
FAMILIES = ["classifier", "bert", "gpt2", "opt", "gemma", "llama"]


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Callable[[str], tuple[TaskModel, Batch]]:
    """A model of a family, and a batch of texts of unequal length.

    Its weights are larger than the fixtures': with those attention is all but even, and no prompt is felt.
    """

    def of(family: str) -> tuple[TaskModel, Batch]:
        if family == "classifier":
            return classifier(request.getfixturevalue("bert"))
        if family in ("bert", "gpt2"):
            return language_model(request.getfixturevalue(family), "mlm" if family == "bert" else "clm")
        return language_model(request.getfixturevalue("decoders")[family], "clm")

    def make(family: str) -> tuple[TaskModel, Batch]:
        model, batch = of(family)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
        return model, batch

    return make


Made = Callable[[str], tuple[TaskModel, Batch]]


def vectors_of(space: spaces.Space) -> Tensor:
    [searched_tensor] = space.tensors
    return searched_tensor.parameter.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_words_that_stand_before_each_text(family: str, made: Made) -> None:
    """The vectors are words' embeddings: the ids of those words before the text give the same states."""
    model, batch = made(family)
    encoder: Any = model.encoder
    table = encoder.get_input_embeddings()(torch.arange(encoder.get_input_embeddings().num_embeddings))
    plain, _ = made(family)
    space = searched(PROMPT, model)
    words = torch.cdist(vectors_of(space), table.detach()).argmin(1)
    torch.testing.assert_close(vectors_of(space), table[words].detach())
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    before = {
        "input_ids": torch.cat((words.expand(len(ids), -1), ids), 1),
        "attention_mask": torch.cat((mask.new_ones(len(ids), 3), mask), 1),
    }
    with torch.inference_mode():
        expected = plain.encoder(**before, output_hidden_states=True)
        got = encoder(**batch.inputs, output_hidden_states=True)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state[:, 3:])
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[:, 3:])


def test_it_is_drawn_by_the_seed(bert: Path) -> None:
    drawn = []
    for seed in (3, 3, 4):
        model, _ = classifier(bert)
        spec = spaces.parse(PROMPT)
        spaces.prepare_model(spec, model, seed)
        drawn.append(vectors_of(spaces.build(spec, model, seed)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_but_the_prompt_is_searched(bert: Path) -> None:
    model, _ = classifier(bert)
    assert [t.name for t in searched("prompt", model).tensors] == ["encoder.soft_prompt.vectors"]
    model, _ = classifier(bert)
    assert searched("prompt,tokens=3,dimension=0", model).size == 3 * 32
    model, _ = classifier(bert)
    assert searched(PROMPT, model).size == 20


@pytest.mark.parametrize("dimension", [0, 20])
def test_a_unit_moves_an_element_by_what_words_differ(dimension: int, bert: Path) -> None:
    model, _ = classifier(bert)
    unit = embedding_scale(model.encoder)
    table: Any = model.encoder.embeddings
    assert unit == pytest.approx(float(table.word_embeddings.weight.detach().std()), rel=0.05)
    space = searched(f"prompt,tokens=3,dimension={dimension},encoder_scale=2", model)
    moved = space.value(space.tensors[0], Explicit(torch.ones(space.size))) - vectors_of(space)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 2 * unit))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [PROMPT, "prompt,tokens=3,dimension=0"])
def test_a_population_shares_a_forward_pass_and_scores_as_written_one_by_one(
    family: str, text: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scorer._TOKENS, "cpu", 2**20)
    model, batch = made(family)
    space = searched(text, model)
    engine = Engine(model, space, 1000, run_seed=0)
    points = 2.0 * torch.randn(6, space.size, generator=torch.Generator().manual_seed(0))
    candidates: list[Candidate] = [Explicit(point) for point in points]
    engine.losses(batch, candidates)
    assert engine.found["together"]
    forwards: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = engine.losses(batch, candidates)
    assert len(forwards) == 1
    handle.remove()
    assert losses == pytest.approx([engine.losses(batch, [each])[0] for each in candidates], rel=2e-5)
    engine.close()
    written = []
    for point in points:
        space.place(point)
        with torch.inference_mode():
            written.append(float(torch.nn.functional.cross_entropy(model(batch), batch.targets)))
    assert losses == pytest.approx(written, rel=2e-5)
    assert len({round(loss, 5) for loss in losses}) == len(losses)


def test_low_rank_directions_need_the_matrix_itself(bert: Path) -> None:
    candidates = [Seeded(seed, 1.0, "gaussian", LowRank(1)) for seed in range(3)]
    model, batch = classifier(bert)
    engine = Engine(model, searched("prompt,tokens=3,dimension=0", model), 1000, run_seed=0)
    together = engine.losses(batch, candidates)
    assert together == pytest.approx([engine.losses(batch, [each])[0] for each in candidates], rel=2e-5)
    model, batch = classifier(bert)
    engine = Engine(model, searched(PROMPT, model), 1000, run_seed=0)
    with pytest.raises(UserError, match="'prompt' has no matrices"):
        engine.losses(batch, candidates)


def test_a_saved_classifier_has_its_prompt(bert: Path, tmp_path: Path) -> None:
    model, batch = classifier(bert)
    with torch.inference_mode():
        before = model(batch)
        searched(PROMPT, model).place(torch.ones(20))
        moved = model(batch)
        assert float((moved - before).abs().max()) > 1e-3
        model.save(tmp_path, load_tokenizer(str(bert)))
        assert torch.equal(TextClassifier.load(tmp_path)(batch), moved)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_saved_language_model_has_its_prompt(family: str, made: Made, tmp_path: Path) -> None:
    model, batch = made(family)
    tokenizer = load_tokenizer(str(model.model.name_or_path))  # type: ignore[union-attr, operator]
    searched(PROMPT, model).place(torch.ones(20))
    model.save(tmp_path, tokenizer)
    loaded = load_language_model(str(tmp_path), "mlm" if family == "bert" else "clm", 0)
    with torch.inference_mode():
        moved = model(batch)
        assert torch.equal(LanguageModel(loaded)(batch), moved)
        whole = loaded(**batch.inputs).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(whole, moved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["spsa,directions=2,distribution=gaussian,weight_decay=0.1", "cmaes"])
def test_a_search_replays_and_resumes_to_the_same_bits(
    spec: str, dtype: str, bert: Path, tmp_path: Path
) -> None:
    path, cut = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    _, after = run(bert, spec, PROMPT, 80, path, dtype=dtype)
    again = searched(PROMPT, classifier(bert, dtype)[0])
    assert again.digest() != after.digest()
    assert Trajectory.read(path).replay(again) == after.digest()
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, resumed = run(bert, spec, PROMPT, 80, cut, resume=True, dtype=dtype)
    assert resumed.digest() == after.digest()


# peft asks transformers in a way that the next major release will not know
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_the_same_prompt(bert: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    model, batch = classifier(bert)
    searched(PROMPT, model).place(torch.ones(20))
    model.save(tmp_path, load_tokenizer(str(bert)))
    base = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "prompt")).eval()
    with torch.inference_mode():
        theirs = adapted(**batch.inputs).last_hidden_state
        ours = model.encoder(**batch.inputs).last_hidden_state
    torch.testing.assert_close(theirs[:, 3:], ours)


def test_a_prompt_from_pretraining_is_searched_on(bert: Path, tmp_path: Path) -> None:
    model, _ = language_model(bert, "mlm")
    space = searched(PROMPT, model)
    space.place(torch.ones(20))
    model.save(tmp_path, load_tokenizer(str(bert)))
    further = TextClassifier(load_encoder(str(tmp_path)), 32, ["down", "up"], pooled_layers=1).eval()
    assert torch.equal(vectors_of(searched(PROMPT, further)), vectors_of(space))
    with pytest.raises(UserError, match="comes with a prompt of 3 tokens, not 5: set tokens=3"):
        searched("prompt,tokens=5", further)


def test_a_model_that_cannot_have_a_prompt_is_refused() -> None:
    model, _ = translator()
    with pytest.raises(UserError, match="inputs_embeds and reads one text, which a T5ForCond"):
        searched(PROMPT, model)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("prompt,dimension=-1", "takes a positive whole number or 0, not '-1'"),
        ("prompt,tokens=0", "takes a positive whole number, not '0'"),
        ("prompt,token=3", "did you mean 'tokens'"),
    ],
)
def test_a_wrong_spec_is_one_line(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        spaces.parse(text)


def test_a_run_leaves_its_prompt_and_replays_it(bert: Path, table: Path, tmp_path: Path) -> None:
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--no-baselines"]
    given += ["-S", "pretrain.max_length=32", "-S", "finetune.max_length=32", "-S", DESCRIBED]
    space = ("-S", "pretrain.enabled=false", "-S", f"finetune.space={PROMPT}", "--optimizer", "cmaes")
    done = pipeline(*given, "--name", "mine", *small(bert), *space, home=tmp_path)
    assert done.returncode == 0, done.stderr
    finetuned = tmp_path / "runs" / "mine" / "models" / "finetuned"
    saved = finetuned / "prompt" / "adapter_model.safetensors"
    assert saved.is_file()
    assert "test/accuracy" in json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    assert pipeline("replay", "mine", home=tmp_path).stdout.count("identical") == 1
    saved.write_bytes(saved.read_bytes()[:-1] + b"\x01")
    assert "was changed after the run" in pipeline("replay", "mine", home=tmp_path).stderr


def test_a_prompt_pretrained_goes_on_into_the_task(gpt2: Path, table: Path, tmp_path: Path) -> None:
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--no-baselines"]
    given += ["-S", "pretrain.max_length=32", "-S", "finetune.max_length=32", "-S", DESCRIBED]
    both = ("-S", f"pretrain.space={PROMPT}", "-S", f"finetune.space={PROMPT}")
    done = pipeline(*given, "--name", "mine", *small(gpt2), *both, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pipeline("replay", "mine", home=tmp_path).stdout.count("identical") == 2
    too_long = pipeline(*given, *small(gpt2), *both, "-S", "pretrain.max_length=62", home=tmp_path)
    assert too_long.returncode == 2
    assert "max_length is 62, after a prompt of 3; the model takes at most 64 tokens" in too_long.stderr


def test_positions_behind_the_paddings_id_are_not_for_texts(bert: Path, tmp_path: Path) -> None:
    """RoBERTa's begin at 2 where the padding is 1: of 64 rows of its table 62 are for tokens."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = load_tokenizer(str(bert))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=1, **sizes)
    model = RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    check_length("finetune", FinetuneConfig(max_length=62), tokenizer, str(tmp_path))
    with pytest.raises(UserError, match="max_length is 63; the model takes at most 62 tokens"):
        check_length("finetune", FinetuneConfig(max_length=63), tokenizer, str(tmp_path))
    with torch.inference_mode():
        model(input_ids=torch.full((1, 62), 5))  # reads no row that is not there
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(input_ids=torch.full((1, 63), 5))
