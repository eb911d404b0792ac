"""The package ``cmaes`` (CyberAgent) behind the door: ``cyberagent:CMA`` and ``cyberagent:SepCMA``."""

import math

import cmaes
import numpy as np
import torch

from pipeline.errors import unknown
from pipeline.optimizer import Explicit
from pipeline.registry import Variant

VARIANTS = {"CMA": cmaes.CMA, "SepCMA": cmaes.SepCMA}


class CyberAgent:
    """An `AskTell`. Its state is the losses told: the library is a function of its seed and of them."""

    api_version = 1
    in_host_memory = True

    def __init__(self, problem, *, name: str = "SepCMA", sigma: float = 0.1, population_size: int = 0):
        if name not in VARIANTS:
            raise unknown("variant of cyberagent", name, VARIANTS)
        self.problem, self.kind = problem, VARIANTS[name]
        self.options = {"sigma": sigma, "population_size": population_size or None}
        self._start()

    def _start(self):
        mean, seed = np.zeros(self.problem.size), self.problem.run_seed
        self.method = self.kind(mean=mean, seed=seed, **self.options)
        self.told, self.asked = [], []

    def ask(self):
        while len(self.asked) < self.method.population_size:
            self.asked.append(self.method.ask())
        return [Explicit(self._tensor(point)) for point in self.asked]

    def tell(self, candidates, losses):
        solutions = list(zip(self.asked, [min(float(loss), 1e30) for loss in losses], strict=True))
        self.method.tell(solutions)
        self.told.append(list(losses))
        self.asked = []

    def recommend(self):
        return self._tensor(self.method.mean)

    def state_dict(self):
        return {"losses": [list(losses) for losses in self.told]}

    def load_state_dict(self, state):
        self._start()
        for losses in state["losses"]:
            self.tell(self.ask(), losses)

    def _tensor(self, point):
        return torch.tensor(point, dtype=torch.float32, device=self.problem.device)

    @staticmethod
    def variants():
        return [
            Variant(name, "evolution strategy", {"sigma": 0.1, "population_size": 0}) for name in VARIANTS
        ]

    @staticmethod
    def memory_bytes(problem, *, name: str = "SepCMA", population_size: int = 0, **options):
        """float64: C, its factors and a matrix for each candidate, or a few vectors; and the candidates."""
        n, population = problem.size, population_size or 4 + int(3 * math.log(problem.size))
        return 8 * ((8 + 2 * population) * n * n if name == "CMA" else 12 * n) + 40 * population * n
