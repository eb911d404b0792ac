"""Where calls into nevergrad are made: what it draws, prints, keeps and raises stays in here."""

from __future__ import annotations

import io
import math
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from pipeline.errors import UserError

# what an archive of told points may hold; nevergrad's own bound grows with the space, to gigabytes
ARCHIVE_BYTES = 2**26
# the distribution to install where it is not called like the module that is missing
DISTRIBUTIONS = {
    "ax": "ax-platform",
    "bayes_optim": "bayes-optim",
    "ConfigSpace": "smac",
    "poap": "pySOT",
    "pybobyqa": "Py-BOBYQA",
}


class Enclosure:
    """Where calls into nevergrad are made: silent, failures in one line, and in place for their length

    - this run's own state of numpy's global generator;
    - cma with step-size adaptation by CSA and no seeding of numpy from the clock: from 300 coordinates its
      own choice fails when tells do not come generation by generation (cma 4.5);
    - archives of told points bounded by `ARCHIVE_BYTES`, those of optimizers inside optimizers too;
    - an optimizer in a thread that was not told of its last point gives random points, as nevergrad has one
      do that has ended, where it would wait for ever: chains and portfolios lose some losses of their parts.
    """

    def __init__(self, name: str, seed: int, random_state: np.random.RandomState) -> None:
        self._name = name
        self._global = np.random.RandomState(seed).get_state()
        self._random_state = random_state

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Raises UserError when the call fails."""
        outside = np.random.get_state()
        np.random.set_state(self._global)
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _mended_defaults():
                warnings.simplefilter("ignore")
                yield
                _await_threads()
        except Exception as error:
            raise failure(self._name, error) from error
        finally:
            self._global = np.random.get_state()
            np.random.set_state(outside)

    @contextmanager
    def visited(self) -> Iterator[None]:
        """As `entered`, for a call that must not change what is drawn after it."""
        kept = self._global, self._random_state.get_state()
        with self.entered():
            yield
        self._global = kept[0]
        self._random_state.set_state(kept[1])


@contextmanager
def _mended_defaults() -> Iterator[None]:
    import cma
    from nevergrad.optimization.recaster import SequentialRecastOptimizer
    from nevergrad.optimization.utils import Pruning

    defaults = cma.CMAOptions.defaults()
    kept = {key: defaults[key] for key in ("AdaptSigma", "seed")}
    conservative = Pruning.sensible_default

    def bounded(num_workers: int, dimension: int) -> Any:
        pruning = conservative(num_workers, dimension)
        fitting = ARCHIVE_BYTES // (16 * dimension)  # each point is a key and a value
        return pruning if pruning.max_len <= fitting else Pruning(max(1, fitting // 4), max(4, fitting))

    waiting = SequentialRecastOptimizer._internal_ask_candidate

    def never_waiting(optimizer: Any) -> Any:
        if not _is_untold(optimizer._messaging_thread):
            return waiting(optimizer)
        point = optimizer._rng.normal(0, 1, optimizer.dimension)
        return optimizer.parametrization.spawn_child().set_standardized_data(point)

    defaults.update(AdaptSigma=cma.sigma_adaptation.CMAAdaptSigmaCSA, seed=math.nan)
    Pruning.sensible_default = bounded
    SequentialRecastOptimizer._internal_ask_candidate = never_waiting
    try:
        yield
    finally:
        defaults.update(kept)
        Pruning.sensible_default = conservative
        SequentialRecastOptimizer._internal_ask_candidate = waiting


def _is_untold(thread: Any) -> bool:
    """Whether the thread waits for the answer to a question that was taken: it has put no other."""
    return (
        thread is not None
        and thread.is_alive()
        and thread.messages_ask.empty()
        and thread.messages_ask.unfinished_tasks > thread.messages_tell.unfinished_tasks
    )


def _await_threads() -> None:
    """Waits until optimizers that run in threads ask again: what they draw meanwhile is part of the call."""
    from nevergrad.optimization.recaster import _MessagingThread

    for thread in threading.enumerate():
        if isinstance(thread, _MessagingThread):
            # as many questions as answers: the last answer is still being worked on
            while thread.is_alive() and thread.call_count <= thread.messages_tell.unfinished_tasks:
                time.sleep(1e-4)


def failure(name: str, error: BaseException) -> UserError:
    """One line for whatever nevergrad raised: what the optimizer cannot do here, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            module = cause.name.partition(".")[0]
            return UserError(
                f"nevergrad:{name} needs {DISTRIBUTIONS.get(module, module)}, which is not installed; "
                "install it or choose another optimizer"
            )
        cause = cause.__cause__ or cause.__context__
    if "does not support parallelization" in str(error):  # a part of it: its factory does not say so
        return one_at_a_time(name)
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder="…").rstrip(": ")
    return UserError(f"nevergrad:{name} failed with {reason}; choose another optimizer or other options")


def one_at_a_time(name: str) -> UserError:
    return UserError(f"nevergrad:{name} works on one candidate at a time; leave num_workers at 1")
