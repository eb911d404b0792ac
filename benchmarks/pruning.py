"""How often a pruner stops the trial that would have been the best of its study.

``python -m benchmarks.pruning STUDY [STUDY …]``: folders of finished studies, ``runs/NAME/tuning/DIGEST``.
The validation curves of their trials are told to Optuna's own pruner, study by study in many random orders:
as they were measured, on the whole validation split, and with the noise that a measurement on one batch of
so many examples would have.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner

from benchmarks.harness import Row, note

ORDERS = 200
# of one example's loss, in nats: what the default run's classifier has on the test texts
EXAMPLE_SD = 0.57
BATCHES = (None, 256, 64)
PRUNERS: dict[str, BasePruner] = {
    "MedianPruner()": MedianPruner(),
    "MedianPruner(warm-up half, 10 trials)": MedianPruner(n_startup_trials=10, n_warmup_steps=5),
}


def curves(study: Path) -> list[list[float]]:
    """Validation losses of each trial, start left out; those that ended."""
    found = []
    for folder in sorted(study.glob("trials/*")):
        if (folder / "models" / "finetuned" / "metrics.json").is_file():
            lines = (folder / "plots" / "finetune.csv").read_text(encoding="utf-8").splitlines()
            column = lines[0].split(",").index("loss")
            found.append([float(line.split(",")[column]) for line in lines[2:]])
    return found


def best_is_pruned(losses: list[list[float]], pruner: BasePruner, sd: float, order: int) -> bool:
    """Whether the trial of the least final loss is stopped, where they are run in that ``order``."""
    draw = np.random.default_rng(order)
    best = min(range(len(losses)), key=lambda i: losses[i][-1])
    study = optuna.create_study(pruner=pruner)
    for index in draw.permutation(len(losses)):
        trial = study.ask()
        for step, loss in enumerate(losses[index]):
            trial.report(loss + sd * draw.standard_normal(), step)
            if trial.should_prune():
                if index == best:
                    return True
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, losses[index][-1])
        if index == best:
            return False
    return False


def main() -> None:
    """Prints the share of orders, in percent, for each pruner and noise; the range is over studies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    every = [curves(study) for study in arguments.studies]
    note(
        f"{len(every)} studies of {', '.join(str(len(each)) for each in every)} trials; {ORDERS} orders each"
    )
    rows = []
    for name, pruner in PRUNERS.items():
        for batch in BATCHES:
            sd = EXAMPLE_SD / batch**0.5 if batch else 0.0
            shares = [
                100 * float(np.mean([best_is_pruned(losses, pruner, sd, order) for order in range(ORDERS)]))
                for losses in every
            ]
            seen = f"on a batch of {batch}" if batch else "on the whole split"
            rows.append(Row.of(f"{name}, {seen}", "% of studies", shares))
            if not arguments.json:
                row = rows[-1]
                print(f"{row.name}: {row.value:.0f}% [{row.low:.0f}, {row.high:.0f}]", flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
