"""The contract of an optimizer, as tests that its author runs beside his own.

    import pytest
    from pipeline.testing import OptimizerContract

    class TestMyMethod(OptimizerContract):
        @pytest.fixture
        def spec(self) -> str:
            return "my-method"

The spec goes through the same door as a user's, so the distribution must be installed.
"""

import pytest

pytest.register_assert_rewrite("pipeline.testing.contract")

from pipeline.testing.contract import OptimizerContract  # noqa: E402  # asserts explain themselves only so

__all__ = ["OptimizerContract"]
