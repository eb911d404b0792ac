"""Checked against statistics, against itself on slices, and across devices."""

from __future__ import annotations

import shutil

import pytest
import torch
from scipy import stats

from pipeline import noise

CPU = torch.device("cpu")
N = 200_000


@pytest.mark.parametrize("distribution", noise.LAWS)
def test_mean_is_zero_and_variance_one(distribution: str) -> None:
    z = noise.direction(7, 0, N, distribution, CPU).double()
    assert abs(float(z.mean())) < 5 / N**0.5
    assert float(z.var()) == pytest.approx(1.0, abs=0.02)


def test_rademacher_is_plus_or_minus_one() -> None:
    assert set(noise.direction(3, 5, 1000, "rademacher", CPU).tolist()) == {-1.0, 1.0}


def test_gaussian_is_gaussian() -> None:
    z = noise.direction(3, 0, N, "gaussian", CPU)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("distribution", noise.LAWS)
@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 64), (31, 2), (32, 33), (77, 500), (999, 1)])
def test_a_slice_is_the_slice_of_the_whole(distribution: str, start: int, count: int) -> None:
    whole = noise.direction(11, 0, 1000, distribution, CPU)
    part = noise.direction(11, start, count, distribution, CPU)
    assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("distribution", noise.LAWS)
def test_any_set_of_indices_is_the_whole_at_them(distribution: str) -> None:
    whole = noise.direction(11, 0, 1000, distribution, CPU)
    indices = torch.tensor([[5, 999], [0, 32]])
    picked = noise.direction_at(11, indices, distribution)
    assert torch.equal(picked, whole[indices])


@pytest.mark.parametrize("distribution", noise.LAWS)
@pytest.mark.parametrize(("seed", "start"), [(1, 0), (2, 0), (2**32, 0), (0, N), (0, 32), (0, 33)])
def test_other_seeds_and_offsets_are_uncorrelated(distribution: str, seed: int, start: int) -> None:
    first = noise.direction(0, 0, N, distribution, CPU)
    second = noise.direction(seed, start, N, distribution, CPU)
    assert abs(float((first * second).mean())) < 5 / N**0.5


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("count", [1, 33, 770])
@pytest.mark.parametrize("start", [0, 5, 64])
def test_many_directions_are_each_its_own(law: str, start: int, count: int) -> None:
    seeds = [3, 2**61, 7]
    many = noise.directions(seeds, start, count, law, CPU)
    each = torch.stack([noise.direction(seed, start, count, law, CPU) for seed in seeds])
    assert torch.equal(many, each)


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize(("start", "columns"), [(64, 32), (64, 96), (7, 32), (64, 5)])
def test_rows_are_those_of_the_whole(law: str, start: int, columns: int) -> None:
    whole = noise.direction(11, start, 20 * columns, law, CPU).view(20, columns)
    picked = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(noise.rows(11, start, picked, columns, law), whole[picked])


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("law", "start", "count"),
    [(law, start, count) for law in noise.LAWS for start, count in ((64, 6400), (5, 7777), (4, 77))],
)
def test_one_fused_pass_has_the_bits_of_the_eager_one(
    dtype: torch.dtype, law: str, start: int, count: int
) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    eager = noise.add(values, 2**61 + 5, start, law, 1e-3, out=torch.empty_like(values))
    fused = noise.add(values, 2**61 + 5, start, law, 1e-3, out=torch.empty_like(values), fused=True)
    inplace = values.clone()
    noise.add(inplace, 2**61 + 5, start, law, 1e-3, out=inplace, fused=True)
    assert torch.equal(inplace, eager)
    assert not noise._fused.broken
    assert eager.dtype == dtype
    assert torch.equal(eager, fused)
    z = noise.direction(2**61 + 5, start, count, law, CPU)
    assert torch.equal(eager, (values.float() + 1e-3 * z).to(dtype))


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("fused", [False, bool(shutil.which("g++"))])
@pytest.mark.parametrize(("start", "count"), [(0, 770), (64, 6400), (5, 7777)])
def test_several_directions_add_up_as_one_by_one(law: str, fused: bool, start: int, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    seeds, scales = list(range(19)), [0.1 * (i - 7) for i in range(19)]
    expected = values.clone()
    for seed, scale in zip(seeds, scales, strict=True):
        noise.add(expected, seed, start, law, scale, out=expected)
    assert torch.equal(noise.add_all(values, seeds, start, law, scales, fused=fused), expected)


HALVES = [torch.bfloat16, torch.float16]


def _examples() -> torch.Tensor:
    """Values of every size that half precision has, subnormal ones of float16 included."""
    sizes = 10.0 ** torch.linspace(-7, 4, 2000)
    return torch.cat((sizes, -sizes, torch.zeros(3)))


@pytest.mark.parametrize("dtype", HALVES)
def test_random_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(dtype: torch.dtype) -> None:
    values, repeats = _examples(), 400
    total = torch.zeros(len(values), dtype=torch.float64)
    # the two numbers of the dtype around each value
    nearest = values.to(dtype)
    away = torch.where(nearest.float() < values, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, away).double()
    unit = (nearest.double() - other).abs()
    for seed in range(repeats):
        found = noise.round_to(torch.empty_like(nearest), values, seed, 0)
        assert bool(((found == nearest) | (found.double() == other)).all())
        total += found.double()
    error = (total / repeats - values.double()).abs() / unit
    assert float(error.max()) < 5 * 0.5 / repeats**0.5
    assert float(error.mean()) < 0.5 / repeats**0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_random_rounding_leaves_what_needs_none_and_is_a_function_of_the_index(dtype: torch.dtype) -> None:
    def rounded(values: torch.Tensor, seed: int, start: int) -> torch.Tensor:
        return noise.round_to(torch.empty_like(values, dtype=dtype), values, seed, start)

    exact = _examples().to(dtype)
    assert torch.equal(rounded(exact.float(), 3, 5), exact)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, 7, 100)
    for start, stop in ((0, 333), (333, 334), (334, 1000)):
        assert torch.equal(rounded(values[start:stop], 7, 100 + start), whole[start:stop])
    assert not torch.equal(rounded(values, 8, 100), whole)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("start", "count"), [(64, 6400), (5, 7777), (4, 77)])
def test_compiled_random_rounding_has_the_bits_of_the_eager_one(
    dtype: torch.dtype, start: int, count: int
) -> None:
    values = _examples().repeat(2)[:count]
    eager = noise.round_to(torch.empty_like(values, dtype=dtype), values, 9, start)
    fused = noise.round_to(torch.empty_like(values, dtype=dtype), values, 9, start, fused=True)
    assert not noise._fused.broken
    assert torch.equal(eager, fused)


def test_without_a_compiler_the_eager_path_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(noise, "_fused", noise._FusedKernels())
    monkeypatch.setattr(torch, "compile", no_compiler)
    values = torch.zeros(6400)
    with pytest.warns(RuntimeWarning, match="no working"):
        noise.add(values, 1, 0, "rademacher", 1.0, out=values, fused=True)
    assert torch.equal(values, noise.direction(1, 0, 6400, "rademacher", CPU))


def test_derived_seeds_differ_by_path() -> None:
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    assert len({noise.derive(5, *path) for path in paths}) == len(paths)


def test_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    noise.direction(1, 0, 100, "gaussian", CPU)
    assert torch.equal(before, torch.get_rng_state())
