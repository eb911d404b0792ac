"""What every benchmark shares: interleaved timing, rows with their spread, a table or JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

# a method that cannot be measured says why by `note` and gives no row
Measurement = Callable[[torch.device], "Row | None"]


@dataclass(frozen=True)
class Row:
    """A figure: the median of ``runs``, and the least and the largest."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float]) -> Row:
        return cls(name, statistics.median(values), unit, min(values), max(values), len(values))


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function, ``rounds`` times in turn, if ``warm`` after one call of each, not counted."""
    for function in functions.values() if warm else ():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _wait(device)
            started = time.perf_counter()
            function()
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: what disturbs a round disturbs both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def main(measurements: dict[str, Measurement]) -> None:
    """The command line of a benchmark: ``--only NAME``, ``--json``, ``--device``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=[*measurements], metavar="NAME", help=", ".join(measurements))
    parser.add_argument("--json", action="store_true", help="print one array of rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    note(_machine(device))
    rows: list[Row] = []
    for name in [arguments.only] if arguments.only else measurements:
        if (busy := os.getloadavg()[0]) > 0.5 * (os.cpu_count() or 1) and not rows:
            note(f"this machine is busy (load {busy:.1f}): do not trust the figures")
        if (row := measurements[name](device)) is None:
            continue
        rows.append(row)
        if not arguments.json:
            print(_line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


def _line(row: Row) -> str:
    spread = f"[{row.low:.4g}, {row.high:.4g}]"
    return f"{row.name:33} {row.value:10.4g} {row.unit:12} {spread:24} {row.runs} runs"


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def note(text: str) -> None:
    """Prints what is not a figure, to stderr."""
    print(f"# {text}", file=sys.stderr, flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
