"""First-order methods of ``pytorch_optimizer`` on a gradient that two-point SPSA estimates: ``zo:adam``.

As in ZO-Bench (Zhang et al. 2024, arXiv 2402.11592), whose ZO-Adam is one of these. The library writes its
steps into the searched tensors in place.
"""

import math

import pytorch_optimizer
import torch

from pipeline import noise
from pipeline.errors import UserError, unknown
from pipeline.optimizer import Seeded, StepReport
from pipeline.registry import Variant

OPTIONS = {"learning_rate": 1e-3, "epsilon": 1e-3, "directions": 4}


class ZerothOrder:
    """An `Optimizer` whose step is another library's."""

    api_version = 1

    def __init__(
        self,
        problem,
        *,
        name: str = "adam",
        learning_rate: float = 1e-3,
        epsilon: float = 1e-3,
        directions: int = 4,
    ):
        known = pytorch_optimizer.get_supported_optimizers()
        if name.lower() not in known:
            raise unknown("variant of zo", name, known)
        self.kind = pytorch_optimizer.load_optimizer(name.lower())
        self.learning_rate, self.epsilon, self.directions = learning_rate, epsilon, directions
        self.run_seed, self.steps = problem.run_seed, 0
        self.method = self.loaded = None

    def step(self, evaluator):
        tensors = evaluator.tensors()
        first = (self.run_seed << 32) + self.steps * self.directions
        seeds = range(first, first + self.directions)
        candidates = [Seeded(seed, scale) for seed in seeds for scale in (self.epsilon, -self.epsilon)]
        losses = evaluator.losses(candidates)
        if not all(math.isfinite(loss) for loss in losses):
            raise UserError(f"zo: a loss is not finite: lower learning_rate (now {self.learning_rate:g})")
        pairs = zip(losses[::2], losses[1::2], strict=True)
        slopes = [(plus - minus) / (2 * self.epsilon) for plus, minus in pairs]
        self._estimate(tensors, list(seeds), slopes)
        if self.method is None:
            self.method = self.kind(tensors, lr=self.learning_rate)
            if self.loaded:
                self.method.load_state_dict(self.loaded)
        self.method.step()
        self.method.zero_grad()
        self.steps += 1
        return StepReport(sum(losses) / len(losses))

    def _estimate(self, tensors, seeds, slopes):
        """The mean of slope · z, as each tensor's gradient; z's elements run through the tensors in turn."""
        offset = 0
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
            for seed, slope in zip(seeds, slopes, strict=True):
                z = noise.direction(seed, offset, tensor.numel(), "rademacher", tensor.device)
                tensor.grad.add_(z.view(tensor.shape), alpha=slope / len(seeds))
            offset += tensor.numel()

    def state_dict(self):
        return {"steps": self.steps, "method": self.method.state_dict() if self.method else self.loaded or {}}

    def load_state_dict(self, state):
        self.steps, self.loaded, self.method = state["steps"], state["method"] or None, None

    @staticmethod
    def variants():
        return [
            Variant(name, "first order", OPTIONS) for name in pytorch_optimizer.get_supported_optimizers()
        ]

    @staticmethod
    def memory_bytes(problem, **options):
        """The estimate, one direction, and up to four vectors of the method's own."""
        return 4 * 6 * problem.size
