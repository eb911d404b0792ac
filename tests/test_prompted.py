"""Classification by a template's words, held against the plain language model that completes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.engine import scorer
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import (
    has_language_head,
    load_encoder,
    load_language_model,
    load_tokenizer,
    pass_through,
)
from pipeline.optimizer import Candidate, Explicit, LowRank, Seeded
from pipeline.registry import Spec
from pipeline.space import Space, parse
from pipeline.tasks import in_context as in_context_module
from pipeline.tasks.base import Batch, Start
from pipeline.tasks.classification import ClassificationData
from pipeline.tasks.in_context import in_context
from pipeline.tasks.phrased import completing, load
from pipeline.tasks.prompted import CompletingClassifier, PromptedClassifier, Prompting
from pipeline.tasks.template import Template
from pipeline.trainer import Training, train
from pipeline.trajectory import Trajectory
from tests.conftest import sentences
from tests.test_cli import pipeline, small
from tests.test_engine import searched

TIED = ["bert", "gpt2", "opt", "gemma"]
FAMILIES = [*TIED, "llama", "nemotron"]
LABELS, WORDS = ["down", "up"], [" bad", " good"]


def completing_model(
    folder: Path, words: Sequence[str], dtype: str = "float32"
) -> tuple[CompletingClassifier, Batch]:
    """A model that completes a template, and a batch of texts of unequal length.

    Its weights are larger than the fixtures', so that what a text says is felt at the answer.
    """
    tokenizer = load_tokenizer(str(folder))
    kind = "mlm" if tokenizer.mask_token else "clm"
    text = "the film : {text} it was" + (" {mask} ." if kind == "mlm" else "")
    template = Template(text, tokenizer, masked=kind == "mlm")
    labels = [*LABELS, "other"][: len(words)]
    loaded = load_language_model(str(folder), kind, 0, dtype)
    with torch.no_grad():
        for parameter in loaded.base_model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
        for name, parameter in loaded.named_parameters():
            if name.endswith("bias"):  # zero in a fresh model: it would not show whether it is read
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    prompting = Prompting.spelling(kind, template, labels, words)
    model = completing(loaded, prompting, tokenizer.mask_token_id).eval()
    texts, said = sentences(8)
    data = ClassificationData(
        template.tokens(texts, 32, model.spare), [LABELS.index(each) for each in said], tokenizer.pad_token_id
    )
    return model, data.batch(range(8))


@pytest.fixture
def made(folder_of: dict[str, Path]) -> Callable[..., tuple[PromptedClassifier, Batch]]:
    """`completing_model` of a family, by words of one token."""

    def make(family: str, dtype: str = "float32") -> tuple[PromptedClassifier, Batch]:
        model, batch = completing_model(folder_of[family], WORDS, dtype)
        assert isinstance(model, PromptedClassifier)
        return model, batch

    return make


Made = Callable[..., tuple[PromptedClassifier, Batch]]


def plainly(folder: Path, batch: Batch, prompting: Prompting) -> Tensor:
    """The words' logits of the saved language model, as transformers loads and runs it, text by text."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM if prompting.kind == "mlm" else AutoModelForCausalLM
    model, rows = auto.from_pretrained(folder).eval(), []
    tokenizer = load_tokenizer(str(folder))
    for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        alone = ids[mask.bool()]
        place = -1
        if prompting.kind == "mlm":
            place = alone.tolist().index(tokenizer.mask_token_id)
        with torch.inference_mode():
            rows.append(model(input_ids=alone[None]).logits[0, place, prompting.tokens])
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_language_model_does(
    family: str, made: Made, folder_of: dict[str, Path], tmp_path: Path
) -> None:
    model, batch = made(family)
    model.save(tmp_path, load_tokenizer(str(folder_of[family])))
    with torch.inference_mode():
        features, logits = model.features(batch), model(batch)
    assert features.shape == (8, 32)
    assert logits.shape == (8, 2)
    torch.testing.assert_close(logits, plainly(tmp_path, batch, model.prompting), rtol=1e-4, atol=1e-4)
    assert float(logits.std(0).min()) > 1e-3
    loaded = load(tmp_path)
    assert loaded.prompting == model.prompting
    with torch.inference_mode():
        assert torch.equal(loaded(batch), logits)


SPACES = ["full", "lora,rank=2", "projection,dimension=50", "prompt,tokens=3,dimension=20"]
CASES = [(f, s) for f in FAMILIES for s in SPACES if (f, s) not in [("nemotron", "lora,rank=2")]]
CASES += [(f, s) for f in ("bert", "gpt2") for s in ("biases", "full,encoder_scale=0.1")]
CASES += [("bert", "head"), ("llama", "head"), ("nemotron", "head")]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_a_candidate_scores_as_the_language_model_it_is(
    family: str, text: str, made: Made, folder_of: dict[str, Path], tmp_path: Path
) -> None:
    """Its weights are written, saved and read by transformers: ties hold there, words' rows are in place."""
    model, batch = made(family)
    space = searched(text, model)
    candidates: list[Candidate] = [Seeded(4, 0.05), Seeded(4, -0.05, "gaussian")]
    candidates.append(Explicit(0.05 * torch.randn(space.size, generator=torch.Generator().manual_seed(0))))
    engine = Engine(model, space, 100, run_seed=0)
    losses = engine.losses(batch, candidates)
    engine.close()
    for number, (candidate, loss) in enumerate(zip(candidates, losses, strict=True)):
        written = _written(model, space, candidate)
        folder = tmp_path / str(number)
        if text.startswith("prompt"):  # transformers does not know of it
            with torch.inference_mode():
                logits = written(batch)
        else:
            written.save(folder, load_tokenizer(str(folder_of[family])))
            logits = plainly(folder, batch, model.prompting)
        assert loss == pytest.approx(float(cross_entropy(logits, batch.targets)), rel=5e-5)
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def _written(model: PromptedClassifier, space: Space, candidate: Candidate) -> PromptedClassifier:
    from pipeline.models.loading import make_plain

    written = copy.deepcopy(model)
    parameters = dict(written.named_parameters())
    with torch.no_grad():
        for tensor in space.tensors:
            parameters[tensor.name].copy_(space.value(tensor, candidate))
    if space.kind == "lora":
        make_plain(written.encoder)
    return written


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_searched_once_and_of_the_vocabulary_what_is_read(
    family: str, made: Made, folder_of: dict[str, Path]
) -> None:
    model, _ = made(family)
    space = searched("full", model)
    whole = load_language_model(str(folder_of[family]), model.prompting.kind, 0)
    size, output = sum(each.numel() for each in whole.parameters()), whole.get_output_embeddings()
    words, hidden = output.weight.shape
    unread = (words - 2) * (hidden * (family not in TIED) + (output.bias is not None))
    assert space.size == size - unread
    head = [parameter.shape for parameter in model.head_parameters()]
    if family in ("gpt2", "opt", "gemma"):
        assert head == []
    elif family != "bert":
        assert head == [(2, 32)]
    # a move of the space moves both ends of a tied weight
    if family in TIED:
        space.place(torch.ones(space.size))
        given: Any = model.model
        assert model._whole[0].weight is given.get_input_embeddings().weight


@pytest.mark.parametrize(("family", "text"), [(f, s) for f in ("bert", "gpt2", "llama") for s in SPACES])
def test_candidates_share_a_forward_pass(
    family: str, text: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scorer._TOKENS, "cpu", 2**20)
    model, batch = made(family)
    space = searched(text, model)
    low_rank = None if text.startswith(("projection", "prompt")) else LowRank(1)
    scale = 0.1 if low_rank else 2.0
    candidates = [Seeded(seed, scale, "gaussian", low_rank) for seed in range(5)]
    engine = Engine(model, space, 1000, run_seed=0)
    engine.losses(batch, candidates)
    assert engine.found["together"]
    forwards: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = engine.losses(batch, candidates)
    handle.remove()
    assert len(forwards) == 1
    assert losses == pytest.approx([engine.losses(batch, [each])[0] for each in candidates], rel=5e-5)


def test_a_search_of_the_head_alone_encodes_a_text_once(made: Made) -> None:
    model, batch = made("bert")
    engine = Engine(model, searched("head", model), 1000, run_seed=0)
    expected = engine.losses(batch, [Seeded(1, 0.1)])
    forwards: list[int] = []
    model.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert engine.losses(batch, [Seeded(1, 0.1)]) == expected
    assert not forwards


def test_a_decoder_whose_head_is_its_embedding_has_no_head_to_search(made: Made) -> None:
    model, _ = made("gpt2")
    with pytest.raises(UserError, match="'head' has no parameters in this model; choose another"):
        searched("head", model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("text", ["full", "lora,rank=2", "prompt,tokens=3,dimension=0"])
def test_it_replays_and_resumes_to_the_same_bits(
    family: str, text: str, dtype: str, made: Made, tmp_path: Path
) -> None:
    path, cut = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    rate = "epsilon=0.05,learning_rate=0.001" if text == "full" else "epsilon=0.1,learning_rate=0.05"
    training = Training(Spec.parse(f"spsa,directions=4,{rate}"), parse(text), 200, 100, 0)

    def run(trajectory: Path, resume: bool = False) -> tuple[Any, Space]:
        model, batch = made(family, dtype)
        space = searched(text, model)

        def measure() -> dict[str, float]:
            with torch.inference_mode():
                return {"loss": float(cross_entropy(model(batch).float(), batch.targets))}

        kept = {"trajectory": trajectory, "resume": resume}
        return train(training, model, space, lambda step: batch, measure, **kept), space

    result, after = run(path)
    if text == "lora,rank=2" and family != "bert":  # at a mask, a fresh BERT reads little but the mask
        assert result.curve[-1][1]["loss"] < result.curve[0][1]["loss"] - 0.02
    again = searched(text, made(family, dtype)[0])
    assert Trajectory.read(path).replay(again) == after.digest()
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(cut, resume=True)[1].digest() == after.digest()


@pytest.mark.parametrize(
    ("text", "answer"), [("{text} it was {mask} .", -3), ("{mask} film : {text}", 1), ("a {mask} {text}", 2)]
)
def test_the_answer_of_a_masked_model_is_at_the_mask(text: str, answer: int, bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    template = Template(text, tokenizer, masked=True)
    assert template.answer == answer
    # a text that names the mask itself is not mistaken for the template
    for row in template.tokens(["the film", "the long long film", "a [MASK] film", "story " * 40], 16):
        assert row[template.answer] == tokenizer.mask_token_id
        assert len(row) <= 16


def test_a_long_text_is_cut_and_the_template_is_whole(gpt2: Path) -> None:
    tokenizer = load_tokenizer(str(gpt2))
    template = Template("the film : {text} it was", tokenizer, masked=False)
    long = " ".join(["good", "bad", "slow"] * 30)
    [short, cut] = template.tokens(["a plot", long], 12)
    assert tokenizer.decode(short) == "the film [UNK] a plot it was"
    assert tokenizer.decode(cut) == "the film [UNK] good bad slow good bad slow good it was"
    with pytest.raises(UserError, match="template takes 5 tokens, which leaves no room for a text"):
        template.tokens(["a plot"], 5)


@pytest.mark.parametrize(
    ("text", "masked", "error"),
    [
        ("{text} it was {mask}", False, "the model is a causal one"),
        ("{text} it was", True, "must hold {mask} once"),
    ],
)
def test_a_template_that_does_not_fit_is_one_line(text: str, masked: bool, error: str, bert: Path) -> None:
    with pytest.raises(UserError, match=error):
        Template(text, load_tokenizer(str(bert)), masked=masked)


def test_a_word_is_tokens_that_the_model_knows(gpt2: Path, bert: Path) -> None:
    for folder, template in ((gpt2, "{text} it was"), (bert, "{text} it was {mask}")):
        tokenizer = load_tokenizer(str(folder))
        given, ids = Template(template, tokenizer, masked=folder == bert), tokenizer.get_vocab()
        assert given.words([" good", " bad"]) == [[ids["good"]], [ids["bad"]]]
        assert given.words([" not bad", " good"]) == [[ids["not"], ids["bad"]], [ids["good"]]]
        with pytest.raises(UserError, match="does not know ' not superb'"):
            given.words([" not superb", " good"])
        with pytest.raises(UserError, match="' good' and ' Good' are one and the same to the model"):
            given.words([" good", " Good"])


def test_a_word_that_joins_the_template_is_refused(tmp_path: Path) -> None:
    """Byte-level tokens carry their space: a word without one would be read as the end of another."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "a", ":", "Ġ", "Ġg", "Ġgo", "g", "o", "go"]
    merges = [("Ġ", "g"), ("Ġg", "o"), ("g", "o")]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    assert Template("{text}:", tokenizer, masked=False).words([" go", "go"]) == [[6], [9]]
    with pytest.raises(
        UserError, match=r"'go' would melt into the template's end; begin it with a space, and"
    ):
        Template("{text}: ", tokenizer, masked=False).words(["go"])


WORDS_GIVEN = ["-S", "finetune.verbalizers={up: ' good', down: ' bad'}", "-S", "finetune.max_length=32"]


@pytest.mark.parametrize("space", ["lora,rank=2", "prompt,tokens=3,dimension=0"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_whole_run_and_its_replay(
    family: str, space: str, folder_of: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    template = "{text} it was" + (" {mask}" if family == "bert" else "")
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--name", "mine"]
    given += [*small(folder_of[family]), "-S", "pretrain.enabled=false", "-S", f"finetune.space={space}"]
    done = pipeline(*given, *WORDS_GIVEN, "-S", f"finetune.template='{template}'", home=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "mine"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test/accuracy", "zero_shot/accuracy", "linear_probe/accuracy", "adamw/accuracy"} <= set(metrics)
    assert ("in_context/accuracy" in metrics) == (family != "bert")
    assert f'- template: `"{template}"`' in (folder / "report.md").read_text()
    said = json.loads((folder / "models" / "finetuned" / "prompted.json").read_text())
    assert said["words"] == [" bad", " good"]
    assert "identical" in pipeline("replay", "mine", home=tmp_path).stdout
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    _, info = auto.from_pretrained(folder / "models" / "finetuned", output_loading_info=True)
    assert not info["missing_keys"]
    weights = folder / "models" / "finetuned" / "model.safetensors"
    if space.startswith("lora"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        assert "was changed after the run" in pipeline("replay", "mine", home=tmp_path).stderr


def test_words_without_a_template_are_refused(bert: Path, table: Path, tmp_path: Path) -> None:
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", *small(bert)]
    done = pipeline(*given, "-S", "pretrain.enabled=false", *WORDS_GIVEN, home=tmp_path)
    assert done.returncode == 2
    assert "finetune.verbalizers are words for a template: set finetune.template" in done.stderr
    for wrong in ("it was", "{text} and {text}"):
        done = pipeline(*given, "-S", f"finetune.template='{wrong}'", home=tmp_path)
        assert done.returncode == 2
        assert f"finetune.template '{wrong}' must hold {{text}} once" in done.stderr
    assert not (tmp_path / "runs").exists()  # seen before anything was computed
    template = ["-S", "finetune.template='{text} it was {mask}'"]
    done = pipeline(*given, "-S", "pretrain.enabled=false", *template, home=tmp_path)
    assert done.returncode == 2
    assert "finetune.verbalizers: the model does not know ' down'; give another word" in done.stderr


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_in_context_is_the_plain_model_after_solved_texts(
    family: str,
    opened: bool,
    made: Made,
    folder_of: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without keys that are kept: demonstrations and text as one row, one at a time.

    Where a tokenizer opens each text with a token, that token stands once.
    """
    model, test = made(family)
    tokenizer: Any = load_tokenizer(str(folder_of[family]))
    model.save(tmp_path, tokenizer)
    plain = test
    if opened:
        opening = TemplateProcessing(single="[SEP] $A", special_tokens=[("[SEP]", 3)])
        tokenizer.backend_tokenizer.post_processor = opening
        inputs = {
            name: torch.cat((torch.full((8, 1), 3 if name == "input_ids" else 1), tensor), 1)
            for name, tensor in test.inputs.items()
        }
        test = Batch(inputs, test.targets)
    train = [_drawn_batch(test, [2, 5]), _drawn_batch(test, [7, 1])]
    start = Start(model, tokenizer, lambda step: train[step], [test], [test], [test])
    monkeypatch.setattr(in_context_module, "DEMONSTRATIONS", 3)
    monkeypatch.setattr(in_context_module, "_TOKENS", 64)  # several pieces
    figures = in_context(start)
    assert figures is not None
    assert figures["demonstrations"] == 3
    shown = [3] if opened else []
    for row in (2, 5, 7):
        mask = plain.inputs["attention_mask"][row].bool()
        shown += plain.inputs["input_ids"][row][mask].tolist()
        shown += [model.prompting.tokens[int(test.targets[row])]]
    before = torch.tensor(shown).expand(8, -1)
    whole = {
        "input_ids": torch.cat((before, plain.inputs["input_ids"]), 1),
        "attention_mask": torch.cat((torch.ones_like(before), plain.inputs["attention_mask"]), 1),
    }
    logits = plainly(tmp_path, Batch(whole, test.targets), model.prompting)
    assert figures["loss"] == pytest.approx(float(cross_entropy(logits, test.targets)), rel=1e-4)
    assert figures["accuracy"] == float((logits.argmax(-1) == test.targets).double().mean())
    # as many as fit: 64 positions
    monkeypatch.setattr(in_context_module, "DEMONSTRATIONS", 4)
    longest = test.inputs["input_ids"].shape[1]
    model.model.config.max_position_embeddings = len(shown) + longest
    fitting = in_context(start)
    assert fitting is not None
    assert fitting["demonstrations"] == 3
    model.model.config.max_position_embeddings = longest
    assert in_context(start) is None


def _drawn_batch(batch: Batch, rows: list[int]) -> Batch:
    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    return Batch(inputs, batch.targets[rows], examples=tuple(rows))


def test_a_masked_model_has_no_context_to_learn_from(made: Made, bert: Path) -> None:
    model, batch = made("bert")
    start = Start(model, load_tokenizer(str(bert)), lambda step: batch, [batch], [batch], [batch])
    assert in_context(start) is None


def test_a_model_passes_through_with_the_head_it_was_trained_with(
    folder_of: dict[str, Path], tmp_path: Path
) -> None:
    for family in ("bert", "llama"):
        kind = "mlm" if family == "bert" else "clm"
        pass_through(str(folder_of[family]), tmp_path / family, 0)
        assert has_language_head(str(tmp_path / family))
        before = load_language_model(str(folder_of[family]), kind, 0).state_dict()
        after = load_language_model(str(tmp_path / family), kind, 1).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    load_encoder(str(folder_of["bert"])).save_pretrained(tmp_path / "headless")
    load_tokenizer(str(folder_of["bert"])).save_pretrained(tmp_path / "headless")
    pass_through(str(tmp_path / "headless"), tmp_path / "passed", 0)
    assert not has_language_head(str(tmp_path / "passed"))


def test_few_shots_without_a_trained_head_run_and_say_so(bert: Path, table: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    load_encoder(str(bert)).save_pretrained(headless)
    load_tokenizer(str(bert)).save_pretrained(headless)
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", "--name", "mine"]
    given += [*small(headless), "-S", "pretrain.enabled=false", "-S", "prepare.shots=3", *WORDS_GIVEN]
    given += ["-S", "finetune.space=head", "-S", "finetune.template='{text} it was {mask}'", "--no-baselines"]
    with pytest.warns(UserWarning, match="comes without a trained language-modelling head"):
        done = pipeline(*given, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "few-shot: 3 of each label drawn by the seed 0" in done.stdout
    with pytest.warns(UserWarning, match="comes without a trained"):
        assert "identical" in pipeline("replay", "mine", home=tmp_path).stdout


def test_a_model_that_reads_and_writes_completes_no_template(bert: Path, table: Path, tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    size = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    size |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 30, "max_position_embeddings": 64}
    tokenizer = load_tokenizer(str(bert))
    tokenizer.save_pretrained(tmp_path / "bart")
    special = {"decoder_start_token_id": 2, "forced_eos_token_id": 3, "eos_token_id": 3, "bos_token_id": 2}
    BartForConditionalGeneration(BartConfig(d_model=16, pad_token_id=0, **special, **size)).save_pretrained(
        tmp_path / "bart"
    )
    given = ["run", "--train", str(table), "--text", "review", "--label", "verdict", *WORDS_GIVEN]
    given += [*small(tmp_path / "bart"), "-S", "pretrain.enabled=false"]
    done = pipeline(*given, "-S", "finetune.template='{text} it was {mask}'", home=tmp_path)
    assert done.returncode == 2
    assert "bart completes no template: it takes a decoder, or an encoder with a mask token" in done.stderr
