"""Directions as a pure function: (seed, element index) → value, with no generator state.

A direction can be had for any slice or set of elements on its own, in any order, on any device, and again
later, so a weight can be perturbed just before its layer runs and a whole run is its seeds and coefficients.

Each 64-bit seed gives two 32-bit keys (splitmix64, Steele et al. 2014). Element counters pass through two
rounds of a 32-bit mixer (``lowbias32``, Wellons 2018), one key before each, in int32 arithmetic that wraps
alike on every device. Rademacher takes one bit an element, so its values have equal bits everywhere; Gaussian
is Box–Muller in float32, whose last bit may differ between devices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VERSION = 1  # of the function itself: a trajectory made with another cannot be replayed
LAWS = ("rademacher", "gaussian")
DISTRIBUTIONS = (*LAWS, "sphere")  # the last is Gaussian, scaled to length √d as a whole: see `radius`
MAX_ELEMENTS = 2**32

_CHUNK = 2**20
_SIGN_BIT = -(2**31)
_ONE_AS_BITS = 0x3F800000


def direction(seed: int, start: int, count: int, distribution: str, device: torch.device) -> Tensor:
    """Elements ``start … start + count − 1`` of the direction of ``seed``: float32 ``[count]``.

    Every element has mean 0 and variance 1. ``distribution`` is one of ``LAWS``.
    """
    if distribution == "rademacher":
        first, last = start >> 5, (start + count + 31) >> 5
        words = _hash(torch.arange(first, last, device=device, dtype=torch.int64), seed)
        return _signs(words).flatten()[start - (first << 5) :][:count]
    assert distribution == "gaussian", distribution
    first, last = start >> 1, (start + count + 1) >> 1
    pairs = torch.arange(first, last, device=device, dtype=torch.int64)
    radius, angle = _polar(_hash(pairs * 2, seed), _hash(pairs * 2 + 1, seed))
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten()[start - (first << 1) :][:count]


def directions(seeds: Sequence[int], count: int, law: str, device: torch.device) -> Tensor:
    """The first ``count`` elements of many directions at once: float32 ``[seeds, count]``.

    A Gaussian element may differ from `direction`'s in its last bit.
    """
    keys = torch.tensor([_keys(seed) for seed in seeds], dtype=torch.int32, device=device)
    first, second = keys[:, :1], keys[:, 1:]
    if law == "rademacher":
        words = torch.arange((count + 31) >> 5, device=device, dtype=torch.int32)
        return _signs(_keyed(words, first, second)).flatten(1)[:, :count]
    assert law == "gaussian", law
    doubled = 2 * torch.arange((count + 1) >> 1, device=device, dtype=torch.int32)
    radius, angle = _polar(_keyed(doubled, first, second), _keyed(doubled + 1, first, second))
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :count]


def add(
    values: Tensor, seed: int, start: int, law: str, scale: float, *, out: Tensor, fused: bool = False
) -> Tensor:
    """``out`` ← ``values`` + ``scale`` · z; z's elements begin at ``start``. ``out`` may be ``values``.

    ``fused`` asks for one compiled pass over memory where that is possible (``rademacher``, aligned to words,
    a compiler): it costs little more than reading the values, and the bits are the same.
    """
    aligned = not (start | values.numel()) & 31
    if fused and aligned and law == "rademacher" and _fused.add(values, seed, start >> 5, scale, out):
        return out
    z = direction(seed, start, values.numel(), law, values.device)
    return out.copy_(torch.add(values, z.view(values.shape), alpha=scale))


def worth_fusing(elements: float) -> bool:
    """Whether a run that adds noise to so many elements in all gains from the compiled kernel.

    On CPU an element takes some 0.7 ns without it and 0.1 ns with it, and compiling takes up to 20 s.
    """
    return elements > 3e10


def rows(seed: int, start: int, rows: Tensor, columns: int, law: str) -> Tensor:
    """``rows`` (int64, any shape) of a matrix whose noise begins at ``start``: ``[*rows.shape, columns]``."""
    if law == "rademacher" and not (start | columns) & 31:
        words = torch.arange(columns >> 5, device=rows.device) + (start >> 5)
        return _signs(_hash(rows[..., None] * (columns >> 5) + words, seed)).flatten(-2)
    return direction_at(
        seed, start + rows[..., None] * columns + torch.arange(columns, device=rows.device), law
    )


def direction_at(seed: int, indices: Tensor, distribution: str) -> Tensor:
    """The direction of ``seed`` at any ``indices`` (int64, any shape): float32 of that shape."""
    if distribution == "rademacher":
        words = _hash(indices >> 5, seed)
        bits = words << (31 - (indices & 31)).to(torch.int32)
        return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_AS_BITS).view(torch.float32)
    even = indices & ~1
    radius, angle = _polar(_hash(even, seed), _hash(even + 1, seed))
    return radius * torch.where((indices & 1).bool(), torch.sin(angle), torch.cos(angle))


def radius(seed: int, count: int, device: torch.device) -> float:
    """The length of the Gaussian direction of ``seed`` over elements ``0 … count − 1``."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, count, _CHUNK):
        part = direction(seed, start, min(_CHUNK, count - start), "gaussian", device)
        square += part.double().square().sum()
    return math.sqrt(float(square))


def words_at(seed: int, indices: Tensor) -> Tensor:
    """Raw 32-bit words at ``indices`` (int64): int32 of that shape."""
    return _hash(indices, seed)


def derive(seed: int, *path: int) -> int:
    """A 63-bit seed for a purpose under ``seed``; different paths give unrelated seeds."""
    for part in path:
        seed = _splitmix64(seed ^ _splitmix64(part))
    return seed >> 1


def _polar(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of Box–Muller from two int32 words each."""
    scale = 2.0**-24
    uniform = (((first >> 8) & 0xFFFFFF).float() + 1.0) * scale  # (0, 1]: its logarithm is finite
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius, ((second >> 8) & 0xFFFFFF).float() * (2.0 * math.pi * scale)


def _signs(words: Tensor) -> Tensor:
    """±1 for each bit of int32 ``words``, lowest first: float32 ``[*words.shape, 32]``."""
    # a bit becomes the sign bit of a float 1.0: no conversion from integers is needed
    shifts = torch.arange(31, -1, -1, device=words.device, dtype=torch.int32)
    bits = words[..., None] << shifts
    return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_AS_BITS).view(torch.float32)


def _hash(counters: Tensor, seed: int) -> Tensor:
    return _keyed(counters.to(torch.int32), *_keys(seed))  # wraps


def _keys(seed: int) -> tuple[int, int]:
    key = _splitmix64(seed)
    return _int32(key & 0xFFFFFFFF), _int32(key >> 32)


def _keyed(x: Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    return _mix(_mix(x + first).bitwise_xor_(second))


def _mix(x: Tensor) -> Tensor:
    """``lowbias32`` in place; int32 shifts are arithmetic, so the sign's copies are masked off."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_int32(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(unsigned: int) -> int:
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def _splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


class _FusedKernel:
    """The compiled kernels, made when first asked for; where they cannot be, it answers False for good."""

    def __init__(self) -> None:
        self._kernels: tuple[Callable[..., None], Callable[..., None]] | None = None
        self.broken = False

    def add(self, values: Tensor, seed: int, first_word: int, scale: float, out: Tensor) -> bool:
        if self.broken:
            return False
        keys = torch.tensor([*_keys(seed), first_word], dtype=torch.int32).to(values.device)
        arguments = (values.view(-1, 32), keys, torch.tensor(scale))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about its own modules
                if self._kernels is None:
                    self._kernels = torch.compile(_add, dynamic=True), torch.compile(_add_to, dynamic=True)
                # torch 2.13 compiles wrongly where an input that is written has a second name
                if out.data_ptr() == values.data_ptr():
                    self._kernels[0](*arguments)
                else:
                    self._kernels[1](*arguments, out.view(-1, 32))
        except Exception as error:  # no compiler, or one that fails: the eager path has the same bits
            self.broken = True
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"noise is not compiled ({first}); going on slower", RuntimeWarning, stacklevel=2)
            return False
        return True


def _add(values: Tensor, keys: Tensor, scale: Tensor) -> None:
    values.copy_(values + _noise_like(values, keys) * scale)


def _add_to(values: Tensor, keys: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(values + _noise_like(values, keys) * scale)


def _noise_like(values: Tensor, keys: Tensor) -> Tensor:
    words = torch.arange(values.shape[0], device=values.device, dtype=torch.int32) + keys[2]
    return _signs(_keyed(words, keys[0], keys[1]))


_fused = _FusedKernel()
