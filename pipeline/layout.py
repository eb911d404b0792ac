"""Where everything lies. Directories are the contract between stages; only this module names them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PHASE = "phase-"  # and a number: what a phase of fine-tuning before the last left, in the last one's folder
DVC_EXPERIMENT = "DVC_EXP_NAME"  # what DVC tells the stages of an experiment


@dataclass(frozen=True)
class Layout:
    """The files of one run below ``root``: the project for ``dvc repro``, ``runs/<name>`` otherwise."""

    root: Path

    @property
    def name(self) -> str:
        """What the run is called: short, and like no other run of the project.

        ``dvc repro`` is ``repro``; an experiment of DVC's has its own name.
        """
        root, runs = self.root.resolve(), project_root() / "runs"
        if root == project_root():
            return os.environ.get(DVC_EXPERIMENT) or "repro"
        parts = root.relative_to(runs).parts if root.is_relative_to(runs) else (root.name,)
        if self.is_trial:  # runs/STUDY/tuning/DIGEST/trials/trial-003
            parts = (*parts[:-4], parts[-1])
        return "/".join(parts)

    @property
    def is_trial(self) -> bool:
        """Whether it is one of a study's."""
        return self.root.parent.name == "trials"

    @property
    def prepared(self) -> Path:
        """``task/`` and ``corpus/`` (saved datasets), ``card.json`` and ``card.md``."""
        return self.root / "data" / "prepared"

    @property
    def pretrained(self) -> Path:
        """The model after pretraining (``save_pretrained``), ``trajectory.jsonl``, ``metrics.json``."""
        return self.root / "models" / "pretrained"

    @property
    def tuned(self) -> Path:
        """What tuning found: parameters of the finetune stage, ``tuned.json``."""
        return self.root / "tuned.json"

    @property
    def files(self) -> Path:
        """The digests of the files of data that a study began with."""
        return self.root / "files.json"

    @property
    def tuning(self) -> Path:
        """Studies and their trials, which outlive the stage: one that is cut off goes on."""
        return self.root / "tuning"

    @property
    def finetuned(self) -> Path:
        """The model after fine-tuning, ``trajectory.jsonl``, ``metrics.json``."""
        return self.root / "models" / "finetuned"

    def outputs(self, stage: str) -> list[Path]:
        """What ``stage`` writes."""
        return {
            "prepare": [self.prepared],
            "pretrain": [self.pretrained, partial(self.pretrained), self.plots / "pretrain.csv"],
            "tune": [self.tuned],
            "finetune": [self.finetuned, partial(self.finetuned), self.plots / "finetune.csv"],
            "evaluate": [self.metrics, self.report, self.predictions, *sorted(self.plots.glob("*.png"))],
        }[stage]

    def last_written(self, stage: str) -> Path:
        """The file that says ``stage`` is done."""
        return {
            "prepare": self.prepared / "card.json",
            "pretrain": self.pretrained / "metrics.json",
            "tune": self.tuned,
            "finetune": self.finetuned / "metrics.json",
            "evaluate": self.report,
        }[stage]

    @property
    def metrics(self) -> Path:
        """The flat verdict of the run."""
        return self.root / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Loss and hit of each test target, in an order that all runs over the same data and model share."""
        return self.root / "predictions.csv"

    @property
    def plots(self) -> Path:
        """Pictures, and the curves as CSV files for ``dvc plots``."""
        return self.root / "plots"

    @property
    def report(self) -> Path:
        return self.root / "report.md"

    @property
    def ledger(self) -> Path:
        """Which tracked run made the results of which stage."""
        return self.root / ".tracked.json"

    @property
    def params(self) -> Path:
        """The configuration as used."""
        return self.root / "params.yaml"


def partial(folder: Path) -> Path:
    """Where ``folder`` is built before it takes its place; what a killed run leaves."""
    return folder.with_name(f".{folder.name}.partial")


def project_root() -> Path:
    """The project that commands work in, whatever the working directory.

    ``PIPELINE_HOME`` if set; else the nearest folder upward that holds ``dvc.yaml`` and ``params.yaml``; else
    the checkout this package is installed from; else the working directory.
    """
    if home := os.environ.get("PIPELINE_HOME"):
        return Path(home).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    return here


def cache_dir() -> Path:
    """Where fetched packages are kept between runs: ``PIPELINE_CACHE``, or a folder of the user's cache."""
    if cache := os.environ.get("PIPELINE_CACHE"):
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gradient-free-pipeline"
