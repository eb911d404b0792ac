"""Encoder-decoders: what they write, score and learn against transformers; whole runs of translation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_language_model, load_tokenizer
from pipeline.optimizer import Explicit, LowRank, Move, Seeded
from pipeline.tasks.base import Batch
from pipeline.tasks.seq2seq import Answered, Seq2Seq, start_token
from pipeline.tasks.writing import WritingData
from tests.conftest import WORDS, _tokenizer, sentences
from tests.test_cli import pipeline
from tests.test_engine import reference, searched
from tests.test_generation import Written

KINDS = ("t5", "bart")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random T5 and a random BART."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    parent = tmp_path_factory.mktemp("seq2seq")
    size = _tokenizer(parent, decoder=True)
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "bos_token_id": 0}
    t5 = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        tie_word_embeddings=False,
        **ids,
    )
    bart = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        init_std=0.3,
        **ids,
    )
    made = {"t5": lambda: T5ForConditionalGeneration(t5), "bart": lambda: BartForConditionalGeneration(bart)}
    for name, model in made.items():
        _tokenizer(parent / name, decoder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model().save_pretrained(parent / name)
    return {name: parent / name for name in made}


def translator(folder: Path, temperature: float = 0.0) -> Seq2Seq:
    location = str(folder)
    model = load_language_model(location, "seq2seq", 0)
    return Seq2Seq(model, load_tokenizer(location), 6, temperature).eval()


def test_a_target_is_what_the_decoder_learned_to_write(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))  # as BART's, one that begins and ends a text with tokens of its own
    tokenizer.eos_token = tokenizer.sep_token
    rows = Dataset.from_dict({"text": ["the film"], "target": ["good"]})
    phrasing = Answered(tokenizer.pad_token_id, 7)
    data = WritingData(rows, tokenizer, phrasing, template="{text}", max_length=8, max_new_tokens=8)
    batch = data.batch([0], 0)
    good = tokenizer.convert_tokens_to_ids("good")
    assert batch.targets.tolist() == [tokenizer.cls_token_id, good, tokenizer.sep_token_id]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, tokenizer.cls_token_id, good]]


def batch_for(model: Seq2Seq) -> Batch:
    texts, _ = sentences(6)
    rows = {
        "text": [" ".join(text.split()[: 2 + i]) for i, text in enumerate(texts)],
        "target": ["good film", "a story", "the", "dull plot was it", "it was", "slow"],
    }
    data = WritingData(
        Dataset.from_dict(rows),
        model._tokenizer,
        Answered(0, start_token(model.model)),
        template="{text}",
        max_length=16,
        max_new_tokens=6,
    )
    return data.batch(range(6), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_transformers_generates(kind: str, models: dict[str, Path]) -> None:
    model = translator(models[kind])
    batch = batch_for(model)
    assert batch.asked
    ids = model.model.generate(**batch.asked.inputs, max_new_tokens=6, do_sample=False, num_beams=1)
    theirs = model._tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    theirs = [text.replace("[PAD]", "").strip() for text in theirs]  # what it fills rows with
    assert model.write(batch) == theirs
    assert len(set(theirs)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_targets_is_that_of_transformers(kind: str, models: dict[str, Path]) -> None:
    model = translator(models[kind])
    batch = batch_for(model)
    assert batch.asked
    labels = torch.full_like(batch.inputs["decoder_input_ids"], -100)
    assert batch.positions is not None
    labels.flatten()[batch.positions] = batch.targets
    with torch.inference_mode():
        theirs = model.model(**batch.asked.inputs, labels=labels).loss
        ours = torch.nn.functional.cross_entropy(model(batch), batch.targets)
    torch.testing.assert_close(ours, theirs)
    assert batch.asked.lengths == (3, 3, 2, 5, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["full", "biases", "lora,rank=2", "projection,dimension=30"])
def test_candidates_are_scored_as_moved_weights(kind: str, space: str, models: dict[str, Path]) -> None:
    if (kind, space) == ("t5", "biases"):
        pytest.skip("a T5 has none")
    model = translator(models[kind])
    batch, over = batch_for(model), searched(space, model)
    candidates = [Seeded(1, 0.1), Seeded(2, -0.1), Seeded(3, 0.1)]
    candidates.append(Explicit(0.01 * torch.arange(over.size) / over.size))  # type: ignore[arg-type]
    if not space.startswith("projection"):
        candidates += [Seeded(seed, 0.1, "gaussian", LowRank(1)) for seed in (4, 5, 6)]
    engine = Engine(model, over, 1000, 0)
    losses = engine.losses(batch, candidates)
    losses = engine.losses(batch, candidates)  # the second time lanes could be tried
    engine.close()
    assert engine.found.get("together") is None, "rows of two lengths are not put into lanes"
    for candidate, loss in zip(candidates, losses, strict=True):
        assert loss == pytest.approx(reference(model, over, candidate, batch), rel=1e-4)
    assert len(set(losses)) == len(candidates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("low_rank", [None, LowRank(1)])
def test_texts_written_at_a_candidate_are_those_of_moved_weights(
    kind: str, temperature: float, low_rank: LowRank | None, models: dict[str, Path]
) -> None:
    model, objective = translator(models[kind], temperature), Written()
    batch = batch_for(model)
    engine = Engine(model, searched("full", model), 100, 0, objective)
    candidates = [Seeded(seed, 0.2, "gaussian", low_rank) for seed in (1, 2)]
    engine.losses(batch, candidates)
    engine.close()
    assert objective.seen[0] != objective.seen[1]
    for candidate, texts in zip(candidates, objective.seen, strict=True):
        moved = translator(models[kind], temperature)
        searched("full", moved).move(Move([candidate.seed], [candidate.scale], "gaussian", 0.0, low_rank))
        assert moved.write(batch) == texts


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences, and the same with every word replaced by its neighbour."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    following = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))
    lines = [f"{text}\t{' '.join(following[word] for word in text.split())}" for text in sentences(90)[0]]
    path.write_text("\n".join(["ours\ttheirs", *lines]) + "\n", encoding="utf-8")
    return path


def arguments(model: Path, pairs: Path, task: str = "translation") -> list[str]:
    given = {
        "pretrain.enabled": "false",
        "finetune.max_length": "12",
        "finetune.max_new_tokens": "8",
        "finetune.batch_size": "8",
        "finetune.evaluate_every": "30",
    }
    sets = [part for key, value in given.items() for part in ("-S", f"{key}={value}")]
    return [
        *("run", "--name", "mine", "--task", task, "--model", str(model), "--train", str(pairs)),
        *("--text", "ours", "--label", "theirs", "--forward-passes", "60", *sets),
    ]


# peft asks transformers in a way that the next major release will not know
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "space", "objective"),
    [("t5", "full", "chrf"), ("bart", "lora,rank=2", "cross_entropy")],
)
def test_a_run_of_translation(
    kind: str, space: str, objective: str, models: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    done = pipeline(
        *arguments(models[kind], pairs),
        *("-S", f"finetune.space={space}", "--objective", objective, "-S", "finetune.epsilon=0.01"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    metrics = json.loads((run / "metrics.json").read_text())
    for row in ("zero_shot", "test", "adamw"):
        assert {f"{row}/loss", f"{row}/bleu", f"{row}/chrf"} <= set(metrics)
    assert 50 < metrics["forward_passes"] <= 60
    assert "→" in (run / "data" / "prepared" / "card.md").read_text()
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert "identical" in replayed.stdout, replayed.stderr
    load_language_model(str(run / "models" / "finetuned"), "seq2seq", 0)
    if space.startswith("lora"):
        from peft import PeftModel

        base = load_language_model(str(run / "models" / "pretrained"), "seq2seq", 0)
        tuned = PeftModel.from_pretrained(base, str(run / "models" / "finetuned" / "adapter"))
        merged = load_language_model(str(run / "models" / "finetuned"), "seq2seq", 0)
        ids = torch.tensor([[5, 6, 7]])
        with torch.inference_mode():
            ours = merged(input_ids=ids, decoder_input_ids=ids).logits
            theirs = tuned(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_decoder_translates_too(gpt2: Path, pairs: Path, tmp_path: Path) -> None:
    done = pipeline(
        *arguments(gpt2, pairs, "summarization"),
        *("-S", "finetune.space=biases", "--no-baselines", "-S", "finetune.template='{text} is'"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    assert {"test/loss", "test/rouge_l", "test/chrf"} <= set(metrics)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-S", "finetune.space=prompt"), "a prompt needs a transformer that takes inputs_embeds"),
        (("-S", "pretrain.enabled=true"), "has neither a masked nor a causal language-modelling head"),
    ],
)
def test_what_does_not_fit_is_one_line(
    more: tuple[str, ...], said: str, models: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    done = pipeline(*arguments(models["t5"], pairs), *more, home=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_that_caps_its_logits_is_refused(models: dict[str, Path]) -> None:
    model = load_language_model(str(models["t5"]), "seq2seq", 0)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="T5ForConditionalGeneration caps its logits at 30"):
        Seq2Seq(model, load_tokenizer(str(models["t5"])), 6, 0.0)


def test_an_encoder_is_refused(bert: Path, pairs: Path, tmp_path: Path) -> None:
    done = pipeline(*arguments(bert, pairs), home=tmp_path)
    assert done.returncode == 2
    assert "does not write: translation needs a decoder or an encoder-decoder" in done.stderr
