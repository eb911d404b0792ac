"""Our CMA-ES as an optimizer of nevergrad, by nevergrad's own check and with losses that come late."""

from __future__ import annotations

import warnings


def test_is_an_optimizer_of_nevergrad() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nevergrad's own, and of what it imports
        import nevergrad
        from nevergrad.optimization.test_optimizerlib import check_optimizer

        import plugins.cmaes.in_nevergrad  # noqa: F401

        registered = nevergrad.optimizers.registry.pop("TorchCMA")  # other tests count the names
        check_optimizer(registered, budget=300)
        for workers in (1, 7, 20):  # losses come late, and out of step with generations
            point = nevergrad.p.Array(shape=(10,))
            point.random_state.seed(0)
            optimizer = registered(point, 3000, workers)
            best = optimizer.minimize(lambda x: float(((x - 0.7) ** 2).sum()))
            assert ((best.value - 0.7) ** 2).sum() < 1e-6
