"""The example that is no text, from its own file: prepared, trained in several ways, tested, replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from pipeline import user_code
from pipeline.config import Config, PrepareConfig
from pipeline.data.prepare import load_task
from pipeline.engine.evaluator import Engine
from pipeline.layout import Layout
from pipeline.measuring.evaluation import measure
from pipeline.optimizer import LowRank, Seeded
from tests.test_cli import ROOT, pipeline
from tests.test_engine import reference, searched

FILE = ROOT / "examples" / "images.py"
DIGITS = user_code.load("task", user_code.Reference(FILE, "Digits"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fresh model in it, and the file of the task."""
    folder = tmp_path_factory.mktemp("images")
    with torch.random.fork_rng(devices=[]):
        user_code.load("task", user_code.Reference(FILE, "write_fresh"))(str(folder / "vit"))
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def command(name: str, *more: str) -> list[str]:
    config = str(ROOT / "examples" / "digits.yaml")
    short = ["--forward-passes", "64", "-S", "finetune.evaluate_every=32"]
    return ["run", "--config", config, "--name", name, *short, *more]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    done = pipeline(*command("mine"), home=home)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "mine"


def test_images_go_the_way_that_texts_go(whole: Path, home: Path) -> None:
    metrics = json.loads((whole / "metrics.json").read_text())
    for row in ("test", "majority", "zero_shot", "linear_probe", "adamw"):
        assert 0.0 <= metrics[f"{row}/accuracy"] <= 1.0
    assert metrics["forward_passes"] == 51  # three steps of 17; 64 are allowed
    # the images are there, and their labels fit
    assert metrics["linear_probe/accuracy"] > metrics["majority/accuracy"] + 0.1
    assert metrics["majority/accuracy"] < 0.2
    card = json.loads((whole / "data" / "prepared" / "card.json").read_text())
    assert {name: split["rows"] for name, split in card["task"]["splits"].items()} == {
        "train": 1000,
        "validation": 200,
        "test": 597,
    }
    assert "Handwritten digits" in (whole / "data" / "prepared" / "card.md").read_text()
    replayed = pipeline("replay", "mine", home=home)
    assert replayed.returncode == 0, replayed.stderr
    assert "identical" in replayed.stdout


def test_any_tool_loads_what_is_saved(whole: Path) -> None:
    saved, info = AutoModelForImageClassification.from_pretrained(
        whole / "models" / "finetuned", output_loading_info=True
    )
    assert not info["missing_keys"]
    rows = load_task(Layout(whole))["test"]
    images = 2 * torch.tensor(rows["pixels"]).view(-1, 1, 8, 8) - 1
    with torch.inference_mode():
        hits = saved.eval()(images).logits.argmax(-1) == torch.tensor(rows["label"])
    metrics = json.loads((whole / "metrics.json").read_text())
    assert float(hits.float().mean()) == pytest.approx(metrics["test/accuracy"], abs=2e-3)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("head", ["-S", "finetune.space=head"]),
        (
            "factors",
            ["--optimizer", "es:LowRank,rank=1", "-S", "finetune.space=lora,rank=2", "-S", "dtype=int8"],
        ),
        ("projection", ["--optimizer", "cmaes", "-S", "finetune.space=projection,dimension=50"]),
    ],
)
def test_other_spaces_optimizers_and_dtypes_take_images(name: str, more: list[str], home: Path) -> None:
    done = pipeline(*command(name, *more, "--no-baselines"), home=home)
    assert done.returncode == 0, done.stderr
    replayed = pipeline("replay", name, home=home)
    assert "identical" in replayed.stdout, replayed.stderr


@pytest.mark.parametrize("space", ["full", "biases", "lora,rank=2"])
def test_candidates_score_as_their_weights_do_when_written(space: str, whole: Path) -> None:
    begin = DIGITS().start(Config(dtype="float32"), Layout(whole), None)
    over = searched(space, begin.model)
    engine = Engine(begin.model, over, 100, run_seed=0)
    batch = begin.batch(0)
    candidates = [Seeded(1, 0.05), Seeded(2, -0.05), Seeded(3, 0.05, "gaussian", LowRank(1))]
    losses = torch.tensor(engine.losses(batch, candidates))
    engine.close()
    expected = torch.tensor([reference(begin.model, over, each, batch) for each in candidates])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_the_split_is_one_whatever_the_seed(whole: Path) -> None:
    first, other = (DIGITS().start(Config(seed=seed), Layout(whole), None) for seed in (0, 1))
    assert measure(first.model, first.test) != measure(other.model, other.test)  # heads of their own
    sizes = PrepareConfig(validation_size=40, test_size=50)
    one, two = (DIGITS().rows(Config(seed=seed, prepare=sizes)) for seed in (0, 1))
    assert {split: len(one[split]) for split in one} == {"train": 1707, "validation": 40, "test": 50}
    assert all(one[split].to_dict() == two[split].to_dict() for split in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-S", "prepare.corpus=[task]"], "are no text to pretrain on: set prepare.corpus"),
        (["-S", "prepare.test_size=1700"], "must leave some of the 1,797 images"),
    ],
)
def test_what_does_not_fit_is_one_line(more: list[str], said: str, home: Path) -> None:
    refused = pipeline(*command("refused", *more), home=home)
    assert refused.returncode == 2
    assert said in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr
