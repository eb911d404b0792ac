import pytest

from pipeline.testing import OptimizerContract


class TestLion(OptimizerContract):
    bears_nan = False

    @pytest.fixture
    def spec(self):
        return "zo:lion,learning_rate=0.01"


class TestAdam(OptimizerContract):
    bears_nan = False

    @pytest.fixture
    def spec(self):
        return "zo:adam,learning_rate=0.02,directions=2"
