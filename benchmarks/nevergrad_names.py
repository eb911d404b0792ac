"""Whether every name of nevergrad runs or refuses: ``python -m benchmarks.nevergrad_names [--json]``.

Each is created as ``nevergrad:NAME`` and asked and told 40 times on a quadratic in 6 coordinates; every tenth
loss is NaN, which the method takes as the worst. It has *run* if it then recommends a finite point. It has
*refused* if it stopped with one line that says what to do; a line that only passes on what went wrong inside
nevergrad counts as *failed*, and so does anything else. A name that runs although `Nevergrad.variants` notes
that it misses a package has failed too, as has the reverse. What did not run is listed on stderr.

Each name has a process of its own, which is ended after a minute.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from functools import cache, partial
from multiprocessing.connection import Connection

import torch

from benchmarks.harness import Row, main, note
from pipeline.errors import UserError
from pipeline.optimizer import AskTellOptimizer, Problem
from pipeline.registry import Spec, Variant, create
from plugins.nevergrad import Nevergrad

SIZE, EVALUATIONS = 6, 40
LIMIT = 60.0  # seconds for one name
OUTCOMES = ("ran", "refused", "failed")


def drive(name: str) -> None:
    """All evaluations of one name, through the registry.

    Raises:
        UserError: it refused.
        ValueError: it recommends a point that is not finite.
    """
    optimizer = create(Spec("nevergrad", name), Problem(SIZE, "projection", EVALUATIONS, 0))
    assert isinstance(optimizer, AskTellOptimizer)
    for evaluation in range(EVALUATIONS):
        (candidate,) = optimizer.method.ask()
        loss = float((candidate.coordinates + 0.3).square().sum())
        optimizer.method.tell([candidate], [float("nan") if evaluation % 10 == 9 else loss])
    if not optimizer.method.recommend().isfinite().all():
        raise ValueError("recommends a point that is not finite")


def attempt(name: str) -> tuple[str, str]:
    """One of `OUTCOMES`, and the line that explains it."""
    try:
        drive(name)
    except UserError as error:
        line = str(error).removeprefix(f"nevergrad:{name} ")
        unclear = "\n" in line or line.startswith("failed with")
        return ("failed" if unclear else "refused"), line
    except Exception as error:
        return "failed", repr(error)
    return "ran", ""


def checked(variant: Variant, kind: str, line: str) -> tuple[str, str]:
    """The outcome and its line, or failed where they belie the variant's note."""
    noted = variant.note.startswith("needs ")
    if kind == "ran" and noted:
        return "failed", f"ran, though it is listed as one that {variant.note}"
    if kind == "refused" and not (noted and variant.note in line):
        return "failed", f"listed with the note '{variant.note}', but {line}"
    return kind, line


def _within_limit(name: str) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT) else ("failed", f"not done after {LIMIT:g} seconds")
    except EOFError:
        return "failed", "its process ended without an answer"
    finally:
        process.kill()
        process.join()


def _report(name: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    answer.send(attempt(name))


@cache
def outcomes() -> dict[str, dict[str, list[str]]]:
    """Names by outcome and line; what did not run is noted."""
    drive("OnePlusOne")  # imports everything
    found: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in OUTCOMES}
    for variant in Nevergrad.variants():
        kind, line = checked(variant, *_within_limit(variant.name))
        found[kind][line].append(variant.name)
    for kind in ("refused", "failed"):
        for line, names in found[kind].items():
            note(f"{kind}: {', '.join(names)}: {line}")
    return found


def count(kind: str, _device: torch.device) -> Row:
    return Row.of(f"nevergrad/{kind}", "names", [sum(map(len, outcomes()[kind].values()))])


if __name__ == "__main__":
    main({f"nevergrad/{kind}": partial(count, kind) for kind in OUTCOMES})
