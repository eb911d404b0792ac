"""What is written against transformers' generate, and whole runs by a reward."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
import torch

from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.models.loading import load_language_model, load_tokenizer
from pipeline.objective import TextObjective, parse
from pipeline.optimizer import LowRank, Move, Seeded
from pipeline.tasks.base import Asked, Batch
from pipeline.tasks.decoding import Decoding, decode
from pipeline.tasks.writing import Continued, Decoder, WritingData, decoding
from tests.conftest import sentences
from tests.test_cli import pipeline
from tests.test_engine import classifier, searched

REWARD = """\
def score(prompt, completion):
    words = completion.split()
    return sum(word in ("good", "great", "fine") for word in words) / max(1, len(words))
"""


def decoder(folder: Path, temperature: float = 0.0, new: int = 6) -> Decoder:
    location = str(folder)
    model = load_language_model(location, "clm", 0)
    return Decoder(model, load_tokenizer(location), new, temperature).eval()


def prompts(folder: Path, seed: int = 3, targets: bool = False) -> Batch:
    from datasets import Dataset

    texts, _ = sentences(6)
    columns = {"text": [" ".join(text.split()[: 2 + i]) for i, text in enumerate(texts)]}
    if targets:
        columns["target"] = ["good film", "a story", "the", "dull plot", "it was", "slow"]
    data = WritingData(
        Dataset.from_dict(columns),
        load_tokenizer(str(folder)),
        Continued(3),
        template="{text}",
        max_length=16,
        max_new_tokens=6,
    )
    return data.batch(range(6), seed)


def generated(model: Decoder, batch: Batch) -> list[str]:
    """By transformers."""
    assert batch.asked
    ids = model.model.generate(
        **batch.asked.inputs, max_new_tokens=6, do_sample=False, pad_token_id=3, eos_token_id=3
    )
    width = batch.asked.inputs["input_ids"].shape[1]
    written: list[str] = model._tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return written


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma", "llama", "nemotron"])
def test_the_decoder_writes_what_transformers_generates(
    name: str, gpt2: Path, decoders: dict[str, Path]
) -> None:
    folder = gpt2 if name == "gpt2" else decoders[name]
    model, batch = decoder(folder), prompts(folder)
    assert model.write(batch) == generated(model, batch)


def test_a_text_ends_at_its_end() -> None:
    rows = {0: [1, 5, 1], 1: [5, 2, 2]}
    options = Decoding(max_new_tokens=4, temperature=0.0, stop=(5,), pad=5)
    asked: list[list[int] | None] = []

    def following(token: torch.Tensor | None) -> torch.Tensor:
        step = len(asked)
        asked.append(None if token is None else token.tolist())
        return torch.nn.functional.one_hot(torch.tensor([rows[0][step], rows[1][step]]), 6).float()

    assert decode(following, options, 0).tolist() == [[1, 5], [5, 5]]
    assert asked == [None, [1, 5]], "a batch ends when all its texts have"


def test_a_text_ends_with_the_tokenizers_end_too(gpt2: Path) -> None:
    model, tokenizer = load_language_model(str(gpt2), "clm", 0), load_tokenizer(str(gpt2))
    model.generation_config.eos_token_id = [5, 6]  # of the model that it was made from
    assert decoding(model, tokenizer, 4, 0.0).stop == (5, 6, tokenizer.eos_token_id)


def test_a_text_may_begin_with_a_forced_token() -> None:
    options = Decoding(max_new_tokens=2, temperature=0.0, stop=(5,), pad=5, first=3)
    asked: list[list[int] | None] = []

    def following(token: torch.Tensor | None) -> torch.Tensor:
        asked.append(None if token is None else token.tolist())
        return torch.nn.functional.one_hot(torch.tensor([1, 2]), 6).float()

    assert decode(following, options, 0).tolist() == [[3, 1], [3, 2]]
    assert asked == [None, [3, 3]], "what follows is asked for after it"


def test_a_prompt_stays_open_whatever_the_tokenizer_would_close_it_with(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))  # one that closes its texts
    closed = tokenizer("a film")["input_ids"]
    [opened] = Continued(0).prompts(["a film"], tokenizer)
    assert closed == [*opened, tokenizer.sep_token_id]


def test_what_is_drawn_is_drawn_by_seed(gpt2: Path) -> None:
    model = decoder(gpt2, temperature=2.0)
    first, again, other = (model.write(prompts(gpt2, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, -1)
    drawn = decode(lambda token: logits, Decoding(1, 0.5, (), -1), 0)[:, 0]
    shares = torch.bincount(drawn) / len(drawn)
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0.0)
    first, second = decode(lambda token: logits, Decoding(2, 0.5, (), -1), 0).T
    assert not torch.equal(first, second), "each position has numbers of its own"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("space", ["full", "lora,rank=2", "prompt,tokens=3,dimension=20"])
@pytest.mark.parametrize("low_rank", [None, LowRank(1)])
def test_texts_written_at_a_candidate_are_those_of_moved_weights(
    low_rank: LowRank | None, space: str, temperature: float, gpt2: Path
) -> None:
    if low_rank and space.startswith("prompt"):
        pytest.skip("a subspace has no directions of low rank")
    model, batch = decoder(gpt2, temperature), prompts(gpt2)
    heard(model)
    over = searched(space, model)
    objective = Written()
    engine = Engine(model, over, 100, 0, objective)
    candidates = [
        Seeded(seed, 50.0 if space.startswith("prompt") else 0.5, "gaussian", low_rank) for seed in (1, 2)
    ]
    engine.losses(batch, candidates)
    engine.close()
    assert len({tuple(texts) for texts in objective.seen}) == 2
    for candidate, texts in zip(candidates, objective.seen, strict=True):
        moved = decoder(gpt2, temperature)
        heard(moved)
        searched(space, moved).move(Move([candidate.seed], [candidate.scale], "gaussian", 0.0, low_rank))
        assert moved.write(batch) == texts


def heard(model: Decoder) -> None:
    """Makes tokens matter to each other more than they do in a model as it is drawn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." in name and parameter.dim() == 2:
                parameter.mul_(10.0)


class Written(TextObjective):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__([])
        self.seen: list[list[str]] = []

    def loss(self, asked: Asked, completions: object) -> float:
        assert isinstance(completions, list)
        self.seen.append(completions)
        return float(len(self.seen))


def test_a_soft_prompt_is_read_once_and_remembered(gpt2: Path) -> None:
    """With the cache, and without it from the beginning for each token."""
    model, batch = decoder(gpt2), prompts(gpt2)
    heard(model)
    before = model.write(batch)
    searched("prompt,tokens=3,dimension=0", model)
    assert batch.asked
    assert model.write(batch) != before
    for row, text in enumerate(model.write(batch)):
        ids = batch.asked.inputs["input_ids"][row][batch.asked.inputs["attention_mask"][row].bool()]
        written: list[int] = []
        for _ in range(6):
            every = torch.cat((ids, torch.tensor(written, dtype=torch.long)))[None]
            with torch.inference_mode():
                states = model.encoder(
                    input_ids=every, attention_mask=torch.ones_like(every)
                ).last_hidden_state
                token = int(model.outputs(states[:, -1]).argmax())
            if token == 3:
                break
            written.append(token)
        assert text == model._tokenizer.decode(written, skip_special_tokens=True).strip()


def test_targets_are_predicted_from_their_prompt(gpt2: Path) -> None:
    model, batch = decoder(gpt2), prompts(gpt2, targets=True)
    assert batch.asked
    with torch.inference_mode():
        ours = model(batch).log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    assert batch.asked.lengths == (3, 3, 2, 3, 3, 2)
    rows = []
    for row in range(6):
        ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        with torch.inference_mode():
            logits = model.model(ids[None]).logits[0].log_softmax(-1)
        length = batch.asked.lengths[row]
        rows.append(logits[-length - 1 : -1].gather(-1, ids[-length:, None]).squeeze(-1))
        assert ids[-1] == 3, "its end is learnt too"
    torch.testing.assert_close(ours, torch.cat(rows))


def test_a_long_text_is_cut_and_its_template_is_not(gpt2: Path) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(str(gpt2))

    def data(max_length: int) -> WritingData:
        return WritingData(
            Dataset.from_dict({"text": ["the film was not a good story and it was long"]}),
            tokenizer,
            Continued(3),
            template="the {text} is",
            max_length=max_length,
            max_new_tokens=4,
        )

    asked = data(6).batch([0], 0).asked
    assert asked
    assert asked.prompts == ("the the film was not is",)
    assert asked.inputs["input_ids"].shape == (1, 6)
    with pytest.raises(UserError, match="leaves no room for a text in the template"):
        data(2)


def test_a_model_that_writes_none_and_an_optimizer_that_needs_a_gradient_are_one_line(
    bert: Path, gpt2: Path
) -> None:
    model, batch = classifier(bert)
    engine = Engine(model, searched("head", model), 100, 0, parse("length"))
    with pytest.raises(UserError, match="this task's model writes none"):
        engine.losses(batch, [Seeded(1, 0.1)])
    engine.close()
    writer = decoder(gpt2)
    engine = Engine(writer, searched("full", writer), 100, 0, parse("length"))
    with pytest.raises(UserError, match="needs a gradient, which the objective has not"):
        engine.gradient(prompts(gpt2), 0)
    engine.close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    lines = [" ".join(text.split()[:3]) + f",{text.split()[-1]}" for text in sentences(80)[0]]
    path.write_text("\n".join(["start,answer", *lines]) + "\n", encoding="utf-8")
    return path


def options(model: Path, texts: Path) -> list[str]:
    given = {
        "pretrain.enabled": "false",
        "finetune.space": "full",
        "finetune.max_length": "8",
        "finetune.max_new_tokens": "5",
        "finetune.batch_size": "8",
        "finetune.evaluate_every": "30",
    }
    sets = [part for key, value in given.items() for part in ("-S", f"{key}={value}")]
    return [
        *("run", "--name", "mine", "--task", "generation", "--model", str(model), "--train", str(texts)),
        *("--text", "start", "--forward-passes", "60", *sets),
    ]


def test_a_run_by_a_reward_of_ones_own(gpt2: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    done = pipeline(
        *(*options(gpt2, texts), "--objective", "./reward.py:score"),
        *("-S", "finetune.epsilon=0.05", "-S", "finetune.learning_rate=0.3"),
        *("-S", "finetune.temperature=1"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"test/score", "test/score_sd", "test/words", "zero_shot/score"} <= set(metrics)
    assert metrics["test/loss"] == -metrics["test/score"]
    assert not [key for key in metrics if key.startswith("adamw")], "there is no target to learn from"
    assert "takes the test score from" in (run / "report.md").read_text()
    assert "test score" in done.stdout
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    card = json.loads((run / "data" / "prepared" / "card.json").read_text())
    assert len(lines) == card["task"]["splits"]["test"]["rows"]
    assert all(set(each) == {"loss", "hit", "written"} for each in lines)
    (tmp_path / "reward.py").unlink()  # a replay calls no objective
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert "identical" in replayed.stdout, replayed.stderr
    load_language_model(str(run / "models" / "finetuned"), "clm", 0)


def test_a_run_towards_targets_has_all_yardsticks(gpt2: Path, texts: Path, tmp_path: Path) -> None:
    done = pipeline(*options(gpt2, texts), "--label", "answer", home=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    for row in ("zero_shot", "test", "adamw"):
        assert {f"{row}/loss", f"{row}/exact_match", f"{row}/token_f1"} <= set(metrics)
        assert metrics[f"{row}/loss"] > 0
    assert metrics["adamw/loss"] < metrics["zero_shot/loss"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "the objective cross_entropy needs target texts, and the prompts have none"),
        (("--objective", "length", "-S", "finetune.template=x"), "template 'x' must hold {text} once"),
        (
            ("--objective", "length", "-S", "finetune.max_length=62"),
            "are together 67; the model takes",
        ),
        (("--objective", "length", "--optimizer", "adamw"), "needs a gradient, which the objective has not"),
    ],
)
def test_what_does_not_fit_is_one_line(
    more: tuple[str, ...], said: str, gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    done = pipeline(*options(gpt2, texts), *more, home=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_list_of_tasks_is_whole(tmp_path: Path) -> None:
    rows = json.loads(pipeline("tasks", "--json", home=tmp_path).stdout)
    assert {"classification", "mlm", "clm", "generation", "translation", "summarization", "qa"} <= {
        row["task"] for row in rows
    }
    for row in rows:
        assert all(
            row[key] for key in ("does", "reads", "data", "models", "objectives", "metrics", "example")
        )
        for name in row["objectives"]:
            if name not in ("kl", "classifier", "regex") and not name.startswith("."):
                parse(name)
    shown = pipeline("tasks", home=tmp_path)
    assert "generation: Completions of prompts, by a reward" in shown.stdout


def test_a_copy_is_not_needed(gpt2: Path) -> None:
    """Scoring leaves the weights as they were."""
    model = decoder(gpt2)
    before = copy.deepcopy(model.state_dict())
    over = searched("full", model)
    engine = Engine(model, over, 100, 0, parse("length"))
    engine.losses(prompts(gpt2), [Seeded(1, 0.5), Seeded(2, -0.5)])
    engine.close()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_comparison_of_texts_is_refused(gpt2: Path, tmp_path: Path) -> None:
    done = pipeline("compare", "-S", "prepare.task=translation", "--model", str(gpt2), home=tmp_path)
    assert done.returncode == 2
    assert "compare takes tasks of texts and labels" in done.stderr
