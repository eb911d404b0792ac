"""Words of several tokens, held against the plain language model that reads each word after each text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.engine import scorer
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.optimizer import Candidate, Explicit, LowRank, Seeded
from pipeline.tasks import in_context as in_context_module
from pipeline.tasks.base import Batch, Start
from pipeline.tasks.in_context import in_context
from pipeline.tasks.phrased import PhrasedClassifier, load
from pipeline.tasks.prompted import CompletingClassifier, PromptedClassifier
from tests.test_cli import pipeline, small
from tests.test_engine import searched
from tests.test_prompted import completing_model

FAMILIES = ["bert", "gpt2", "opt", "llama"]
PHRASES = [" bad", " not bad", " not slow plot"]  # the last two begin alike


def phrased(folder: Path, words: list[str] | None = None) -> tuple[PhrasedClassifier, Batch]:
    model, batch = completing_model(folder, words or PHRASES)
    assert isinstance(model, PhrasedClassifier)
    return model, batch


def plainly(folder: Path, batch: Batch, model: CompletingClassifier) -> Tensor:
    """Each label's mean log-probability by the saved model, one text and one word at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    masked = model.prompting.kind == "mlm"
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    plain, mask_token = auto.from_pretrained(folder).eval(), load_tokenizer(str(folder)).mask_token_id
    words = [model.prompting.spelled(label) for label in range(len(model.prompting.labels))]
    rows = []
    for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        alone = ids[mask.bool()].tolist()
        place = alone.index(mask_token) if masked else len(alone)
        scores = []
        for word in words:
            written = [mask_token] * len(word) if masked else word
            read = torch.tensor([[*alone[:place], *written, *alone[place + 1 :]]])
            with torch.inference_mode():
                said = plain(input_ids=read).logits[0].log_softmax(-1)
            first = place if masked else place - 1
            scores.append(torch.stack([said[first + i, token] for i, token in enumerate(word)]).mean())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_label_scores_as_the_language_model_reads_its_word(
    family: str, folder_of: dict[str, Path], tmp_path: Path
) -> None:
    model, batch = phrased(folder_of[family])
    model.save(tmp_path, load_tokenizer(str(folder_of[family])))
    with torch.inference_mode():
        logits = model(batch)
    assert logits.shape == (8, 3)
    torch.testing.assert_close(logits, plainly(tmp_path, batch, model), rtol=1e-4, atol=1e-4)
    assert float(logits.std(0).min()) > 1e-3
    loaded = load(tmp_path)
    assert loaded.prompting == model.prompting
    with torch.inference_mode():
        assert torch.equal(loaded(batch), logits)


@pytest.mark.parametrize(("family", "copies"), [("gpt2", 1), ("bert", 3)])
def test_a_text_is_read_as_often_as_it_must_be(family: str, copies: int, folder_of: dict[str, Path]) -> None:
    """A causal model's words share their beginnings, a masked one's their lengths."""
    model, batch = phrased(folder_of[family])
    assert model.copies == copies
    shapes = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    features = model.features(batch)
    assert shapes == [model.read_shape(batch)]
    # after the template, after "not", after "not slow"; a place for each mask
    assert features.shape == (8, 3 if family == "gpt2" else 6, 32)
    assert phrased(folder_of[family], [" not bad", " a film"])[0].copies == (2 if family == "gpt2" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_one_token_stand_to_each_other_as_without_longer_ones(
    family: str, folder_of: dict[str, Path]
) -> None:
    several, batch = phrased(folder_of[family], [" bad", " good", " not bad"])
    single, _ = completing_model(folder_of[family], [" bad", " good"])
    assert isinstance(single, PromptedClassifier)
    with torch.inference_mode():
        ours = several(batch)[:, :2].softmax(-1)
        torch.testing.assert_close(ours, single(batch).softmax(-1), rtol=1e-4, atol=1e-5)


CASES = [
    (f, s) for f in ("bert", "gpt2", "llama") for s in ("full", "lora,rank=2", "projection,dimension=50")
]


@pytest.mark.parametrize(("family", "text"), [*CASES, ("bert", "biases"), ("gpt2", "biases")])
def test_a_candidate_scores_as_the_language_model_it_is(
    family: str, text: str, folder_of: dict[str, Path], tmp_path: Path
) -> None:
    model, batch = phrased(folder_of[family])
    space = searched(text, model)
    generator = torch.Generator().manual_seed(0)
    candidates: list[Candidate] = [
        Seeded(4, 0.05, "gaussian"),
        Explicit(0.05 * torch.randn(space.size, generator=generator)),
    ]
    engine = Engine(model, space, 100, run_seed=0)
    losses = engine.losses(batch, candidates)
    engine.close()
    for number, (candidate, loss) in enumerate(zip(candidates, losses, strict=True)):
        written, folder = copy.deepcopy(model), tmp_path / str(number)
        parameters = dict(written.named_parameters())
        with torch.no_grad():
            for tensor in space.tensors:
                parameters[tensor.name].copy_(space.value(tensor, candidate))
        if space.kind == "lora":
            from pipeline.models.loading import make_plain

            make_plain(written.encoder)
        written.save(folder, load_tokenizer(str(folder_of[family])))
        scores = plainly(folder, batch, model)
        assert loss == pytest.approx(float(cross_entropy(scores, batch.targets)), rel=5e-5)


@pytest.mark.parametrize("text", ["full", "projection,dimension=50", "prompt,tokens=3,dimension=20"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_candidates_share_a_forward_pass(
    family: str, text: str, folder_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scorer._TOKENS, "cpu", 2**20)
    model, batch = phrased(folder_of[family])
    space = searched(text, model)
    low_rank = LowRank(1) if text == "full" else None
    candidates = [Seeded(seed, 0.1 if low_rank else 2.0, "gaussian", low_rank) for seed in range(4)]
    engine = Engine(model, space, 1000, run_seed=0)
    engine.losses(batch, candidates)
    assert engine.found["together"]
    forwards: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = engine.losses(batch, candidates)
    handle.remove()
    assert len(forwards) == 1
    assert losses == pytest.approx([engine.losses(batch, [each])[0] for each in candidates], rel=5e-5)


def test_a_search_of_the_head_alone_encodes_a_text_once(folder_of: dict[str, Path]) -> None:
    model, batch = phrased(folder_of["llama"])
    engine = Engine(model, searched("head", model), 1000, run_seed=0)
    expected = engine.losses(batch, [Seeded(1, 0.1)])
    forwards: list[int] = []
    model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert engine.losses(batch, [Seeded(1, 0.1)]) == expected
    assert not forwards


def test_the_logits_of_a_pass_are_bounded_by_what_is_computed(
    folder_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots over the vocabulary, not three labels."""
    model, batch = phrased(folder_of["gpt2"])
    engine = Engine(model, searched("projection,dimension=20", model), 1000, run_seed=0)
    candidates = [Seeded(seed, 2.0, "gaussian") for seed in range(4)]
    engine.losses(batch, candidates)
    assert model.computed == 3 * 24
    monkeypatch.setattr(scorer, "_LOGITS", 8 * model.computed * 3)  # of eight texts in three lanes
    forwards: list[int] = []
    model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    engine.losses(batch, candidates)
    assert len(forwards) == 2


def test_in_context_is_the_plain_model_after_solved_texts(
    folder_of: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = phrased(folder_of["gpt2"], [" not bad", " a good film"])
    tokenizer = load_tokenizer(str(folder_of["gpt2"]))
    model.save(tmp_path, tokenizer)
    inputs = {name: tensor[[2, 5]] for name, tensor in batch.inputs.items()}
    solved = Batch(inputs, batch.targets[[2, 5]], examples=(2, 5))
    monkeypatch.setattr(in_context_module, "DEMONSTRATIONS", 2)
    monkeypatch.setattr(in_context_module, "_TOKENS", 128)  # several pieces
    figures = in_context(Start(model, tokenizer, lambda step: solved, [batch], [batch], [batch]))
    assert figures is not None
    shown: list[int] = []
    for row in (2, 5):
        mask = batch.inputs["attention_mask"][row].bool()
        shown += batch.inputs["input_ids"][row][mask].tolist()
        shown += model.prompting.spelled(int(batch.targets[row]))
    before = torch.tensor(shown).expand(8, -1)
    whole = {
        "input_ids": torch.cat((before, batch.inputs["input_ids"]), 1),
        "attention_mask": torch.cat((torch.ones_like(before), batch.inputs["attention_mask"]), 1),
    }
    scores = plainly(tmp_path, Batch(whole, batch.targets), model)
    assert figures["demonstrations"] == 2
    assert figures["loss"] == pytest.approx(float(cross_entropy(scores, batch.targets)), rel=1e-4)


GIVEN = ["-S", "finetune.verbalizers={up: ' good', down: ' not a good film'}", "-S", "finetune.max_length=32"]


@pytest.mark.parametrize(("family", "space"), [("bert", "lora,rank=2"), ("gpt2", "full"), ("llama", "head")])
def test_a_whole_run_and_its_replay(
    family: str, space: str, folder_of: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    template = "{text} it was" + (" {mask}" if family == "bert" else "")
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--name", "mine"]
    given += [*small(folder_of[family]), "-S", "pretrain.enabled=false", "-S", f"finetune.space={space}"]
    done = pipeline(*given, *GIVEN, "-S", f"finetune.template='{template}'", home=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "mine"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test/accuracy", "zero_shot/accuracy", "linear_probe/accuracy", "adamw/accuracy"} <= set(metrics)
    assert ("in_context/accuracy" in metrics) == (family != "bert")
    said = json.loads((folder / "models" / "finetuned" / "prompted.json").read_text())
    assert [len(rest) for rest in said["rest"]] == [3, 0]
    assert "identical" in pipeline("replay", "mine", home=tmp_path).stdout


def test_a_template_and_its_words_leave_room_for_a_text(
    folder_of: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", *GIVEN]
    given += [*small(folder_of["gpt2"]), "-S", "pretrain.enabled=false", "-S", "finetune.space=full"]
    given += ["-S", "finetune.template='{text} it was'"]
    done = pipeline(*given, "-S", "finetune.max_length=5", home=tmp_path)
    assert done.returncode == 2
    assert "finetune.template and its words take 5 tokens, which leaves no room for a text" in done.stderr


def test_a_folder_without_a_classifier_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompted classifier; run the finetune stage first"):
        load(tmp_path)
