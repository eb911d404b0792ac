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

import torch
from torch import Tensor

VERSION = 1  # of the function itself: a trajectory made with another cannot be replayed
DISTRIBUTIONS = ("rademacher", "gaussian")
MAX_ELEMENTS = 2**32

_SIGN_BIT = -(2**31)
_ONE_AS_BITS = 0x3F800000


def direction(seed: int, start: int, count: int, distribution: str, device: torch.device) -> Tensor:
    """Elements ``start … start + count − 1`` of the direction of ``seed``: float32 ``[count]``.

    Every element has mean 0 and variance 1. ``distribution`` is ``rademacher`` or ``gaussian``.
    """
    if distribution == "rademacher":
        first, last = start >> 5, (start + count + 31) >> 5
        words = _hash(torch.arange(first, last, device=device, dtype=torch.int64), seed)
        # bit k of a word becomes the sign bit of a float 1.0: no conversion from integers is needed
        shifts = torch.arange(31, -1, -1, device=device, dtype=torch.int32)
        bits = words[:, None] << shifts
        bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_AS_BITS)
        return bits.view(torch.float32).flatten()[start - (first << 5) :][:count]
    first, last = start >> 1, (start + count + 1) >> 1
    pairs = torch.arange(first, last, device=device, dtype=torch.int64)
    radius, angle = _polar(pairs, seed)
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten()[start - (first << 1) :][:count]


def direction_at(seed: int, indices: Tensor, distribution: str) -> Tensor:
    """The direction of ``seed`` at any ``indices`` (int64, any shape): float32 of that shape."""
    if distribution == "rademacher":
        words = _hash(indices >> 5, seed)
        bits = words << (31 - (indices & 31)).to(torch.int32)
        return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_AS_BITS).view(torch.float32)
    radius, angle = _polar(indices >> 1, seed)
    return radius * torch.where((indices & 1).bool(), torch.sin(angle), torch.cos(angle))


def words_at(seed: int, indices: Tensor) -> Tensor:
    """Raw 32-bit words at ``indices`` (int64): int32 of that shape."""
    return _hash(indices, seed)


def derive(seed: int, *path: int) -> int:
    """A 63-bit seed for a purpose under ``seed``; different paths give unrelated seeds."""
    for part in path:
        seed = _splitmix64(seed ^ _splitmix64(part))
    return seed >> 1


def _polar(pairs: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Radius and angle of Box–Muller for each pair counter."""
    first, second = _hash(pairs * 2, seed), _hash(pairs * 2 + 1, seed)
    scale = 2.0**-24
    uniform = (((first >> 8) & 0xFFFFFF).float() + 1.0) * scale  # (0, 1]: its logarithm is finite
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius, ((second >> 8) & 0xFFFFFF).float() * (2.0 * math.pi * scale)


def _hash(counters: Tensor, seed: int) -> Tensor:
    key = _splitmix64(seed)
    x = counters.to(torch.int32)  # wraps
    x = x + _int32(key & 0xFFFFFFFF)
    _mix(x)
    x.bitwise_xor_(_int32(key >> 32))
    _mix(x)
    return x


def _mix(x: Tensor) -> None:
    """``lowbias32`` in place; int32 shifts are arithmetic, so the sign's copies are masked off."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(_int32(0x846CA68B))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(unsigned: int) -> int:
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def _splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
