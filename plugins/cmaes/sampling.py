"""The normal vectors of a generation, from a seed: of any candidate or span of coordinates, at any time.

A generation of a large space is never held: what ``ask`` used is drawn again in ``tell``. A small one is kept
between the two, for speed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline import noise

HELD = 2**23  # numbers of a generation that are drawn at once and kept
_DRAWN = 2**18  # numbers drawn at once of one that is not: what a cache holds
_PATH = 11  # to the seeds of this module


class Samples:
    """z of some candidates, ``[λ, n]``, given as they are; or, in `Generation`, drawn."""

    held: bool = True
    """Whether all of it is in memory at once."""

    def __init__(self, z: Tensor) -> None:
        self._z = z

    @property
    def spans(self) -> Iterator[slice]:
        """Coordinates to be read together, in turn."""
        return iter((slice(0, self._z.shape[1]),))

    def block(self, span: slice) -> Tensor:
        """z of all candidates in a span of coordinates: ``[λ, count]``; not to be written to."""
        return self._z[:, span]

    def weighted(self, weights: Tensor, out: Tensor) -> Tensor:
        """``out`` ← Σ weightᵢ zᵢ, ``[n]``."""
        for span in self.spans:
            torch.mv(self.block(span).T, weights, out=out[span])
        return out


class Generation(Samples):
    """z of every candidate, ``[λ, n]`` normal numbers, by spans of coordinates.

    ``mirrored`` candidates come in pairs z, −z (Brockhoff et al. 2010, doi 10.1007/978-3-642-15844-5_2).
    ``orthogonal`` ones are turned to be so within blocks of at most n, each of the length it had (Wang,
    Emmerich and Bäck 2014, doi 10.1109/CEC.2014.6900280). All of it is ``held`` at once where it is small, or
    where asked for; orthogonal samples are, since each is made of all.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int],
        like: Tensor,
        *,
        mirrored: bool = False,
        orthogonal: bool = False,
        held: bool = False,
    ) -> None:
        self.shape = shape
        self.held = held or orthogonal or shape[0] * shape[1] <= HELD
        count = -(-shape[0] // 2) if mirrored else shape[0]
        self._seeds = [noise.derive(seed, i) for i in range(count)]
        self._like = like
        self._mirrored, self._orthogonal = mirrored, orthogonal
        self._whole: Tensor | None = None

    @property
    def spans(self) -> Iterator[slice]:
        step = self.shape[1] if self.held else max(1, _DRAWN // len(self._seeds))
        return (slice(low, min(low + step, self.shape[1])) for low in range(0, self.shape[1], step))

    def block(self, span: slice) -> Tensor:
        if not self.held:
            return self._drawn(self._seeds, span)
        if self._whole is None:
            self._whole = self._drawn(self._seeds, slice(0, self.shape[1]))
        return self._whole[:, span]

    def row(self, index: int) -> Tensor:
        """z of one candidate, drawn: ``[n]``."""
        pair, sign = (index // 2, 1 - 2 * (index % 2)) if self._mirrored else (index, 1)
        z = torch.empty_like(self._like)
        for low in range(0, len(z), _DRAWN):
            part = z[low : low + _DRAWN]
            part.copy_(noise.direction(self._seeds[pair], low, len(part), "gaussian", z.device))
        return z if sign > 0 else z.neg_()

    def _drawn(self, seeds: Sequence[int], span: slice) -> Tensor:
        z = noise.directions(seeds, span.start, span.stop - span.start, "gaussian", self._like.device)
        z = z.to(self._like.dtype)
        if self._orthogonal:
            z = torch.cat(
                [_orthogonal(z[low : low + self.shape[1]]) for low in range(0, len(z), self.shape[1])]
            )
        return torch.stack((z, -z), 1).flatten(0, 1)[: self.shape[0]] if self._mirrored else z


def generation_seed(run_seed: int, restart: int, generation: int) -> int:
    """The seed of a generation's noise."""
    return noise.derive(run_seed, _PATH, restart, generation)


def _orthogonal(z: Tensor) -> Tensor:
    """Rows turned to be orthogonal, ``[at most n, n]``, each as long as it was."""
    axes, upper = torch.linalg.qr(z.cpu().double().T)
    # an axis may come out backwards: the first row keeps its direction, as all do where they were orthogonal
    axes = axes * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    turned: Tensor = axes.T.to(z) * z.norm(dim=1, keepdim=True)
    return turned
