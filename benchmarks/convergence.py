"""Forward passes to a fixed validation loss: ``python -m benchmarks.convergence [--only NAME] [--json]``.

The sentiment task of the default run, over the head, from the weights that ``dvc repro`` pretrained. Every
method gets the same batches, budget and schedule, and a learning rate of its own: the one of its grid of
three that needs the fewest passes in the median of two seeds, not among the three that are reported. A run
that does not arrive counts as the whole budget. The rates were chosen around the best of a wider search on
the same features (docs/log.md).
"""

from __future__ import annotations

import functools
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.harness import Row, main
from pipeline import start
from pipeline.config import read
from pipeline.engine.evaluator import Engine
from pipeline.entry_points import installed
from pipeline.layout import Layout, project_root
from pipeline.objective import cross_entropy
from pipeline.optimizer import BudgetSpent, Problem, Stalled
from pipeline.registry import Spec, create
from pipeline.tasks.base import Start

TARGET = 0.46  # nats; zero-shot starts at 0.53, a whole run of 40,000 passes ends near 0.43, a probe at 0.41
BUDGET = 12_000
SEEDS = (0, 1, 2)
TUNING_SEEDS = (10, 11)
EVERY = 200  # passes between measurements

# a spec, and the learning rates it is tried at
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "TwoPoint/4": ("spsa,epsilon=0.01,directions=4", (1e-3, 2e-3, 4e-3)),
    "TwoPoint/8": ("spsa,epsilon=0.01,directions=8", (2e-3, 4e-3, 8e-3)),
    "TwoPoint/16": ("spsa,epsilon=0.01,directions=16", (2e-3, 4e-3, 8e-3)),
    "OneSided/4": ("spsa:OneSided,epsilon=0.01,directions=4", (1e-3, 2e-3, 4e-3)),
    "OneSided/8": ("spsa:OneSided,epsilon=0.01,directions=8", (2e-3, 4e-3, 8e-3)),
    "CurvatureClipped/8": ("spsa:CurvatureClipped,epsilon=0.01,directions=8", (2e-3, 4e-3, 8e-3)),
    "LazyLowRank/4": ("spsa:LazyLowRank,epsilon=0.01,directions=4", (1e-3, 2e-3, 4e-3)),
    "LazyLowRank/4+momentum": ("spsa:LazyLowRank,epsilon=0.01,directions=4,momentum=0.9", (1e-3, 2e-3, 4e-3)),
    "es/8": ("es,sigma=0.01,population_size=8", (2.5e-3, 5e-3, 1e-2)),
    "es:LowRank/8": ("es:LowRank,sigma=0.01,population_size=8", (2.5e-3, 5e-3, 1e-2)),
    "SepCMA": ("cmaes:SepCMA", (0.003, 0.01, 0.03)),
}
# other libraries behind the same door; measured where tests/plugins are installed
PEERS: dict[str, tuple[str, tuple[float, ...]]] = {
    "cyberagent:SepCMA": ("cyberagent:SepCMA", (0.003, 0.01, 0.03)),
    "zo:adam/8": ("zo:adam,epsilon=0.01,directions=8", (1e-3, 3e-3, 1e-2)),
    "zo:lion/8": ("zo:lion,epsilon=0.01,directions=8", (3e-4, 1e-3, 3e-3)),
}


@dataclass
class Setting:
    """The task with every feature kept, and what to begin each run from."""

    begin: Start
    space: Any
    before: list[torch.Tensor]
    features: torch.Tensor
    targets: torch.Tensor


@functools.cache
def setting(device: torch.device) -> Setting:
    """The default run's task; its pretrained model must be there."""
    root = project_root()
    config = replace(read(root / "params.yaml"), device=str(device))
    begin = start.begin(config, Layout(root), "finetune", None)
    space = start.space(config.finetune, config, begin.model)
    batches = [batch.to(space.device) for batch in begin.validation]
    with torch.inference_mode():
        features = torch.cat([begin.model.features(batch) for batch in batches])
    return Setting(begin, space, space.snapshot(), features, torch.cat([batch.targets for batch in batches]))


def passes_to_target(spec: str, seed: int, engines: Engine, at: Setting) -> int:
    """Forward passes until the validation loss is ``TARGET``; ``BUDGET`` if it never is."""
    at.space.restore(at.before)
    at.space._start = {}
    problem = Problem(at.space.size, at.space.kind, BUDGET, seed, at.space.device)
    optimizer = create(Spec.parse(spec), problem)
    engines.forward_passes, step, due = 0, 0, EVERY
    while True:
        try:
            optimizer.step(engines.bind(at.begin.batch(step + 10_000 * seed), step))
        except (BudgetSpent, Stalled):
            return BUDGET
        step += 1
        if engines.forward_passes >= due:
            due = engines.forward_passes + EVERY
            with torch.inference_mode():
                loss = float(cross_entropy(at.begin.model.outputs(at.features), at.targets))
            if loss <= TARGET:
                return engines.forward_passes


@functools.cache
def best(method: str, device: torch.device) -> tuple[str, list[int]]:
    """A method's best setting and the passes of each seed at it."""
    at = setting(device)
    engine = Engine(at.begin.model, at.space, BUDGET, run_seed=0)
    spec, rates = {**METHODS, **PEERS}[method]
    option = "sigma" if "SepCMA" in spec else "learning_rate"
    tried: dict[str, list[int]] = {}
    for rate in rates:
        head, comma, rest = spec.partition(",")
        full = f"{head},{option}={rate}{comma}{rest}"
        tried[full] = [passes_to_target(full, seed, engine, at) for seed in TUNING_SEEDS]
        print(f"# {full}: {tried[full]}", file=sys.stderr, flush=True)
    chosen = min(tried, key=lambda each: statistics.median(tried[each]))
    found = [passes_to_target(chosen, seed, engine, at) for seed in SEEDS]
    engine.close()
    return chosen, found


def passes(method: str, device: torch.device) -> Row:
    return Row.of(f"passes/{method}", "passes", [float(p) for p in best(method, device)[1]])


def passes_ratio(device: torch.device) -> Row:
    """The best other method's passes over two-point SPSA's, both at their best settings, seed by seed."""
    found = {method: best(method, device)[1] for method in METHODS}
    order = sorted(found, key=lambda method: statistics.median(found[method]))
    ours = next(method for method in order if not method.startswith("TwoPoint"))
    theirs = next(method for method in order if method.startswith("TwoPoint"))
    print(f"# best: {ours}, against {theirs}", file=sys.stderr)
    pairs = zip(found[ours], found[theirs], strict=True)
    return Row.of("forward_passes_ratio", "ratio", [one / two for one, two in pairs])


if __name__ == "__main__":
    there = {plugin.name for plugin in installed(["optimizer"])}
    peers = [method for method in PEERS if Spec.parse(PEERS[method][0]).backend in there]
    every = {f"passes/{method}": functools.partial(passes, method) for method in [*METHODS, *peers]}
    main({**every, "forward_passes_ratio": passes_ratio})
