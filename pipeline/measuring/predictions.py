"""What a classifier says of held-out examples, and the figures of it that a person reads.

A single figure of classes is a function of a few sums over the examples; a bootstrap interval is the same
function of the sums over examples drawn again, all resamples at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.measuring.resampling import Statistic, interval, resampled

BINS = 15  # of the calibration error, as in Guo et al. 2017
RESAMPLED = ("f1", "mcc")  # whose intervals are of examples drawn again
MINIMISED = ("loss", "calibration_error")  # figures of which less is better


@dataclass(frozen=True)
class Predictions:
    """Of each target its class and the one predicted, both int64 ``[targets]``.

    ``losses`` (nats) and ``confidences``, the probabilities of what was predicted, are float32 ``[targets]``;
    None where there are no probabilities.
    """

    targets: Tensor
    predicted: Tensor
    losses: Tensor | None = None
    confidences: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Predictions:
        """What logits ``[targets, classes]`` predict, on the CPU."""
        logits = logits.float()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        confidences = (logits.amax(-1) - logits.logsumexp(-1)).exp()
        return cls(targets.cpu(), logits.argmax(-1).cpu(), losses.cpu(), confidences.cpu())

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """All of ``parts``, which have probabilities, in a row."""
        of_each = [(each.targets, each.predicted, each.losses, each.confidences) for each in parts]
        return cls(*(torch.cat(column) for column in zip(*of_each, strict=True)))

    @property
    def hits(self) -> Tensor:
        """Whether each target was predicted: bool ``[targets]``."""
        return self.predicted == self.targets

    def loss_and_accuracy(self) -> dict[str, float]:
        """``loss`` (nats; left out where there are no probabilities) and ``accuracy``."""
        loss = {} if self.losses is None else {"loss": float(self.losses.double().mean())}
        return {**loss, "accuracy": float(self.hits.double().mean())}

    def figures(self) -> dict[str, float]:
        """`loss_and_accuracy`, ``f1``, ``mcc`` and, where there are probabilities, ``calibration_error``.

        ``f1`` is macro F1, the mean over the classes that are a target or predicted; ``mcc`` is Matthews'
        correlation coefficient for several classes (Gorodkin 2004), 0 where all targets or all predictions
        are alike. Both are as scikit-learn has them. ``calibration_error`` is the expected calibration error:
        the mean distance between accuracy and confidence in ``BINS`` bins of equal width (Guo et al. 2017).
        """
        [values] = self._statistic()(np.ones((1, len(self.targets))))
        calibration = {} if self.confidences is None else {"calibration_error": self._calibration_error()}
        return self.loss_and_accuracy() | dict(zip(RESAMPLED, map(float, values), strict=True)) | calibration

    def figures_with_intervals(self) -> dict[str, float]:
        """`figures`, with the bounds of 95% intervals: ``accuracy_low``, ``_high``.

        Wilson's (1927) of the accuracy; of ``f1`` and ``mcc``, of examples drawn again. None of the loss; nor
        of ``calibration_error``, to which the noise of a bin is an error: examples drawn again have more of
        it, and their interval may leave the figure itself out.
        """
        lows, highs = interval(resampled(len(self.targets), self._statistic()))
        bounds = {"accuracy": self._wilson()} | {
            name: (float(low), float(high)) for name, low, high in zip(RESAMPLED, lows, highs, strict=True)
        }
        found: dict[str, float] = {}
        for name, value in self.figures().items():
            found[name] = value
            if name in bounds:
                found[f"{name}_low"], found[f"{name}_high"] = bounds[name]
        return found

    def _wilson(self) -> tuple[float, float]:
        from scipy.stats import binomtest

        bounds = binomtest(int(self.hits.sum()), len(self.hits)).proportion_ci(0.95, method="wilson")
        return float(bounds.low), float(bounds.high)

    def _statistic(self) -> Statistic:
        """``RESAMPLED``'s values ``[resamples, names]`` as a function of how often each example counts."""
        true, predicted = self.targets.numpy(), self.predicted.numpy()
        classes, places = np.unique(np.concatenate((true, predicted)), return_inverse=True)
        hits = self.hits.numpy().astype(float)
        ones = np.ones_like(hits)
        tables = [
            _table(places[: len(true)], ones, len(classes)),
            _table(places[len(true) :], ones, len(classes)),
            _table(places[: len(true)], hits, len(classes)),
        ]

        def statistic(draws: NDArray[np.float64]) -> NDArray[np.float64]:
            counts = [draws @ table for table in tables]
            return np.stack([_f1(*counts), _mcc(*counts)], -1)

        return statistic

    def _calibration_error(self) -> float:
        """How much surer than right the examples of a bin are, which holds its upper bound; over all bins."""
        assert self.confidences is not None
        confidences, hits = self.confidences.double().numpy(), self.hits.numpy().astype(float)
        bins = np.ceil(np.nan_to_num(confidences) * BINS).astype(int) - 1
        gaps = np.bincount(bins.clip(0, BINS - 1), confidences - hits, BINS)
        return float(np.abs(gaps).sum() / len(hits))


def _table(columns: NDArray[np.int64], values: NDArray[np.float64], width: int) -> csr_array:
    """``[examples, width]``: each example's value, in its column."""
    return csr_array((values, (np.arange(len(columns)), columns)), shape=(len(columns), width))


def _f1(
    true: NDArray[np.float64], predicted: NDArray[np.float64], hits: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of counts ``[resamples, classes]``: how often each class is a target, is predicted, and is both."""
    either = true + predicted
    mean: NDArray[np.float64] = (2 * hits / np.maximum(either, 1)).sum(-1) / (either > 0).sum(-1)
    return mean


def _mcc(
    true: NDArray[np.float64], predicted: NDArray[np.float64], hits: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of the counts that `_f1` takes."""
    count = true.sum(-1)
    spread = (count**2 - (true**2).sum(-1)) * (count**2 - (predicted**2).sum(-1))
    together = hits.sum(-1) * count - (true * predicted).sum(-1)
    found: NDArray[np.float64] = np.divide(
        together, np.sqrt(spread), out=np.zeros_like(count), where=spread > 0
    )
    return found
