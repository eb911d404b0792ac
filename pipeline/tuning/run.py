"""A whole search, from the first trial to what is reported of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import user_code
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models import fresh
from pipeline.stage import Context
from pipeline.tuning.report import line, write_report
from pipeline.tuning.search import assignments, first_guess, values_of
from pipeline.tuning.study import Study
from pipeline.tuning.trials import open_study, work, work_in_processes

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# what may change while a study goes on
_FREE = ("tune.trials", "tune.workers", "tune.storage", "tune.enabled")


def search(context: Context) -> dict[str, Any]:
    """Runs the study that ``context.config.tune`` describes, or what is left of it; what ``tuned.json`` says.

    The study lies in ``tuning/<digest>``, the digest being of everything that its trials hang on: with other
    parameters, data or weights it is another study, and one that was killed goes on.

    Raises:
        UserError: a search that does not fit, or no trial that came to a value.
    """
    config, layout = context.config, context.layout
    folder = layout.tuning / digest(config, layout)
    with contextlib.closing(open_study(config, layout, folder)) as study:
        return _searched(context, study, folder)


def _searched(context: Context, study: Study, folder: Path) -> dict[str, Any]:
    config, layout = context.config, context.layout
    guess = first_guess(config, study.parameters)
    study.guess_first(guess)
    context.say(
        f"tune: {config.tune.trials} trials over {', '.join(each.label for each in study.parameters)}, each "
        f"{config.finetune.forward_passes:,} forward passes of {config.finetune.optimizer}; in {folder}"
    )
    started = time.perf_counter()
    with _progress(context, study) as on_end:
        run = work if config.tune.workers == 1 else work_in_processes
        run(config, layout, folder, context.tracker.id, on_end)
    best = study.best
    if best is None:
        raise UserError(_nothing(study))
    found = _found(config, study, best, guess)
    context.say(f"tune: best is {line(best, study)}; {time.perf_counter() - started:,.0f} s")
    write_report(study, folder, config, found)
    for path in sorted(folder.glob("*.png")):
        context.tracker.artifact(path, "plots")
    context.tracker.artifact(folder / "report.md")
    return found


def digest(config: Config, layout: Layout) -> str:
    """Twelve hex digits of everything a trial's result hangs on."""
    values = {key: value for key, value in config.flat().items() if key not in _FREE}
    values = {key: value for key, value in values.items() if not key.startswith("evaluate.")}
    values |= user_code.digests(config.prepare.task, config.finetune.objective) | fresh.digests(config.model)
    said = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in (layout.prepared / "card.json", *sorted(layout.pretrained.glob("*.safetensors"))):
        if path.is_file():
            with path.open("rb") as file:
                said.update(hashlib.file_digest(file, "sha256").digest())
    return said.hexdigest()[:12]


def _found(config: Config, study: Study, best: FrozenTrial, guess: dict[str, Any]) -> dict[str, Any]:
    first = study.trials[0].value
    guessed = len(guess) == len(study.parameters) and first is not None and math.isfinite(first)
    return {
        "values": assignments(values_of(best.params, study.parameters), config),
        "by": config.tune.by,
        "value": best.value,
        "trial": best.number,
        "first_guess": first if guessed else None,
        "trials": len(study.ended),
        "failed": sum(each.value is None for each in study.ended),
        "optimizer": config.finetune.optimizer,
        "space": config.finetune.space,
        "model": config.model,
        "seed": config.seed,
    }


def _nothing(study: Study) -> str:
    reasons = [each.user_attrs.get("error", "") for each in study.ended]
    first = next((reason for reason in reasons if reason), "every value is infinite: the runs diverge")
    return f"none of {len(study.ended)} trials came to a value; the first: {first}"


class _progress:
    """A bar over trials on a terminal, a line a trial elsewhere, figures for the tracker."""

    def __init__(self, context: Context, study: Study) -> None:
        from tqdm import tqdm

        self._context, self._study = context, study
        self._told = {each.number for each in study.ended}
        self._bar = tqdm(
            total=context.config.tune.trials,
            initial=len(self._told),
            desc="tune",
            unit="trial",
            disable=None,
            file=sys.stderr,
        )

    def __enter__(self) -> Callable[[], None]:
        return self._look

    def __exit__(self, *_: object) -> None:
        self._look()
        self._bar.close()

    def _look(self) -> None:
        for each in self._study.ended:
            if each.number in self._told:
                continue
            self._told.add(each.number)
            self._bar.update(1)
            best = self._study.best
            if best and best.value is not None:
                self._bar.set_postfix(best=f"{best.value:.4f}", refresh=False)
            if self._bar.disable:
                self._context.say(f"  {line(each, self._study)}")
            if each.value is not None and math.isfinite(each.value):
                by = self._context.config.tune.by
                self._context.tracker.metrics({f"tune/{by}": each.value}, each.number)
