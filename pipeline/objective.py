"""A model's outputs and their targets to one scalar, always minimised: the only place that knows the sign.

An objective is a function of logits and targets. Logits are ``[candidates, outputs, classes]`` (the first
dimension may be missing, or more), targets int64 ``[outputs]``; it gives a loss for each candidate, float32
``[candidates]``. It may overwrite logits that need no gradient. It need not have a gradient: only the
yardstick asks for one. Others come through the entry-point group ``pipeline.objectives``.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor, nn

from pipeline.entry_points import load
from pipeline.errors import UserError
from pipeline.registry import Spec, check_options


class Objective(Protocol):
    def __call__(self, logits: Tensor, targets: Tensor, /) -> Tensor: ...


def parse(text: str) -> Objective:
    """The objective that ``name[,option=value…]`` names; options are keyword-only parameters of the function.

    Raises:
        UserError: no such objective or option.
    """
    spec = Spec.parse(text)
    if spec.name:
        raise UserError(f"objective '{text}' has no variants; write '{spec.backend}'")
    function = load("objective", spec.backend)
    options = check_options("objective", spec, function)
    return partial(function, **options) if options else function


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets in nats."""
    if logits.requires_grad:
        several = targets.expand(logits.shape[:-1])
        each = nn.functional.cross_entropy(logits.float().flatten(0, -2), several.flatten(), reduction="none")
        return each.view(several.shape).mean(-1)
    logits = logits.float()
    chosen = _of_targets(logits, targets)
    largest = logits.amax(-1)
    # in place: fresh memory of a vocabulary's width would cost more than the arithmetic
    exponents = logits.sub_(largest[..., None]).exp_()
    # the difference first: a small loss would drown in logits that are large
    return exponents.sum(-1).log_().sub_(chosen.sub_(largest)).mean(-1)


def error(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of outputs whose largest logit is not the target's (0–1 loss): one minus accuracy."""
    return (logits.argmax(-1) != targets).float().mean(-1)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of Σ (predicted probability − target)² over the classes (Brier 1950): from 0 to 2."""
    probabilities = logits.float().softmax(-1)
    return (probabilities.square().sum(-1) - 2.0 * _of_targets(probabilities, targets) + 1.0).mean(-1)


def margin(logits: Tensor, targets: Tensor, *, width: float = 1.0) -> Tensor:
    """Mean hinge: what the target's logit lacks to be ``width`` above all others (Crammer & Singer 2001)."""
    logits = logits.float()
    chosen = _of_targets(logits, targets)
    others = logits.scatter(-1, targets.expand(logits.shape[:-1])[..., None], float("-inf")).amax(-1)
    return (width + others - chosen).clamp(min=0.0).mean(-1)


def _of_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Of ``[…, outputs, classes]`` those of each output's target: ``[…, outputs]``."""
    return values.gather(-1, targets.expand(values.shape[:-1])[..., None]).squeeze(-1)
