"""Prompted sentiment in the layout of MeZO's tables: ``python -m benchmarks.prompted FOLDER``.

After Malladi et al. (2023), with 16 and 512 texts of each label. SmolLM2-135M, prompted as in
examples/sentiment-smollm2.yaml: as it is, shown solved examples, under a linear probe, moved by SPSA through
all weights, LoRA's factors or a soft prompt, and by AdamW. Every run is a command, of one thread; what is in
FOLDER already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import note

EXAMPLE = Path(__file__).parent.parent / "examples" / "sentiment-smollm2.yaml"
SHOTS = (16, 512)
# epsilon and learning rate, found on validation with 512 shots and a seed that is not reported
SPACES = {
    "full": (1e-3, 1e-5),
    "lora,rank=8": (0.01, 0.02),
    "prompt,tokens=10,dimension=0": (0.03, 0.1),
}
YARDSTICKS = ("majority", "zero_shot", "in_context", "linear_probe")
WITH_YARDSTICKS = "lora,rank=8"  # the space of the run that also measures them


class Setting(NamedTuple):
    """One run."""

    shots: int
    space: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.space.partition(',')[0]}-{self.shots}-{self.seed}"


def ran(setting: Setting, folder: Path, passes: int, tests: int) -> dict[str, float]:
    """Its figures, by ``pipeline run`` if there are none yet."""
    metrics = folder / "runs" / setting.name / "metrics.json"
    if not metrics.is_file():
        epsilon, rate = SPACES[setting.space]
        values = {
            "prepare.shots": setting.shots,
            "prepare.test_size": tests,
            "finetune.space": setting.space,
            "finetune.epsilon": epsilon,
            "finetune.learning_rate": rate,
            "finetune.forward_passes": passes,
            "finetune.evaluate_every": passes,
            "evaluate.baselines": str(setting.space == WITH_YARDSTICKS).lower(),
            "evaluate.adamw": "true",
        }
        command = [sys.executable, "-m", "pipeline", "run", "--config", str(EXAMPLE)]
        command += ["--name", setting.name, "--seed", str(setting.seed)]
        for key, value in values.items():
            command += ["-S", f"{key}={value}"]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = os.environ | threads | {"PIPELINE_HOME": str(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{setting.name}: {done.stderr.strip()[-500:]}")
        note(f"{setting.name} is there")
    found: dict[str, float] = json.loads(metrics.read_text(encoding="utf-8"))
    return found


def table(found: dict[Setting, dict[str, float]]) -> list[list[str]]:
    """Rows of method, and mean ± standard deviation of the accuracy for each number of shots."""
    rows = []
    for figure in YARDSTICKS:
        rows.append([figure, *(_spread(found, shots, WITH_YARDSTICKS, figure) for shots in SHOTS)])
    for space in SPACES:
        rows.append([f"spsa, {space}", *(_spread(found, shots, space, "test") for shots in SHOTS)])
    rows.append(["adamw", *(_spread(found, shots, WITH_YARDSTICKS, "adamw") for shots in SHOTS)])
    return rows


def _spread(found: dict[Setting, dict[str, float]], shots: int, space: str, figure: str) -> str:
    those = [each for setting, each in found.items() if (setting.shots, setting.space) == (shots, space)]
    values = [100 * each[f"{figure}/accuracy"] for each in those if f"{figure}/accuracy" in each]
    if not values:
        return "none"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--tests", type=int, default=400, help="sentences of the test")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    spaces = sorted(SPACES, key=lambda space: space != WITH_YARDSTICKS)  # the longest first
    settings = [
        Setting(shots, space, seed) for space in spaces for shots in SHOTS for seed in range(arguments.seeds)
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        figures = pool.map(lambda each: ran(each, folder, arguments.passes, arguments.tests), settings)
        found = dict(zip(settings, figures, strict=True))
    for method, *cells in [["", *(f"{shots} shots" for shots in SHOTS)], *table(found)]:
        print("| " + " | ".join([method, *cells]) + " |")


if __name__ == "__main__":
    main()
