"""Every built-in optimizer keeps the contract that ships for authors; broken ones are found out."""

from __future__ import annotations

import pytest

from pipeline.testing import OptimizerContract


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
