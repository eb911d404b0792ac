"""Sizes, moves and the random subspace, by their properties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import space as spaces
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.noise import direction
from pipeline.objective import cross_entropy
from pipeline.optimizer import Explicit, LowRank, Move, Seeded
from tests.test_engine import classifier, language_model, searched

CPU = torch.device("cpu")


def test_spaces_nest(bert: Path) -> None:
    sizes = {}
    for text in ("head", "biases", "full"):
        model, _ = classifier(bert)
        sizes[text] = searched(text, model).size
    assert sizes["head"] == 2 * 32 + 2
    assert sizes["head"] < sizes["biases"] < sizes["full"]
    model, _ = classifier(bert)
    assert sizes["full"] == sum(parameter.numel() for parameter in model.parameters())


def test_norms_are_found_by_what_they_are(folder_of: dict[str, Path]) -> None:
    model, _ = classifier(folder_of["bert"])
    layers = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    head = sum(parameter.numel() for parameter in model.head_parameters())
    assert searched("norms", model).size == head + sum(2 * 32 for _ in layers)
    llama = language_model(folder_of["llama"], "clm")[0]
    names = {tensor.name for tensor in searched("norms", llama).tensors if tensor.parameter.ndim == 1}
    assert names == {name for name, _ in llama.named_parameters() if "norm" in name}
    assert len(names) == 5  # two a layer, and the last


def test_lora_starts_where_the_model_is(bert: Path) -> None:
    model, batch = classifier(bert)
    with torch.inference_mode():
        before = model(batch)
        space = searched("lora,rank=2", model)
        torch.testing.assert_close(model(batch), before)
    assert all(".lora_" in t.name or t.name.startswith("classifier") for t in space.tensors)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("ful", "did you mean 'full'"),
        ("lora,rnk=2", "did you mean 'rank'"),
        ("lora,rank=0", "positive whole number"),
        ("lora,rank=1.5", "positive whole number"),
        ("head,rank=2", "takes no options"),
        ("full:x", "unknown space 'full:x'"),
    ],
)
def test_a_wrong_spec_is_one_line(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        spaces.parse(text)
    assert "\n" not in str(caught.value)


def test_a_seeded_value_is_the_weight_plus_scaled_noise(bert: Path) -> None:
    model, _ = classifier(bert)
    space = searched("full,encoder_scale=0.5", model)
    for searched_tensor in space.tensors:
        weight = searched_tensor.parameter.detach()
        z = direction(9, searched_tensor.offset, weight.numel(), "rademacher", CPU).view(weight.shape)
        scale = 1.0 if searched_tensor.name.startswith("classifier") else 0.5
        torch.testing.assert_close(space.value(searched_tensor, Seeded(9, 0.1)), weight + 0.1 * scale * z)


def test_tensors_of_one_shape_get_independent_noise(bert: Path) -> None:
    model, _ = classifier(bert)
    space = searched("full", model)
    alike = [t for t in space.tensors if t.name.endswith("query.weight")]
    first, second = (space.value(t, Seeded(1, 1.0)) - t.parameter.detach() for t in alike)
    assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5


def test_move_place_and_restore(bert: Path) -> None:
    model, _ = classifier(bert)
    space = searched("biases", model)
    start, saved = space.digest(), space.snapshot()
    space.move(Move([3], [0.25], "gaussian", 0.0))
    z = direction(3, 0, space.size, "gaussian", CPU)
    moved = torch.cat(
        [(t.parameter.detach() - s).flatten() for t, s in zip(space.tensors, saved, strict=True)]
    )
    torch.testing.assert_close(moved, 0.25 * z, rtol=1e-4, atol=1e-6)
    assert space.digest() != start
    space.restore(saved)
    assert space.digest() == start
    space.place(torch.zeros(space.size))
    assert space.digest() == start


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [False, True])
def test_many_moves_at_once_give_the_bits_of_each_alone(dtype: str, fused: bool, bert: Path) -> None:
    moves = [Move([i], [0.01 * i], "rademacher") for i in range(20)]
    moves += [Move([i, 7], [0.01, 0.02], "rademacher", decay=0.1 * (i % 2)) for i in range(4)]
    moves += [Move([i], [0.01], law) for i in range(3) for law in ("gaussian", "sphere")]
    moves += [Move([i], [0.01], "gaussian", low_rank=LowRank(2)) for i in range(3)]
    digests = []
    for together in (True, False):
        model, _ = classifier(bert, dtype)
        space = searched("full", model)
        space.fused = fused
        for group in [moves] if together else [[move] for move in moves]:
            space.move(*group)
        digests.append(space.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("low_rank", [None, LowRank(2, right_seed=1)])
def test_steps_too_small_for_half_precision_add_up(dtype: str, low_rank: LowRank | None, bert: Path) -> None:
    """Fifty equal steps, each a small share of the weights' last place."""
    moved = []
    for each in ("float32", dtype):
        model, _ = classifier(bert, each)
        if each == "float32":
            model.to(getattr(torch, dtype)).float()
        space = searched("full", model)
        before = torch.cat([old.flatten() for old in space.snapshot()]).float()
        for _ in range(50):
            space.move(Move([3], [2e-6], "rademacher", 0.0, low_rank))
        moved.append(torch.cat([new.flatten() for new in space.snapshot()]).float() - before)
    whole, half = moved
    assert float(whole.norm()) > 0
    assert float(half @ whole) / float(whole @ whole) == pytest.approx(1.0, abs=0.15)


def test_decay_spares_biases_and_norms(bert: Path) -> None:
    model, _ = classifier(bert)
    space = searched("full", model)
    before = space.snapshot()
    space.move(Move([], [], "rademacher", 0.1))
    for tensor, old in zip(space.tensors, before, strict=True):
        expected = old * 0.9 if old.dim() > 1 else old
        torch.testing.assert_close(tensor.parameter.detach(), expected)


def test_the_projection_has_orthogonal_columns_and_keeps_lengths(bert: Path) -> None:
    model, _ = classifier(bert)
    space = searched("projection,dimension=40", model)
    start = torch.cat([t.parameter.detach().flatten() for t in space.tensors])

    def displaced(coordinates: torch.Tensor) -> torch.Tensor:
        values = [space.value(t, Explicit(coordinates)) for t in space.tensors]
        return torch.cat([value.flatten() for value in values]).double() - start.double()

    columns = torch.stack([displaced(10.0 * row) / 10.0 for row in torch.eye(40)])
    gram = columns @ columns.T
    assert float((gram - torch.diag(gram.diag())).abs().max()) < 1e-4
    assert float(gram.diag().mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(gram.diag().std()) < 0.1


@pytest.mark.parametrize("text", ["projection,dimension=40", "full"])
def test_pieces_of_any_size_give_the_same_bits(
    text: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for size in (2**20, 100):
        for module in ("memory", "projection"):
            monkeypatch.setattr(f"pipeline.space.{module}.PIECE", size)
        space = searched(text, classifier(bert)[0])
        coordinates = torch.linspace(-0.1, 0.1, space.size)
        read = [space.value(each, Explicit(coordinates)) for each in space.tensors]
        space.place(coordinates)
        assert all(torch.equal(a, b.parameter) for a, b in zip(read, space.tensors, strict=True))
        digests.append(space.digest())
    assert digests[0] == digests[1]


def test_a_seeded_move_in_the_projection_is_a_place_of_its_coordinates(bert: Path) -> None:
    moved, _ = classifier(bert)
    placed, _ = classifier(bert)
    one, two = (searched("projection,dimension=40", model) for model in (moved, placed))
    one.move(Move([5], [0.3], "rademacher", 0.0))
    two.place(0.3 * direction(5, 0, 40, "rademacher", CPU))
    assert one.digest() == two.digest()
    one.move(Move([6], [0.2], "rademacher", 0.0))
    two.place(0.3 * direction(5, 0, 40, "rademacher", CPU) + 0.2 * direction(6, 0, 40, "rademacher", CPU))
    assert one.digest() == two.digest()


@pytest.mark.parametrize("low_rank", [LowRank(1), LowRank(3), LowRank(2, right_seed=9)])
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_a_low_rank_direction_has_unit_variance_and_is_the_one_moved_along(
    low_rank: LowRank, law: str, bert: Path
) -> None:
    model, _ = classifier(bert)
    space = searched("full", model)
    before = space.snapshot()
    values = torch.cat(
        [
            (space.value(tensor, Seeded(seed, 1.0, law, low_rank)) - weight).flatten()
            for seed in range(6)
            for tensor, weight in zip(space.tensors, before, strict=True)
        ]
    )
    assert float(values.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(values.square().mean()) == pytest.approx(1.0, abs=0.05)
    expected = [space.value(tensor, Seeded(4, 0.5, law, low_rank)) for tensor in space.tensors]
    space.move(Move([4], [0.5], law, low_rank=low_rank))
    for tensor, value in zip(space.tensors, expected, strict=True):
        torch.testing.assert_close(tensor.parameter.detach(), value, rtol=1e-5, atol=1e-5)


def test_low_rank_estimates_average_to_the_gradient(bert: Path) -> None:
    model, batch = classifier(bert)
    space = searched("head", model)
    parameters = [tensor.parameter for tensor in space.tensors]
    truth = torch.autograd.grad(cross_entropy(model(batch), batch.targets), parameters)
    engine = Engine(model, space, 10**6, run_seed=0)
    before, epsilon, low_rank, seeds = space.snapshot(), 1e-2, LowRank(2), range(3000)
    scales = [epsilon, -epsilon]
    losses = engine.losses(batch, [Seeded(s, e, "gaussian", low_rank) for s in seeds for e in scales])
    slopes = [(plus - minus) / (2 * epsilon) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
    space.move(Move(seeds, [slope / len(seeds) for slope in slopes], "gaussian", low_rank=low_rank))
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])
    gradient = torch.cat([g.flatten() for g in truth])
    assert float(torch.cosine_similarity(moved, gradient, dim=0)) > 0.95
    assert float(moved @ gradient / gradient.square().sum()) == pytest.approx(1.0, abs=0.1)


def test_weights_of_another_dtype_are_refused(bert: Path) -> None:
    model, _ = classifier(bert)
    with pytest.raises(UserError, match="is float64, which is not searched: set dtype=float32"):
        searched("full", model.double())
