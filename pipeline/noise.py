"""Directions as a pure function: (seed, element index) → value, with no generator state.

A direction can be had for any slice or set of elements on its own, in any order, on any device, and again
later, so a weight can be perturbed just before its layer runs and a whole run is its seeds and coefficients.

Each 64-bit seed gives two 32-bit keys (splitmix64, Steele et al. 2014). Element counters pass through two
rounds of a 32-bit mixer (``lowbias32``, Wellons 2018), one key before each, in int32 arithmetic that wraps
alike on every device. Rademacher takes one bit an element. Gaussian takes 16 and looks its value up among
65,536 quantiles of the normal law (so no value is beyond 4.4): no arithmetic in floating point that a device,
a compiler or a vector unit could round in its own way. Both have the same bits everywhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

VERSION = 3  # of the function itself: a trajectory made with another cannot be replayed
LAWS = ("rademacher", "gaussian")
DISTRIBUTIONS = (*LAWS, "sphere")  # the last is Gaussian, scaled to length √d as a whole: see `radius`
MAX_ELEMENTS = 2**32

_CHUNK = 2**20
_BLOCK = 32  # elements that a compiled kernel takes together: a word of signs, sixteen of normals
_WORTH_A_CALL = 2**12
_TOGETHER = 8  # directions added in one pass over memory
_PER_WORD = {"rademacher": 32, "gaussian": 2}  # elements that a 32-bit word gives
_SIGN_BIT = -(2**31)
_ONE_AS_BITS = 0x3F800000
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def direction(seed: int, start: int, count: int, law: str, device: torch.device) -> Tensor:
    """Elements ``start … start + count − 1`` of the direction of ``seed``: float32 ``[count]``.

    Every element has mean 0 and variance 1. ``law`` is one of ``LAWS``.
    """
    each = _PER_WORD[law]
    first, last = start // each, -(-(start + count) // each)
    words = _hash(torch.arange(first, last, device=device, dtype=torch.int64), seed)
    return _values(words, law).flatten()[start - first * each :][:count]


def directions(seeds: Sequence[int], start: int, count: int, law: str, device: torch.device) -> Tensor:
    """`direction` of many seeds at once: float32 ``[seeds, count]``."""
    each = _PER_WORD[law]
    first, last = start // each, -(-(start + count) // each)
    keys = torch.tensor([_keys(seed) for seed in seeds], dtype=torch.int32, device=device)
    words = torch.arange(first, last, device=device).to(torch.int32)  # wraps
    return _values(_keyed(words, keys[:, :1], keys[:, 1:]), law).flatten(1)[:, start - first * each :][
        :, :count
    ]


def add(
    values: Tensor, seed: int, start: int, law: str, scale: float, *, out: Tensor, fused: bool = False
) -> Tensor:
    """``out`` ← ``values`` + ``scale`` · z, all flat; z begins at ``start``. ``out`` may be ``values``.

    ``fused`` asks for one compiled pass over memory where there is a compiler: it costs little more than
    reading the values, and the bits are the same.
    """
    count = values.numel()
    if not fused or count < _WORTH_A_CALL:
        return _add_eagerly(values, seed, start, law, scale, out)
    # the compiled part begins and ends with a block
    before, after = -start % _BLOCK, (start + count) % _BLOCK
    whole = slice(before, count - after)
    if not _fused.add(values[whole], seed, start + before, law, scale, out[whole]):
        return _add_eagerly(values, seed, start, law, scale, out)
    if before:
        _add_eagerly(values[:before], seed, start, law, scale, out[:before])
    if after:
        _add_eagerly(values[-after:], seed, start + count - after, law, scale, out[-after:])
    return out


def add_all(
    values: Tensor,
    seeds: Sequence[int],
    start: int,
    law: str,
    scales: Sequence[float],
    *,
    fused: bool = False,
) -> Tensor:
    """`add` in place for each seed and scale in turn, to the same bits; several pass over memory together."""
    done = 0
    if fused and law == "rademacher":
        aligned = not start % _BLOCK and not values.numel() % _BLOCK and values.numel() >= _WORTH_A_CALL
        while aligned and done + _TOGETHER <= len(seeds):
            few = slice(done, done + _TOGETHER)
            if not _fused.add_signs_of_several(values, seeds[few], start, scales[few]):
                break
            done += _TOGETHER
    if values.numel() < _WORTH_A_CALL:
        for term in scaled(seeds, start, values.numel(), law, scales, values.device):
            values.add_(term)
        return values
    for seed, scale in zip(seeds[done:], scales[done:], strict=True):
        add(values, seed, start, law, scale, out=values, fused=fused)
    return values


def scaled(
    seeds: Sequence[int], start: int, count: int, law: str, scales: Sequence[float], device: torch.device
) -> Iterator[Tensor]:
    """Each seed's direction times its scale, float32 ``[count]``; many are drawn at once."""
    together = max(1, _CHUNK // count)
    for low in range(0, len(seeds), together):
        few = slice(low, low + together)
        z = directions(seeds[few], start, count, law, device)
        yield from z.mul_(torch.tensor(scales[few], dtype=torch.float32, device=device)[:, None])


def _add_eagerly(values: Tensor, seed: int, start: int, law: str, scale: float, out: Tensor) -> Tensor:
    for low in range(0, values.numel(), _CHUNK):
        part = slice(low, min(low + _CHUNK, values.numel()))
        z = direction(seed, start + low, part.stop - low, law, values.device)
        # scaled first: a product that is added in one rounding would have other bits
        out[part] = z.mul_(scale).add_(values[part])
    return out


def worth_fusing(elements: float) -> bool:
    """Whether a run that adds noise to so many elements in all gains from the compiled kernel.

    On CPU an element takes some 0.7 ns without it and 0.1 ns with it, and compiling takes up to 20 s.
    """
    return elements > 3e10


def rows(seed: int, start: int, rows: Tensor, columns: int, law: str) -> Tensor:
    """``rows`` (int64, any shape) of a matrix whose noise begins at ``start``: ``[*rows.shape, columns]``."""
    each = _PER_WORD[law]
    if not start % each and not columns % each:
        words = torch.arange(columns // each, device=rows.device) + start // each
        return _values(_hash(rows[..., None] * (columns // each) + words, seed), law).flatten(-2)
    return direction_at(
        seed, start + rows[..., None] * columns + torch.arange(columns, device=rows.device), law
    )


def direction_at(seed: int, indices: Tensor, law: str) -> Tensor:
    """The direction of ``seed`` at any ``indices`` (int64, any shape): float32 of that shape."""
    each = _PER_WORD[law]
    return _values(_hash(indices // each, seed), law).gather(-1, (indices % each)[..., None]).squeeze(-1)


def radius(seed: int, count: int, device: torch.device) -> float:
    """The length of the Gaussian direction of ``seed`` over elements ``0 … count − 1``."""
    on = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    square = torch.zeros((), dtype=torch.float64, device=on)
    for start in range(0, count, _CHUNK):
        part = direction(seed, start, min(_CHUNK, count - start), "gaussian", device)
        square += part.to(square.device).double().square().sum()
    return math.sqrt(float(square))


def words_at(seed: int, indices: Tensor) -> Tensor:
    """Raw 32-bit words at ``indices`` (int64): int32 of that shape."""
    return _hash(indices, seed)


def round_to(out: Tensor, values: Tensor, seed: int, start: int, *, fused: bool = False) -> Tensor:
    """``out`` (bfloat16 or float16) ← float32 ``values``, up or down at random so that the mean is the value.

    Steps below half a unit in the last place are lost to rounding to nearest; so, they add up (Gupta et al.
    2015, arXiv 1502.02551). Both are flat; the bits drawn are those of ``seed`` at elements ``start …``.
    ``fused`` is as in `add`.
    """
    count = values.numel()
    before, after = -start % _BLOCK, (start + count) % _BLOCK
    whole = slice(before, count - after)
    if (
        not fused
        or count < _WORTH_A_CALL
        or not _fused.round(out[whole], values[whole], seed, start + before)
    ):
        return _round_eagerly(out, values, seed, start)
    if before:
        _round_eagerly(out[:before], values[:before], seed, start)
    if after:
        _round_eagerly(out[-after:], values[-after:], seed, start + count - after)
    return out


def _round_eagerly(out: Tensor, values: Tensor, seed: int, start: int) -> Tensor:
    words = _hash(torch.arange(start, start + len(values), device=values.device), seed)
    return out.copy_(_rounded(values, words, out.dtype))


def derive(seed: int, *path: int) -> int:
    """A 63-bit seed for a purpose under ``seed``; different paths give unrelated seeds."""
    for part in path:
        seed = _splitmix64(seed ^ _splitmix64(part))
    return seed >> 1


def _values(words: Tensor, law: str) -> Tensor:
    """What int32 ``words`` hold, lowest bits first: float32 ``[*words.shape, 32 or 2]``."""
    return _signs(words) if law == "rademacher" else _normals(words)


def _signs(words: Tensor) -> Tensor:
    # a bit becomes the sign bit of a float 1.0: no conversion from integers is needed
    shifts = torch.arange(31, -1, -1, device=words.device, dtype=torch.int32)
    bits = words[..., None] << shifts
    return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_AS_BITS).view(torch.float32)


def _normals(words: Tensor) -> Tensor:
    halves = words.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return torch.index_select(_quantiles(words.device), 0, halves.flatten()).view(*words.shape, 2)


@cache
def _quantiles(device: torch.device) -> Tensor:
    """65,536 equally likely values whose mean is 0 and variance 1: float32, ascending."""
    upper = torch.special.ndtri(0.5 + (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**16)
    upper /= upper.square().mean().sqrt()
    return torch.cat((-upper.flip(0), upper)).float().to(device)


def _rounded(values: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``values`` of which ``dtype`` holds every bit; ``words`` are random int32."""
    dropped = 23 - _MANTISSA[dtype]  # bits of a float32 that the dtype has not
    # float16 has units of one size below its least normal number: there, its neighbour's are used
    least = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0
    lift = torch.where(values.abs() < least, torch.where(values < 0.0, -least, least), 0.0)
    bits = (values + lift).view(torch.int32) + (words & (2**dropped - 1))
    rounded: Tensor = (bits & -(2**dropped)).view(torch.float32) - lift
    return rounded


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


class _FusedKernels:
    """The compiled kernels, each made when first asked for; where they cannot be, False for good."""

    def __init__(self) -> None:
        self._made: dict[str, Callable[..., None]] = {}
        self.broken = False

    def add(self, values: Tensor, seed: int, start: int, law: str, scale: float, out: Tensor) -> bool:
        device = values.device
        keys = torch.tensor([*_keys(seed), start // _PER_WORD[law]], dtype=torch.int32).to(device)
        # what a word's bits stand for, scaled: a product in the kernel might be added in one rounding
        scaled = _quantiles(device) * scale if law == "gaussian" else torch.tensor(scale, device=device)
        # torch 2.13 compiles wrongly where an input that is written has a second name
        if out.data_ptr() == values.data_ptr():
            return self._ran(f"{law} in place", values.view(-1, _BLOCK), keys, scaled)
        return self._ran(law, values.view(-1, _BLOCK), keys, scaled, out.view(-1, _BLOCK))

    def add_signs_of_several(
        self, values: Tensor, seeds: Sequence[int], start: int, scales: Sequence[float]
    ) -> bool:
        first = start // _PER_WORD["rademacher"]
        keys = torch.tensor([[*_keys(seed), first] for seed in seeds], dtype=torch.int32)
        scaled = torch.tensor(scales, dtype=torch.float32)
        blocks = values.view(-1, _BLOCK)
        return self._ran("several", blocks, keys.to(values.device), scaled.to(values.device))

    def round(self, out: Tensor, values: Tensor, seed: int, start: int) -> bool:
        keys = torch.tensor([*_keys(seed), _int32(start)], dtype=torch.int32).to(values.device)
        return self._ran(f"round to {out.dtype}", values.view(-1, _BLOCK), keys, out.view(-1, _BLOCK))

    def _ran(self, name: str, *arguments: Tensor) -> bool:
        """Calls the kernel; False where it cannot be had."""
        if self.broken:
            return False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about its own modules
                self._kernel(name)(*arguments)
        except Exception as error:  # no compiler, or one that fails: the eager path has the same bits
            self.broken = True
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"noise is not compiled ({first}); going on slower", RuntimeWarning, stacklevel=3)
            return False
        return True

    def _kernel(self, name: str) -> Callable[..., None]:
        if name not in self._made:
            self._made[name] = torch.compile(_KERNELS[name], dynamic=True)
        return self._made[name]


def _add_signs(values: Tensor, keys: Tensor, scale: Tensor) -> None:
    values.copy_(values + _sign_blocks(values, keys) * scale)


def _add_signs_to(values: Tensor, keys: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(values + _sign_blocks(values, keys) * scale)


def _add_signs_of_several(values: Tensor, keys: Tensor, scales: Tensor) -> None:
    total = values
    for i in range(_TOGETHER):  # each product is exact, so an addition that takes it in rounds as one alone
        total = total + _sign_blocks(values, keys[i]) * scales[i]
    values.copy_(total)


def _add_normals(values: Tensor, keys: Tensor, scaled: Tensor) -> None:
    values.copy_(values + scaled[_half_word_blocks(values, keys)])


def _add_normals_to(values: Tensor, keys: Tensor, scaled: Tensor, out: Tensor) -> None:
    out.copy_(values + scaled[_half_word_blocks(values, keys)])


def _sign_blocks(values: Tensor, keys: Tensor) -> Tensor:
    words = torch.arange(values.shape[0], device=values.device, dtype=torch.int32) + keys[2]
    return _signs(_keyed(words, keys[0], keys[1]))


def _half_word_blocks(values: Tensor, keys: Tensor) -> Tensor:
    blocks = torch.arange(values.shape[0], device=values.device, dtype=torch.int32)
    within = torch.arange(16, device=values.device, dtype=torch.int32)
    words = _keyed(blocks[:, None] * 16 + within + keys[2], keys[0], keys[1])
    shifts = torch.arange(0, 32, 16, device=values.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xFFFF).flatten(1)


def _round_to(values: Tensor, keys: Tensor, out: Tensor) -> None:
    blocks = torch.arange(values.shape[0], device=values.device, dtype=torch.int32)
    within = torch.arange(_BLOCK, device=values.device, dtype=torch.int32)
    words = _keyed(blocks[:, None] * _BLOCK + within + keys[2], keys[0], keys[1])
    out.copy_(_rounded(values, words, out.dtype))


_KERNELS: dict[str, Callable[..., None]] = {
    "rademacher": _add_signs_to,
    "rademacher in place": _add_signs,
    "several": _add_signs_of_several,
    "gaussian": _add_normals_to,
    "gaussian in place": _add_normals,
    "round to torch.bfloat16": _round_to,
    "round to torch.float16": _round_to,
}
_fused = _FusedKernels()
