"""Weights in 8 and 4 bits: how near they are, what holds them, and that training over them is exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from pipeline import space as spaces
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.layout import partial
from pipeline.models.loading import load_encoder, load_language_model, make_plain, save_model
from pipeline.models.quantized import FORMATS, GROUP, dequantize, quantize, quantized
from pipeline.optimizer import Candidate, LowRank, Seeded
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.classification import START_FILE
from pipeline.trajectory import FILE, Trajectory
from tests.test_cli import pipeline, small
from tests.test_engine import classifier, language_model, searched
from tests.test_training import run

NAMES = sorted(FORMATS)
SPACES = ["lora,rank=2", "norms", "biases", "prompt,tokens=2,dimension=20"]
# Llama's layers have no bias
CASES = [
    (f, s) for f in ("classifier", "bert", "gpt2", "llama") for s in SPACES if (f, s) != ("llama", "biases")
]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_scale = torch.logspace(-4, 1, rows)[:, None]  # rows of unlike size, as in real layers
    return rows_scale * torch.randn(rows, columns, generator=generator)


def decoded(name: str, weight: Tensor) -> Tensor:
    codes = FORMATS[name](nn.Linear(weight.shape[1], weight.shape[0]))
    return codes.decoded(*codes.encoded(weight))


def by_hand(name: str, weight: np.ndarray) -> np.ndarray:
    """Round to nearest, a number at a time."""
    out = np.empty_like(weight)
    for i, row in enumerate(weight):
        if name == "int8":
            scale = np.abs(row).max() / np.float32(127)
            out[i] = [np.rint(value / scale) * scale for value in row]
            continue
        for start in range(0, len(row), GROUP):
            group = row[start : start + GROUP]
            least = np.float32(np.float16(group.min()))
            scale = np.float32(np.float16((group.max() - group.min()) / np.float32(15)))
            out[i, start : start + GROUP] = [
                least + scale * min(max(np.rint((value - least) / scale), 0), 15) for value in group
            ]
    return out


@pytest.mark.parametrize("columns", [GROUP, 3 * GROUP, 5, GROUP + 7])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_rounding_to_nearest_by_hand(name: str, columns: int) -> None:
    weight = weights(6, columns)
    torch.testing.assert_close(decoded(name, weight), torch.from_numpy(by_hand(name, weight.numpy())))


@pytest.mark.parametrize("columns", [2 * GROUP, 45])
def test_no_weight_is_further_off_than_half_a_step(columns: int) -> None:
    weight = weights(50, columns, seed=1)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((decoded("int8", weight) - weight).abs() <= step * 0.5001).all())
    off = (decoded("int4", weight) - weight).abs()
    for start in range(0, columns, GROUP):
        group = weight[:, start : start + GROUP]
        low, high = group.aminmax(dim=1, keepdim=True)
        # scale and least are float16: 11 bits each
        bound = (high - low) / 15 * 0.52 + low.abs() * 2**-11
        assert bool((off[:, start : start + GROUP] <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_one_value_and_values_that_are_codes_come_back_as_they_are(name: str) -> None:
    constant = torch.tensor([0.0, 0.5, -2.0])[:, None].expand(3, 40)
    torch.testing.assert_close(decoded(name, constant), constant, rtol=1e-6, atol=0.0)
    once = decoded(name, weights(6, 70))
    torch.testing.assert_close(decoded(name, once), once, rtol=2e-3 if name == "int4" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_stays_seen(name: str, value: float) -> None:
    weight = weights(3, 40)
    weight[1, 3] = value
    assert not bool(decoded(name, weight)[1].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_codes_take_the_bits_that_are_said(name: str, bert: Path) -> None:
    encoder = load_encoder(str(bert), name)
    layers = list(quantized(encoder))
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    count = sum(layer.in_features * layer.out_features for layer in layers)  # type: ignore[operator]
    rows = sum(int(layer.out_features) for layer in layers)  # type: ignore[arg-type]
    assert len(layers) == 2 * 6
    assert held == (count + 4 * rows if name == "int8" else count * 5 // 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_what_is_no_linear_layer_below_the_head_stays_float32(
    name: str, family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("decoders" if family in ("llama", "opt") else family)
    location = str(folder[family] if isinstance(folder, dict) else folder)
    task = "mlm" if family == "bert" else "clm"
    plain, held = (load_language_model(location, task, 0, each) for each in ("float32", name))
    layers = {id(layer) for layer in quantized(held)}
    below = set(held.base_model.modules())
    for (path, before), after in zip(plain.named_modules(), _matching(plain, held), strict=True):
        linear = isinstance(before, nn.Linear | Conv1D) and after in below
        assert (id(after) in layers) == linear, path
        for key, parameter in before.named_parameters(recurse=False):
            if not (linear and key == "weight"):
                assert torch.equal(getattr(after, key), parameter), path
    assert layers


def _matching(plain: nn.Module, held: nn.Module) -> list[nn.Module]:
    return [held.get_submodule(path) for path, _ in plain.named_modules()]


def test_the_layer_that_gives_logits_stays_where_the_base_model_is_the_whole() -> None:
    config = T5Config(vocab_size=30, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    config.tie_word_embeddings = False
    model = T5ForConditionalGeneration(config).eval()
    quantize(model, "int8")
    assert model.lm_head not in set(quantized(model))
    assert len(list(quantized(model))) == 16
    ids = torch.ones(1, 4, dtype=torch.long)
    held = model(input_ids=ids, decoder_input_ids=ids).logits
    dequantize(model)
    assert not list(quantized(model))
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, held)


def test_a_checkpoint_in_half_precision_is_read_as_it_is(bert: Path, tmp_path: Path) -> None:
    save_model(load_encoder(str(bert)).to(torch.bfloat16), tmp_path)
    half, whole = load_encoder(str(tmp_path), "int4"), load_encoder(str(tmp_path), "float32")
    quantize(whole, "int4")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor)
        assert half.state_dict()[name].dtype == tensor.dtype


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Callable[[str, str], tuple[TaskModel, Batch]]:
    """A model of a family, its weights held in a format, and a batch for it."""

    def make(family: str, name: str) -> tuple[TaskModel, Batch]:
        if family == "classifier":
            return classifier(request.getfixturevalue("bert"), name)
        if family in ("bert", "gpt2"):
            folder = request.getfixturevalue(family)
            return language_model(folder, "mlm" if family == "bert" else "clm", name)
        return language_model(request.getfixturevalue("decoders")[family], "clm", name)

    return make


@pytest.mark.parametrize(("family", "space"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_candidates_score_as_over_dense_weights_of_the_same_values(
    name: str, family: str, space: str, made: Callable[[str, str], tuple[TaskModel, Batch]]
) -> None:
    candidates: list[Candidate] = [Seeded(seed, scale) for seed in (1, 2) for scale in (0.1, -0.1)]
    if space.startswith("lora"):
        candidates += [Seeded(seed, 0.1, "gaussian", LowRank(1)) for seed in (3, 4)]
    losses = {}
    for way in ("held", "dense"):
        model, batch = made(family, name)
        if way == "dense":
            dequantize(model.encoder)
        over = searched(space, model)
        engine = Engine(model, over, 100, run_seed=0)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        losses[way] = torch.tensor([engine.losses(batch, [each])[0] for each in candidates])
        together = engine.losses(batch, candidates[:4])
        torch.testing.assert_close(torch.tensor(together), losses[way][:4], rtol=1e-4, atol=1e-5)
        engine.close()
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert losses["held"].unique().numel() > 1
    torch.testing.assert_close(losses["held"], losses["dense"], rtol=1e-5, atol=1e-6)


def test_a_gradient_reaches_the_factors_through_quantized_layers(bert: Path) -> None:
    def gradients(dense: bool) -> list[Tensor]:
        model, batch = classifier(bert, "int8")
        if dense:
            dequantize(model.encoder)
        engine = Engine(model, searched("lora,rank=2", model), 100, run_seed=0)
        found = engine.gradient(batch, 0)[1]
        engine.close()
        return found

    held, dense = gradients(False), gradients(True)
    assert any(bool(gradient.any()) for gradient in held)
    for one, other in zip(held, dense, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["spsa,directions=2", "cmaes:SepCMA"])
def test_a_run_over_quantized_weights_replays_and_resumes_to_the_same_bits(
    spec: str, name: str, bert: Path, tmp_path: Path
) -> None:
    path, cut = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    _, after = run(bert, spec, "lora,rank=2", 80, path, dtype=name)
    again = searched("lora,rank=2", classifier(bert, name)[0])
    assert again.digest() != after.digest()
    assert Trajectory.read(path).replay(again) == after.digest()
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, resumed = run(bert, spec, "lora,rank=2", 80, cut, resume=True, dtype=name)
    assert resumed.digest() == after.digest()


@pytest.mark.parametrize("space", ["full", "projection,dimension=50"])
def test_a_space_that_moves_every_weight_is_refused(space: str, bert: Path) -> None:
    model, _ = classifier(bert, "int8")
    with pytest.raises(UserError, match=f"'{space.split(',')[0]}' moves every weight.*choose the space lora"):
        spaces.build(spaces.parse(space), model, 0)


@pytest.fixture(scope="module")
def command(bert: Path, table: Path) -> list[str]:
    columns = ["--text", "review", "--label", "verdict"]
    over = ["-S", "dtype=int8", "-S", "finetune.space=lora,rank=2", "-S", "pretrain.space=lora,rank=2"]
    return ["run", "--train", str(table), *columns, *over, *small(bert), "--name", "mine"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in 8 bits from start to end: its folder, and what it said."""
    home = tmp_path_factory.mktemp("whole")
    done = pipeline(*command, home=home)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "mine", done.stdout


def test_a_run_leaves_plain_weights_and_says_why_there_is_no_adamw(whole: tuple[Path, str]) -> None:
    folder, said = whole
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "adamw/accuracy" not in metrics
    assert "evaluate: AdamW is left out: it moves every weight, and dtype=int8 holds them" in said
    assert {"test/accuracy", "zero_shot/accuracy", "linear_probe/accuracy"} <= set(metrics)
    start = load_encoder(str(folder / "models" / "pretrained"), "int8")
    saved, info = AutoModel.from_pretrained(
        folder / "models" / "finetuned", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    moved = 0
    for path, layer in start.named_modules():
        if layer in set(quantized(start)):
            difference = saved.get_submodule(path).weight - layer.weight
            # what was held, and factors of rank 2 added to it
            moved += int(bool(difference.any()))
            assert int(torch.linalg.matrix_rank(difference, atol=1e-5)) <= 2
    assert moved
    assert pipeline("replay", "mine", home=folder.parent.parent).stdout.count("identical") == 2


def test_a_run_in_8_bits_that_was_cut_off_goes_on_to_the_same_weights(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(whole[0], run)
    building = partial(run / "models" / "finetuned")
    building.mkdir()
    lines = (run / "models" / "finetuned" / FILE).read_bytes()
    (building / FILE).write_bytes(lines[: len(lines) // 2])
    (building / START_FILE).write_bytes((run / "models" / "finetuned" / START_FILE).read_bytes())
    shutil.rmtree(run / "models" / "finetuned")
    done = pipeline("run", "--resume", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pretrain:" not in done.stdout
    files = [path.relative_to(whole[0]) for path in (whole[0] / "models").glob("finetuned/**/*.safetensors")]
    assert len(files) >= 3
    for file in files:
        assert (whole[0] / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.parametrize("section", ["finetune", "pretrain"])
def test_a_run_that_would_move_quantized_weights_ends_before_it_begins(
    section: str, command: list[str], tmp_path: Path
) -> None:
    refused = pipeline(*command, "-S", f"{section}.space=full", "--dry-run", home=tmp_path)
    assert refused.returncode == 2
    [line] = refused.stderr.strip().splitlines()
    assert "moves every weight" in line
    assert "dtype=float32" in line


def test_a_model_is_plain_again_after_training(bert: Path) -> None:
    model, batch = classifier(bert, "int4")
    searched("lora,rank=2", model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.ones_like(parameter))
        held: Any = model(batch)
        make_plain(model.encoder)
        torch.testing.assert_close(model(batch), held, rtol=1e-4, atol=1e-5)
    assert not list(quantized(model))
    assert not any("lora" in key for key, _ in model.named_parameters())
