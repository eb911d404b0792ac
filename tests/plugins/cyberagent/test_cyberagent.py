import pytest

from pipeline.testing import OptimizerContract


class TestCMA(OptimizerContract):
    memory_dimension = 1500

    @pytest.fixture
    def spec(self):
        return "cyberagent:CMA,sigma=0.3"


class TestSepCMA(OptimizerContract):
    memory_dimension = 100_000

    @pytest.fixture
    def spec(self):
        return "cyberagent,sigma=0.3,population_size=12"
