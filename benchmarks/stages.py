"""What DVC costs beside the stages that it runs: ``python -m benchmarks.stages [-- options of dvc repro]``.

Runs ``dvc repro`` in this checkout and looks, twenty times a second, which stage is at work. Seconds in which
none is are DVC's own. ``-- --force`` runs stages that DVC would take from its cache, and writes ``dvc.lock``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict

import psutil

from benchmarks.harness import Row, note

EVERY = 0.05  # seconds


def seconds(options: list[str]) -> tuple[float, dict[str, float]]:
    """Of the whole command, and of each stage in it."""
    at_work: defaultdict[str, float] = defaultdict(float)
    started = before = time.perf_counter()
    with psutil.Popen([sys.executable, "-m", "dvc", "repro", *options], stdout=sys.stderr) as dvc:
        while dvc.poll() is None:
            time.sleep(EVERY)
            now = time.perf_counter()
            at_work[_stage(dvc)] += now - before
            before = now
        if dvc.returncode:
            raise SystemExit(dvc.returncode)
    at_work.pop("", None)
    return time.perf_counter() - started, at_work


def _stage(dvc: psutil.Process) -> str:
    """The stage that it runs now, or nothing."""
    for process in dvc.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:  # it has just ended
            continue
        for word in words:
            if word.startswith("stages."):
                return word.removeprefix("stages.")
    return ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print one array of rows")
    parser.add_argument("options", nargs="*", help="of dvc repro")
    arguments = parser.parse_args()
    whole, at_work = seconds(arguments.options)
    note(", ".join(f"{stage} {spent:.1f} s" for stage, spent in at_work.items()))
    rows = [
        Row.of("dvc_repro", "seconds", [whole]),
        Row.of("dvc_share", "", [1 - sum(at_work.values()) / whole]),
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        for row in rows:
            print(f"{row.name:10} {row.value:9.4f}")


if __name__ == "__main__":
    main()
