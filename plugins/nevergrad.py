"""Any of nevergrad's optimizers, as ``nevergrad:<Name>``.

nevergrad offers no state to save but a pickle of itself. An optimizer is a function of its seed and of the
losses it was told, though, so those losses are its state here, and loading them asks and tells again. To make
that hold, whatever nevergrad draws from numpy's global generator comes from a private state that is put in
place for the length of a call: see `_Enclosure`, which also mends a few habits of the libraries below.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError, nearest, unknown
from pipeline.optimizer import Explicit, Problem
from pipeline.registry import Variant

# told in place of a loss that is not finite: nevergrad would accept −inf as the best
WORST_LOSS = 1e10
# asks beyond the budget: some names raise when it is exceeded, and a step may ask more than it can score
SLACK = 16
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
# the module that names need, which nevergrad imports when it is asked: benchmarks.nevergrad_names tries all
MODULES = (
    ("AXP?$", "ax"),
    ("BOBYQA$", "pybobyqa"),
    ("FCMA(s03|p13)?$", "fcmaes"),
    ("NLOPT", "nlopt"),
    ("PCABO|BayesOptim", "bayes_optim"),
    ("Pymoo", "pymoo"),
    ("SMAC", "ConfigSpace"),
    ("pysot", "poap"),
)

# What people call the classes behind the names, first match in a class and then its bases.
FAMILIES = {
    "ParametrizedOnePlusOne": "one-plus-one",
    "DifferentialEvolution": "differential evolution",
    "ParametrizedCMA": "CMA",
    "MetaCMA": "CMA",
    "ConfPSO": "particle swarm",
    "EvolutionStrategy": "evolution strategy",
    "ParametrizedTBPSA": "estimation of distribution",
    "EMNA": "estimation of distribution",
    "EDA": "estimation of distribution",
    "cGA": "estimation of distribution",
    "RandomSearchMaker": "random search",
    "SamplingSearch": "quasi-random and one-shot sampling",
    "NonObjectOptimizer": "run by another library",
    "Pymoo": "run by another library",
    "ParametrizedBO": "Bayesian optimization",
    "BayesOptim": "Bayesian optimization",
    "AXP": "Bayesian optimization",
    "ParametrizedMetaModel": "surrogate model",
    "ConfSplitOptimizer": "split by coordinates",
    "NoisySplit": "split by coordinates",
    "NGOptBase": "chosen by dimension and budget",
    "MultipleSingleRuns": "several side by side",
    "ConfPortfolio": "several side by side",
    "Portfolio": "several side by side",
    "Chaining": "several in turn",
    "Rescaled": "another one rescaled",
}
OTHER = "other"

# What the names hold, first match: square matrices, vectors, and vectors for each evaluation up to a number.
# Measured at 1,500, 100,000 and 1,000,000 coordinates, rounded up; whatever may choose CMA counts as it.
_MATRICES = (9, 60, 4, 100)
_HELD = (
    ("MetaModel|Chain|Memetic|Split|(?<!Diagonal)CMA|BFGS|SQP|Powell|Cobyla|BO|Carola|EDA", _MATRICES),
    ("TBPSA|EMNA|LHS|LQO|Lhs", (0, 60, 4, math.inf)),
    ("DE|PSO|ES|Search|Recentering|DiagonalCMA", (0, 60, 4, 100)),
    ("OnePlus|Lengler|SPSA|Zero|Random", (0, 40, 0, 0)),
    ("", _MATRICES),
)


class Nevergrad:
    """An `AskTell` over one optimizer of nevergrad's registry.

    Args:
        problem: the space; the search starts at the zero vector.
        name: a name of the registry, such as ``OnePlusOne``.
        sigma: the standard deviation that nevergrad takes as its unit of length.
        num_workers: candidates an ask, made without knowing each other's losses.
        options: of the optimizer's own configuration, such as ``popsize`` for ``DE``.

    Raises:
        UserError: no name or an unknown one, an option that it has not or that is out of range, or a library
            it needs that is not installed.
    """

    in_host_memory = True

    def __init__(
        self,
        problem: Problem,
        *,
        name: str | None = None,
        sigma: float = 0.1,
        num_workers: int = 1,
        **options: Any,
    ) -> None:
        if not 0 < sigma < math.inf:
            raise UserError(f"nevergrad: sigma must be positive and finite, not {sigma:g}")
        if num_workers < 1:
            raise UserError(f"nevergrad: num_workers must be at least 1, not {num_workers}")
        self.name, factory = _lookup(name)
        if factory.no_parallelization and num_workers > 1:
            raise _one_at_a_time(self.name)
        self._factory = _configured(self.name, factory, options)
        if (limit := _limit(self.name, factory)).startswith("needs"):  # before a run has computed anything
            raise UserError(f"nevergrad:{self.name} {limit}; install it or choose another optimizer")
        self._problem, self._sigma, self._num_workers = problem, sigma, num_workers
        self._start()

    def ask(self) -> list[Explicit]:
        """``num_workers`` candidates, float32 ``[size]`` on the problem's device; the same until told.

        Raises:
            UserError: the optimizer failed.
        """
        with self._enclosure.entered():
            while len(self._asked) < self._num_workers:
                self._asked.append(self._optimizer.ask())
        return [Explicit(self._tensor(parameter.value)) for parameter in self._asked]

    def tell(self, candidates: Sequence[Explicit], losses: Sequence[float]) -> None:
        """Tells the losses of the candidates just asked, in that order; one that is not finite as the worst.

        Raises:
            UserError: the optimizer failed.
            ValueError: not as many candidates and losses as were asked.
        """
        if not len(candidates) == len(losses) == len(self._asked):
            raise ValueError(
                f"{len(self._asked)} candidates asked, {len(losses)} losses of {len(candidates)} told"
            )
        told = [min(float(loss), WORST_LOSS) if math.isfinite(loss) else WORST_LOSS for loss in losses]
        with self._enclosure.entered():
            for parameter, loss in zip(self._asked, told, strict=True):
                self._optimizer.tell(parameter, loss)
        self._asked.clear()
        self._told.append(told)

    def recommend(self) -> Tensor:
        """The point that the optimizer would stop at, or the start before any tell: float32 ``[size]``."""
        if not self._told:
            return torch.zeros(self._problem.size, device=self._problem.device)
        with self._enclosure.visited():
            return self._tensor(self._optimizer.provide_recommendation().value)

    def state_dict(self) -> dict[str, Any]:
        """The losses told, a list for each tell: plain data, a few bytes an evaluation."""
        return {"losses": [list(losses) for losses in self._told]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts again and tells the losses again, which takes as long as the optimizer itself did."""
        self._start()
        for losses in state["losses"]:
            self.tell(self.ask(), losses)

    @staticmethod
    def variants() -> list[Variant]:
        """Every name of the registry, by family and name, with its options and what keeps it from running.

        Names that choose others by dimension and budget may still meet one that misses its package.
        """
        found = [
            Variant(name, _family(factory), _options(factory), _limit(name, factory))
            for name, factory in _registry().items()
        ]
        order = {family: place for place, family in enumerate([*FAMILIES.values(), OTHER])}
        return sorted(found, key=lambda variant: (order[variant.family], variant.name))

    @staticmethod
    def memory_bytes(problem: Problem, *, name: str | None = None, **options: Any) -> int:
        """A coarse bound of what the optimizer holds, by its name; raises UserError for an unknown one."""
        return _memory_bytes(_lookup(name)[0], problem)

    def _start(self) -> None:
        """The optimizer as new."""
        import nevergrad

        self._told: list[list[float]] = []
        self._asked: list[Any] = []
        parametrization = nevergrad.p.Array(init=np.zeros(self._problem.size)).set_mutation(sigma=self._sigma)
        parametrization.random_state = np.random.RandomState(_seed(self._problem, 0))
        self._enclosure = _Enclosure(self.name, _seed(self._problem, 1), parametrization.random_state)
        budget = self._problem.forward_passes + self._num_workers + SLACK
        with self._enclosure.entered():
            self._optimizer = self._factory(parametrization, budget=budget, num_workers=self._num_workers)

    def _tensor(self, value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self._problem.device)


class _Enclosure:
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
            raise _failure(self._name, error) from error
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


def _failure(name: str, error: BaseException) -> UserError:
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
        return _one_at_a_time(name)
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder="…")
    return UserError(f"nevergrad:{name} failed with {reason}; choose another optimizer or other options")


def _one_at_a_time(name: str) -> UserError:
    return UserError(f"nevergrad:{name} works on one candidate at a time; leave num_workers at 1")


@functools.cache
def _registry() -> dict[str, Any]:
    """nevergrad's registry by stripped name (one has a space at its end)."""
    outside = np.random.get_state()
    np.random.seed(0)  # a few registered optimizers hold numbers drawn at import
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nevergrad
            from nevergrad.optimization.recaster import RecastOptimizer, _MessagingThread
    finally:
        np.random.set_state(outside)
    # a thread that waits for its next loss would keep the interpreter from ending
    _MessagingThread.daemon = True
    # one that is refused half made would complain of its missing thread when it is collected
    RecastOptimizer._messaging_thread = None
    registry = nevergrad.optimizers.registry
    return {name.strip(): registry[name] for name in registry}


def _lookup(name: str | None) -> tuple[str, Any]:
    if name is None:
        raise UserError(
            "nevergrad needs the name of an optimizer; write nevergrad:<Name>, e.g. nevergrad:OnePlusOne"
        )
    registry = _registry()
    if name.strip() not in registry:
        raise unknown("nevergrad optimizer", name, registry)
    return name.strip(), registry[name.strip()]


def _memory_bytes(name: str, problem: Problem) -> int:
    matrices, vectors, more, at_most = next(held for pattern, held in _HELD if re.search(pattern, name))
    evaluations = min(problem.forward_passes, at_most, 4 * problem.size + 100)
    archive = 2 * min(ARCHIVE_BYTES, 1000 * 16 * problem.size)
    return int(8 * problem.size * (matrices * problem.size + vectors + more * evaluations)) + archive


def _configured(name: str, factory: Any, options: dict[str, Any]) -> Any:
    """The optimizer with its own configuration changed by ``options``."""
    if not options:
        return factory
    known = _options(factory)
    for key in options:
        if key not in known:
            hint = nearest(key, known) or f"; it takes {', '.join(sorted(['num_workers', 'sigma', *known]))}"
            raise UserError(f"optimizer 'nevergrad:{name}' has no option '{key}'{hint}")
    try:
        return type(factory)(**{**factory.config(), **options})
    except Exception as error:
        raise _failure(name, error) from error


def _options(factory: Any) -> dict[str, Any]:
    """What a person can set, with defaults: the part of the configuration that is plain data."""
    config = {} if isinstance(factory, type) else factory.config()
    return {key: value for key, value in config.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _family(factory: Any) -> str:
    """The entry of `FAMILIES` for the class that a name stands for or was configured from."""
    bases = (factory if isinstance(factory, type) else type(factory)).__mro__
    return next((FAMILIES[base.__name__] for base in bases if base.__name__ in FAMILIES), OTHER)


def _limit(name: str, factory: Any) -> str:
    """The package that the name misses here, or that it cannot be asked for many candidates, or nothing."""
    module = next((module for pattern, module in MODULES if re.match(pattern, name)), None)
    if module and importlib.util.find_spec(module) is None:
        return f"needs {DISTRIBUTIONS.get(module, module)}, which is not installed"
    return "one candidate at a time" if factory.no_parallelization else ""


def _seed(problem: Problem, purpose: int) -> int:
    """32 bits, as much as numpy's legacy generator takes."""
    return int(np.random.SeedSequence([problem.run_seed, purpose]).generate_state(1)[0])
