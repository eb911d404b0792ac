"""Every built-in optimizer keeps the contract that ships for authors; broken ones are found out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.optimizer import AskTellOptimizer, Explicit
from pipeline.testing import OptimizerContract
from pipeline.testing.quadratic import Run


class Seeded(OptimizerContract):
    """Methods along seeds stop at a loss that is not finite: it would be in every weight."""

    bears_nan = False
    memory_dimension = 4_000_000


class TestTwoPoint(Seeded):
    @pytest.fixture
    def spec(self) -> str:
        return "spsa,epsilon=0.01,learning_rate=0.02,directions=4"


class TestOneSided(Seeded):
    @pytest.fixture
    def spec(self) -> str:
        return "spsa:OneSided,epsilon=0.01,learning_rate=0.1,directions=8"


class TestCurvatureClipped(Seeded):
    @pytest.fixture
    def spec(self) -> str:
        return "spsa:CurvatureClipped,epsilon=0.01,learning_rate=0.04,directions=4"


class TestLazyLowRank(Seeded):
    evaluations = 8000

    @pytest.fixture
    def spec(self) -> str:
        return "spsa:LazyLowRank,epsilon=0.01,learning_rate=0.02,directions=4,refresh=5,momentum=0.5"


class TestGaussianES(Seeded):
    @pytest.fixture
    def spec(self) -> str:
        return "es,sigma=0.05,learning_rate=0.1,population_size=16"


class TestLowRankES(Seeded):
    @pytest.fixture
    def spec(self) -> str:
        return "es:LowRank,sigma=0.05,learning_rate=0.1,population_size=16,shaping=z_score"


class TestCMA(OptimizerContract):
    memory_dimension = 1000

    @pytest.fixture
    def spec(self) -> str:
        return "cmaes:CMA,sigma=0.3"


class TestSepCMA(OptimizerContract):
    memory_dimension = 2_000_000

    @pytest.fixture
    def spec(self) -> str:
        return "cmaes:SepCMA,sigma=0.3"


class TestVkD(OptimizerContract):
    memory_dimension = 200_000

    @pytest.fixture
    def spec(self) -> str:
        return "cmaes:VkD,sigma=0.3"


class TestLMMA(OptimizerContract):
    memory_dimension = 4_000_000

    @pytest.fixture
    def spec(self) -> str:
        return "cmaes:LMMA,sigma=0.3"


class TestRestarts(OptimizerContract):
    memory_dimension = 1000

    @pytest.fixture
    def spec(self) -> str:
        return "cmaes:CMA,sigma=0.3,restarts=ipop"


class TestOnePlusOne(OptimizerContract):
    evaluations = 1000

    @pytest.fixture
    def spec(self) -> str:
        return "nevergrad:OnePlusOne,sigma=0.3"


class TestDE(OptimizerContract):
    reached = 0.1
    memory_dimension = 200_000

    @pytest.fixture
    def spec(self) -> str:
        return "nevergrad:DE,sigma=0.3,num_workers=8"


class TestAdamW(OptimizerContract):
    bears_nan = False
    replays = False
    seeded = False

    @pytest.fixture
    def spec(self) -> str:
        return "adamw,learning_rate=0.01"


class Misled:
    """A method whose ``ask`` gives what it was made with."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def ask(self) -> Any:
        return self.given

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None: ...

    def recommend(self) -> Tensor:
        return torch.zeros(4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "gave an empty list; it must give a list of Explicit"),
        (None, "gave a NoneType"),
        ([torch.zeros(4)], "a candidate is a Tensor; it must be Seeded or Explicit"),
        ([Explicit(torch.zeros(7))], r"coordinates of shape \(7,\); the space has 4"),
        ([Explicit(torch.zeros(3))], r"coordinates of shape \(3,\); the space has 4"),
        ([Explicit(torch.zeros(1, 4))], r"coordinates of shape \(1, 4\); the space has 4"),
    ],
)
def test_what_ask_gives_is_checked_in_one_line(given: Any, said: str) -> None:
    run = Run("cmaes", 4, 1000)
    run.optimizer = AskTellOptimizer(Misled(given), run.problem)
    with pytest.raises(UserError, match=said):
        run.step()
