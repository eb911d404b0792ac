"""Figures of classes: held against scikit-learn, their definitions, and explicit resamples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

from pipeline.measuring import resampling
from pipeline.measuring.predictions import BINS, Predictions


def drawn(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that know something of their targets, of which some classes are rare."""
    generator = torch.Generator().manual_seed(seed)
    rare = torch.rand(classes, generator=generator) ** 3 + 0.01
    targets = torch.multinomial(rare, count, replacement=True, generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), targets] += 1.0
    return logits, targets


def expected_calibration_error(confidences: Any, hits: Any) -> float:
    """By the letter of Guo et al. 2017, equation 3."""
    total = 0.0
    for m in range(1, BINS + 1):
        within = (confidences > (m - 1) / BINS) & (confidences <= m / BINS)
        if within.any():
            total += within.sum() / len(hits) * abs(hits[within].mean() - confidences[within].mean())
    return total


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (50, 2), (300, 3), (300, 40)])
def test_figures_are_scikit_learns_and_the_papers(count: int, classes: int) -> None:
    logits, targets = drawn(count, classes)
    made = Predictions.of(logits, targets)
    figures = made.figures()
    true, predicted = targets.numpy(), logits.argmax(-1).numpy()
    assert figures["f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert figures["mcc"] == pytest.approx(matthews_corrcoef(true, predicted))
    confidences = logits.double().softmax(-1).amax(-1).numpy()
    expected = expected_calibration_error(confidences, predicted == true)
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits.double(), targets)
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert figures["accuracy"] == (predicted == true).mean()
    assert list(figures) == ["loss", "accuracy", "f1", "mcc", "calibration_error"]


def test_a_probability_at_a_bins_upper_bound_is_in_it() -> None:
    sure = torch.tensor([3 / BINS, 3 / BINS, 2.5 / BINS, 1.0], dtype=torch.float64)
    targets, predicted = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1, 0])
    gaps = [abs(8.5 / BINS - 1), 0.0]  # the first three together, then the last, of which one is right
    made = Predictions(targets, predicted, confidences=sure)
    assert made.figures()["calibration_error"] == pytest.approx(sum(gaps) / 4)


def test_intervals_are_quantiles_over_explicit_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 40)
    monkeypatch.setattr(resampling, "_AT_ONCE", 700)  # several pieces, the last one smaller
    logits, targets = drawn(200, 3)
    true, predicted = targets.numpy(), logits.argmax(-1).numpy()
    draws = np.random.default_rng(resampling._SEED).multinomial(200, np.full(200, 1 / 200), 40)
    values = []
    for times in draws:
        rows = np.repeat(np.arange(200), times)
        again = true[rows], predicted[rows]
        values.append((f1_score(*again, average="macro"), matthews_corrcoef(*again)))
    bounds = np.quantile(values, [0.025, 0.975], axis=0)
    found = Predictions.of(logits, targets).figures_with_intervals()
    for name, (low, high) in zip(("f1", "mcc"), bounds.T, strict=True):
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((low, high), abs=1e-6)


def test_parts_in_a_row_are_the_whole() -> None:
    logits, targets = drawn(30, 4)
    parts = [Predictions.of(logits[i : i + 7], targets[i : i + 7]) for i in range(0, 30, 7)]
    assert Predictions.joined(parts).figures() == Predictions.of(logits, targets).figures()


def test_a_guess_without_probabilities_has_no_loss_and_correlates_with_nothing() -> None:
    figures = Predictions(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])).figures_with_intervals()
    assert {name.split("_")[0] for name in figures} == {"accuracy", "f1", "mcc"}
    assert figures["f1"] == pytest.approx(0.4)
    assert figures["mcc"] == figures["mcc_low"] == figures["mcc_high"] == 0.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_spoils_figures_and_raises_nothing(wrong: float) -> None:
    logits, targets = drawn(20, 2)
    logits[3] = wrong
    figures = Predictions.of(logits, targets).figures_with_intervals()
    assert math.isnan(figures["loss"])
    assert math.isnan(figures["calibration_error"])
    assert 0.0 < figures["f1"] <= 1.0
