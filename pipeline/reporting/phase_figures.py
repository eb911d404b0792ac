"""Figures of a run in phases, beside those of the whole: how they are named, and how they read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_START, _PHASE, _HELD_OUT, _COST = "start", "phase_", "validation/", "forward_passes"


def together(done: Sequence[Mapping[str, float]], before: Mapping[str, float]) -> dict[str, float]:
    """Figures of the whole, of validation ``before`` the first phase, and each phase's own.

    Of a single phase, its own are the whole.
    """
    if len(done) == 1:
        return dict(done[0])
    each = {f"{_PHASE}{i}/{key}": value for i, own in enumerate(done, 1) for key, value in own.items()}
    return {
        **done[-1],
        _COST: sum(own[_COST] for own in done),
        "seconds": sum(own["seconds"] for own in done),
        "peak_memory_mib": max(own["peak_memory_mib"] for own in done),
        **{f"{_START}/{_HELD_OUT}{key}": value for key, value in before.items()},
        **each,
    }


def boundaries(metrics: Mapping[str, Any]) -> list[float]:
    """Forward passes after which another phase began."""
    return list(itertools.accumulate(metrics[f"{name}/{_COST}"] for name in _phases(metrics)))[:-1]


def lines(metrics: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    """A line for the start and for each phase with the figures that are ``shown``; none of a single phase."""
    said, made = [], 0
    for name in [_START, *phases] if (phases := _phases(metrics)) else []:
        found = {key: metrics.get(f"{name}/{_HELD_OUT}{key}") for key in shown}
        figures = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if value is not None)
        made += metrics.get(f"{name}/{_COST}", 0)
        said.append(f"{name.replace('_', ' ')}: validation {figures} after {made:,.0f} forward passes")
    return said


def _phases(metrics: Mapping[str, Any]) -> list[str]:
    numbered = (f"{_PHASE}{number}" for number in itertools.count(1))
    return list(itertools.takewhile(lambda name: f"{name}/{_COST}" in metrics, numbered))
