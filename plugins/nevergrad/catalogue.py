"""nevergrad's registry as a person chooses from it: names, families, options, and what each needs."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import warnings
from typing import Any

import numpy as np

from pipeline.errors import UserError, nearest, unknown
from pipeline.optimizer import Problem
from pipeline.registry import Variant
from plugins.nevergrad.enclosure import ARCHIVE_BYTES, DISTRIBUTIONS, failure

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


def lookup(name: str | None) -> tuple[str, Any]:
    if name is None:
        raise UserError(
            "nevergrad needs the name of an optimizer; write nevergrad:<Name>, e.g. nevergrad:OnePlusOne"
        )
    registry = _registry()
    if name.strip() not in registry:
        raise unknown("nevergrad optimizer", name, registry)
    return name.strip(), registry[name.strip()]


def memory_bytes(name: str, problem: Problem) -> int:
    matrices, vectors, more, at_most = next(held for pattern, held in _HELD if re.search(pattern, name))
    evaluations = min(problem.forward_passes, at_most, 4 * problem.size + 100)
    archive = 2 * min(ARCHIVE_BYTES, 1000 * 16 * problem.size)
    return int(8 * problem.size * (matrices * problem.size + vectors + more * evaluations)) + archive


def configured(name: str, factory: Any, options: dict[str, Any]) -> Any:
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
        raise failure(name, error) from error


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


def limit(name: str, factory: Any) -> str:
    """The package that the name misses here, or that it cannot be asked for many candidates, or nothing."""
    module = next((module for pattern, module in MODULES if re.match(pattern, name)), None)
    if module and importlib.util.find_spec(module) is None:
        return f"needs {DISTRIBUTIONS.get(module, module)}, which is not installed"
    return "one candidate at a time" if factory.no_parallelization else ""


def every_variant() -> list[Variant]:
    """Every name, by family and name."""
    found = [
        Variant(name, _family(factory), _options(factory), limit(name, factory))
        for name, factory in _registry().items()
    ]
    order = {family: place for place, family in enumerate([*FAMILIES.values(), OTHER])}
    return sorted(found, key=lambda variant: (order[variant.family], variant.name))
