"""Where runs are noted, and how MLflow is kept quiet."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pipeline.layout import project_root

EXPERIMENT = "gradient-free"
# The kind decides which pages MLflow 3 offers: those of training runs, not of traces.
KIND = ("mlflow.experimentKind", "custom_model_development")

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment for a process that imports mlflow: nothing is sent to its makers, nothing is chatted."""

# mlflow retries a server for minutes; a user's own setting wins
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def store_uri() -> str:
    """Where runs are noted: ``MLFLOW_TRACKING_URI`` if set, else ``mlruns/mlflow.db`` of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(mlruns() / 'mlflow.db').as_posix()}"


def mlruns() -> Path:
    """The folder of the project's own store; its artifacts are under ``artifacts``.

    DVC runs queued and temporary experiments in copies of the project, under its ``.dvc/tmp/exps``: what
    they note belongs to the project.
    """
    root = project_root()
    for folder in (root, *root.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2] / "mlruns"
    return root / "mlruns"


def milliseconds() -> int:
    """The time as MLflow counts it, from 1970."""
    return int(time.time() * 1000)


def killed() -> list[dict[str, Any]]:
    """The messages that end a run whose process did not."""
    return [
        {"do": "log", "tags": {"error": "the process was killed"}},
        {"do": "end", "status": "KILLED", "at": milliseconds()},
    ]
