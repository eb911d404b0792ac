"""On-the-fly scoring against the plain transformers model with perturbed weights written into a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from pipeline import space as spaces
from pipeline.engine import scorer
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_encoder, load_language_model, load_tokenizer
from pipeline.noise import direction
from pipeline.objective import cross_entropy
from pipeline.optimizer import BudgetSpent, Candidate, Explicit, LowRank, Seeded
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import pad, shuffled
from pipeline.tasks.classification import TextClassifier
from pipeline.tasks.language_modelling import CorpusData, LanguageModel
from tests.conftest import sentences

SPACES = [
    "full",
    "biases",
    "norms",
    "head",
    "lora,rank=2",
    "projection,dimension=50",
    "full,encoder_scale=0.1",
]


def language_model(folder: Path, task: str, dtype: str = "float32") -> tuple[LanguageModel, Batch]:
    tokenizer = load_tokenizer(str(folder))
    data = CorpusData(sentences(20)[0], tokenizer, max_length=16, task=task, mask_probability=0.3)
    return LanguageModel(load_language_model(str(folder), task, 0, dtype)), data.batch(range(8), seed=1)


def classifier(folder: Path, dtype: str = "float32") -> tuple[TextClassifier, Batch]:
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer(sentences(8)[0])["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = load_encoder(str(folder), dtype)
        model = TextClassifier(encoder, 32, ["down", "up"], pooled_layers=2).eval()
    batch = Batch(pad(tokens, tokenizer.pad_token_id), torch.arange(8) % 2, examples=tuple(range(8)))
    return model, batch


class Translator(TaskModel):
    """A T5 whose decoder is read at every position."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.encoder = model

    def features(self, batch: Batch) -> torch.Tensor:
        states: torch.Tensor = self.model(**batch.inputs, output_hidden_states=True).decoder_hidden_states[-1]
        return states.flatten(0, 1)

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(features)
        return logits


def translator() -> tuple[Translator, Batch]:
    config = T5Config(
        vocab_size=30, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Translator(T5ForConditionalGeneration(config))
        ids, answer = torch.randint(1, 30, (4, 6)), torch.randint(1, 30, (4, 5))
    return model.eval(), Batch({"input_ids": ids, "decoder_input_ids": answer}, answer.flatten())


def searched(text: str, model: TaskModel) -> spaces.Space:
    spec = spaces.parse(text)
    spaces.prepare_model(spec, model, seed=3)
    return spaces.build(spec, model, seed=3)


def reference(model: TaskModel, space: spaces.Space, candidate: Candidate, batch: Batch) -> float:
    """The loss of a copy of the model into which the candidate's weights were written."""
    written = copy.deepcopy(model)
    parameters = dict(written.named_parameters())
    with torch.no_grad():
        for tensor in space.tensors:
            parameters[tensor.name].copy_(space.value(tensor, candidate))
        if isinstance(written, LanguageModel):
            logits = written.model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
        else:
            logits = written(batch)
    return float(cross_entropy(logits, batch.targets))


# GPT-2's head is its embedding: it has no parameters of its own to search
CASES = [(f, s) for f in ("bert", "gpt2", "classifier") for s in SPACES if (f, s) != ("gpt2", "head")]
CASES += [(f, s) for f in ("llama", "nemotron", "t5") for s in ("full", "projection,dimension=50")]


@pytest.fixture
def task_model(request: pytest.FixtureRequest) -> Callable[[str], tuple[TaskModel, Batch]]:
    """A model of a family, and a batch for it."""

    def make(family: str) -> tuple[TaskModel, Batch]:
        if family == "classifier":
            return classifier(request.getfixturevalue("bert"))
        if family == "t5":
            return translator()
        if family in ("bert", "gpt2"):
            return language_model(request.getfixturevalue(family), "mlm" if family == "bert" else "clm")
        return language_model(request.getfixturevalue("decoders")[family], "clm")

    return make


TaskModelOf = Callable[[str], tuple[TaskModel, Batch]]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_every_candidate_scores_as_its_weights_do_when_written(
    family: str, text: str, task_model: TaskModelOf
) -> None:
    model, batch = task_model(family)
    space = searched(text, model)
    engine = Engine(model.eval(), space, 100, run_seed=0)
    generator = torch.Generator().manual_seed(0)
    candidates: list[Candidate] = [
        Seeded(4, 0.05),
        Seeded(4, -0.05),
        Seeded(4, -0.05, "gaussian"),
        Explicit(0.05 * torch.randn(space.size, generator=generator)),
    ]
    if not text.startswith("projection"):
        candidates += [Seeded(s, 0.05, "gaussian", LowRank(2)) for s in (4, 5, 6)]
        candidates += [Seeded(s, 0.05, "rademacher", LowRank(3, right_seed=1)) for s in (4, 5)]
    before = space.digest()
    losses = engine.losses(batch, candidates)
    assert space.digest() == before
    engine.close()
    expected = [reference(model, space, candidate, batch) for candidate in candidates]
    assert losses == pytest.approx(expected, rel=2e-5)
    # where there are no matrices, a low-rank direction is a direction like others
    assert len({round(loss, 6) for loss in losses}) >= len(candidates) - (text in ("biases", "norms"))


# Llama has no biases
SHARING = [(f, s) for f in ("bert", "gpt2", "classifier") for s in ("full", "lora,rank=2", "biases", "norms")]
SHARING += [("llama", "full"), ("llama", "lora,rank=2"), ("llama", "norms")]


@pytest.mark.parametrize(("family", "text"), SHARING)
def test_candidates_share_forward_passes_where_they_can(
    family: str, text: str, task_model: TaskModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scorer._TOKENS, "cpu", 2**20)
    model, batch = task_model(family)
    space = searched(text, model)
    engine = Engine(model, space, 1000, run_seed=0)
    candidates = [Seeded(s, 0.05, "gaussian", LowRank(1)) for s in range(7)]
    expected = [engine.losses(batch, [candidate])[0] for candidate in candidates]
    engine.losses(batch, candidates)
    assert engine.found["together"]
    forwards: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert engine.losses(batch, candidates) == pytest.approx(expected, rel=2e-5)
    handle.remove()
    assert len(forwards) == 1


def test_candidates_of_a_small_projection_share_forward_passes(bert: Path) -> None:
    model, batch = classifier(bert)
    engine = Engine(model, searched("projection,dimension=50", model), 1000, run_seed=0)
    candidates = [Seeded(seed, 0.5, law) for law in ("gaussian", "rademacher") for seed in range(3)]
    engine.losses(batch, candidates)
    assert engine.found["together"]
    expected = [engine.losses(batch, [candidate])[0] for candidate in candidates]
    assert engine.losses(batch, candidates) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "classifier"])
@pytest.mark.parametrize("text", ["full", "lora,rank=2", "biases", "projection,dimension=50"])
def test_half_precision_is_scored_as_its_weights_are_when_written(
    family: str, text: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("bert" if family == "classifier" else family)
    if family == "classifier":
        model, batch = classifier(folder, dtype)
    else:
        model, batch = language_model(folder, "mlm" if family == "bert" else "clm", dtype)
    space = searched(text, model)
    engine = Engine(model, space, 100, run_seed=0)
    candidates: list[Candidate] = [Seeded(4, 0.05), Seeded(4, -0.05), Seeded(5, 0.05, "gaussian")]
    if not text.startswith("projection"):
        candidates += [Seeded(s, 0.05, "gaussian", LowRank(2)) for s in (4, 5, 6)]
    before = space.digest()
    losses = engine.losses(batch, candidates)
    assert space.digest() == before
    engine.close()
    expected = [reference(model, space, candidate, batch) for candidate in candidates]
    assert losses == pytest.approx(expected, rel=5e-3)
    assert len(set(losses)) == len(candidates)


def test_lanes_are_compared_by_a_loss_that_tells_them_apart(bert: Path) -> None:
    """An objective of few values is alike by chance; here it always is."""

    def constant(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.new_zeros(logits.shape[:-2])

    model, batch = classifier(bert)
    engine = Engine(model, searched("lora,rank=2", model), 1000, 0, constant)
    engine.losses(batch, [Seeded(s, 0.5) for s in range(4)])
    assert engine.found["together"]


def test_a_model_that_mixes_lanes_is_scored_one_by_one(bert: Path) -> None:
    class Mixing(TextClassifier):
        def features(self, batch: Batch) -> torch.Tensor:
            return super().features(batch).flip(0)

    plain, batch = classifier(bert)
    model = Mixing(plain.encoder, 32, ["down", "up"], pooled_layers=2).eval()
    space = searched("lora,rank=2", model)
    engine = Engine(model, space, 1000, run_seed=0)
    candidates = [Seeded(s, 0.5) for s in range(4)]
    together = engine.losses(batch, candidates)
    assert engine.found["together"] is False
    assert together == [engine.losses(batch, [candidate])[0] for candidate in candidates]


@pytest.mark.parametrize("group", [0, 2**12, 2**21])
@pytest.mark.parametrize("fused", [False, True])
def test_every_way_to_perturb_gives_the_same_losses(
    group: int, fused: bool, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.space.searched._GROUP", group)
    model, batch = language_model(bert, "mlm")
    space = searched("full,encoder_scale=0.5", model)
    engine = Engine(model, space, 100, run_seed=0)
    space.fused = fused
    candidate = Seeded(4, 0.05)
    losses = engine.losses(batch, [candidate])
    engine.close()
    plain = searched("full,encoder_scale=0.5", model)
    with torch.no_grad():
        for tensor in plain.tensors:
            weight = tensor.parameter
            z = direction(4, tensor.offset, weight.numel(), "rademacher", weight.device)
            weight.add_(z.view(weight.shape), alpha=0.05 * tensor.scale)
        expected = float(cross_entropy(model(batch), batch.targets))
    assert losses == pytest.approx([expected], rel=2e-6)


@pytest.mark.parametrize("family", ["opt", "gemma", "llama", "nemotron"])
@pytest.mark.parametrize("text", ["full", "projection,dimension=50"])
def test_embeddings_that_scale_or_shift_are_scored_as_they_are(
    family: str, text: str, decoders: dict[str, Path]
) -> None:
    model, batch = language_model(decoders[family], "clm")
    space = searched(text, model)
    engine = Engine(model.eval(), space, 100, run_seed=0)
    coordinates = 0.05 * torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    for candidate in (Seeded(4, 0.05), Seeded(4, -0.05, "sphere"), Explicit(coordinates)):
        losses = engine.losses(batch, [candidate])
        assert losses == pytest.approx([reference(model, space, candidate, batch)], rel=2e-5)


def test_an_encoder_is_not_taught_to_look_at_its_target(bert: Path) -> None:
    with pytest.raises(UserError, match="both directions"):
        load_language_model(str(bert), "clm", 0)


def test_gradients_of_tensors_that_nothing_reads_are_zero(bert: Path) -> None:
    model, batch = classifier(bert)
    model.encoder.register_module("unread", torch.nn.Linear(3, 3))
    engine = Engine(model, searched("full", model), 3, run_seed=0)
    _, gradients = engine.bind(batch, 0).gradient()
    assert [float(g.abs().sum()) for g in gradients].count(0.0) == 2


def test_a_method_that_writes_elements_is_refused_other_coordinates(bert: Path) -> None:
    for text in ("projection,dimension=50", "full,encoder_scale=0.1"):
        model, batch = classifier(bert)
        engine = Engine(model, searched(text, model), 3, run_seed=0)
        with pytest.raises(UserError, match="coordinates other than"):
            engine.bind(batch, 0).tensors()


def test_a_method_that_writes_elements_is_refused_half_precision(bert: Path) -> None:
    model, batch = classifier(bert, "bfloat16")
    engine = Engine(model, searched("full", model), 3, run_seed=0)
    with pytest.raises(UserError, match="bfloat16 would lose them: set dtype=float32"):
        engine.bind(batch, 0).tensors()


def test_the_head_of_gpt2_is_refused_in_one_line(gpt2: Path) -> None:
    model, _ = language_model(gpt2, "clm")
    with pytest.raises(UserError, match="no parameters in this model"):
        searched("head", model)


def test_logits_are_those_of_the_plain_model_at_the_targets(bert: Path) -> None:
    model, batch = language_model(bert, "mlm")
    with torch.inference_mode():
        plain = model.model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
        torch.testing.assert_close(model(batch), plain)


def test_weights_are_untouched_when_a_forward_fails(bert: Path) -> None:
    model, batch = classifier(bert)
    space = searched("full", model)
    engine = Engine(model, space, 10, run_seed=0)
    before = space.digest()
    broken = Batch({**batch.inputs, "input_ids": batch.inputs["input_ids"] + 10_000}, batch.targets)
    with pytest.raises(IndexError):
        engine.losses(broken, [Seeded(1, 0.1)])
    assert space.digest() == before
    assert engine.losses(batch, [Seeded(1, 0.1)]) == pytest.approx(
        [reference(model, space, Seeded(1, 0.1), batch)], rel=2e-5
    )


def test_the_budget_is_exact_and_never_passed(bert: Path) -> None:
    model, batch = classifier(bert)
    engine = Engine(model, searched("biases", model), 5, run_seed=0)
    engine.losses(batch, [Seeded(i, 0.1) for i in range(4)])
    with pytest.raises(BudgetSpent):
        engine.losses(batch, [Seeded(i, 0.1) for i in range(2)])
    assert engine.forward_passes == 4
    engine.losses(batch, [Seeded(1, 0.1)])
    assert engine.forward_passes == 5


def test_candidates_of_the_head_are_scored_in_one_forward_as_one_by_one(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = classifier(bert)
    space = searched("head", model)
    engine = Engine(model, space, 1000, run_seed=0)
    coordinates = 0.05 * torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    pairs = [Seeded(seed, scale) for seed in (4, 5) for scale in (0.1, -0.1)]
    for candidates in (
        pairs,
        [Seeded(seed, 0.1, "sphere") for seed in range(3)],
        [Seeded(4, 0.1), Seeded(4, 0.1, "gaussian"), Explicit(coordinates)],
    ):
        expected = [reference(model, space, candidate, batch) for candidate in candidates]
        assert engine.losses(batch, candidates) == pytest.approx(expected, rel=2e-5)
    whole = engine.losses(batch, pairs)
    monkeypatch.setattr(scorer, "_STACKED", 1)
    assert engine.losses(batch, pairs) == pytest.approx(whole, rel=1e-6)


def test_a_search_of_the_head_encodes_each_row_once(bert: Path) -> None:
    model, batch = classifier(bert)
    engine = Engine(model, searched("head", model), 1000, run_seed=0)
    encoded: list[int] = []
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = engine.losses(batch, [Seeded(i, 0.1) for i in range(6)])
    assert first == engine.losses(batch, [Seeded(i, 0.1) for i in range(6)])
    assert encoded == [8]


def test_masks_follow_80_10_10_and_spare_special_tokens(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    texts = sentences(400)[0]
    data = CorpusData(texts, tokenizer, max_length=16, task="mlm", mask_probability=0.15)
    kept = masked = total = eligible = 0
    for step in range(10):
        batch = data.batch(range(len(data)), seed=step)
        shown = batch.inputs["input_ids"].flatten()[batch.positions]
        assert not set(batch.targets.tolist()) & set(tokenizer.all_special_ids)
        masked += int((shown == tokenizer.mask_token_id).sum())
        kept += int((shown == batch.targets).sum())
        total += len(shown)
        eligible += int(batch.inputs["attention_mask"].sum()) - 2 * len(data)
    assert masked / total == pytest.approx(0.8, abs=0.02)
    assert kept / total == pytest.approx(0.1, abs=0.02)
    assert total / eligible == pytest.approx(0.15, abs=0.01)
    again = data.batch(range(5), seed=3)
    assert torch.equal(again.inputs["input_ids"], data.batch(range(5), seed=3).inputs["input_ids"])
    assert not torch.equal(again.inputs["input_ids"], data.batch(range(5), seed=4).inputs["input_ids"])


def test_causal_targets_are_the_next_tokens(gpt2: Path) -> None:
    _, batch = language_model(gpt2, "clm")
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    expected = [
        int(ids[row, column + 1])
        for row in range(len(ids))
        for column in range(ids.shape[1] - 1)
        if mask[row, column + 1]
    ]
    assert batch.targets.tolist() == expected


def test_epochs_are_permutations_and_depend_on_numbers_only() -> None:
    drawn = [row for step in range(10) for row in shuffled(25, 5, 7, step)]
    assert sorted(drawn[:25]) == sorted(drawn[25:]) == list(range(25))
    assert drawn[:25] != drawn[25:]
    assert shuffled(25, 5, 7, 8) == drawn[40:45]
    assert shuffled(25, 5, 8, 8) != drawn[40:45]
    assert sorted(shuffled(3, 64, 0, 1)) == [0, 1, 2]
