"""The other process: ``python -m pipeline.tracking.scribe`` writes into MLflow what it is told."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.tracking.store import EXPERIMENT, KIND, milliseconds

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# What one call of log_batch takes (mlflow.utils.validation).
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 1000, 100, 100
LOCK_SECONDS = 60.0
PARENT_SECONDS = 30.0  # well under what the end of a run waits for its scribe
RUN = "pipeline.run"  # the tag that holds what a run is called here


def main() -> None:
    """Reads messages from stdin until it ends, answers on stdout.

    A run that is open when stdin ends was killed with its process, and is marked so.
    """
    # mlflow prints; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    # Reading never waits for mlflow, or a full pipe would hold up training.
    threading.Thread(target=_read, args=(sys.stdin, messages), daemon=True).start()
    book = _Book(answers)
    while (message := messages.get()) is not None:
        book.take(message)
    book.close()


def _read(stream: IO[str], messages: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        messages.put(json.loads(line))
    messages.put(None)


class _Book:
    """Writes messages into MLflow. A store that fails is reported once and never fatal."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._stores: dict[str, tuple[MlflowClient, str]] = {}
        self._runs: dict[str, tuple[MlflowClient, str]] = {}
        self._warned: set[str] = set()

    def take(self, message: dict[str, Any]) -> None:
        run, do = message.pop("run"), message.pop("do")
        try:
            if do == "start":
                self._start(run, **message)
            elif run in self._runs:
                getattr(self, f"_{do}")(*self._runs[run], **message)
        except Exception as error:  # whatever a store may raise: tracking never stops a run
            self._warn(message.get("uri", run), error)
        if do == "end":
            self._runs.pop(run, None)
            self._answer({"ended": run})

    def close(self) -> None:
        """Marks the runs that nobody ended."""
        for run in list(self._runs):
            end = {"status": "KILLED", "at": milliseconds()}
            self.take({"do": "log", "run": run, "tags": {"error": "the process was killed"}})
            self.take({"do": "end", "run": run, **end})

    def _start(
        self,
        run: str,
        uri: str,
        name: str,
        at: int,
        tags: dict[str, str],
        artifacts: str | None = None,
        parent: str | None = None,
        again: bool = False,
    ) -> None:
        if uri not in self._stores:
            self._stores[uri] = _open(uri, artifacts)
        client, experiment = self._stores[uri]
        if again and (known := _find(client, experiment, run)):
            client.update_run(known, status="RUNNING")
            self._runs[run] = client, known
            return
        tags = {**tags, RUN: run}
        if parent and (above := self._parent(client, experiment, parent)):
            tags["mlflow.parentRunId"] = above
        made = client.create_run(experiment, start_time=at, tags=tags, run_name=name)
        self._runs[run] = client, made.info.run_id

    def _parent(self, client: MlflowClient, experiment: str, run: str) -> str | None:
        """MLflow's id of a run that this process or another one began; its process may not be so far yet."""
        if run in self._runs:
            return self._runs[run][1]
        patience = time.monotonic() + PARENT_SECONDS
        while (found := _find(client, experiment, run)) is None and time.monotonic() < patience:
            time.sleep(1.0)
        return found

    def _log(
        self,
        client: MlflowClient,
        run_id: str,
        metrics: Iterable[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        for some in _chunks([Param(*item) for item in (params or {}).items()], PARAMS_A_CALL):
            client.log_batch(run_id, params=some)
        for some in _chunks([RunTag(*item) for item in (tags or {}).items()], TAGS_A_CALL):
            client.log_batch(run_id, tags=some)
        for some in _chunks([Metric(*item) for item in metrics], METRICS_A_CALL):
            client.log_batch(run_id, metrics=some)

    def _artifact(self, client: MlflowClient, run_id: str, path: str, folder: str) -> None:
        client.log_artifact(run_id, path, folder or None)

    def _dataset(self, client: MlflowClient, run_id: str, name: str, digest: str, source: str) -> None:
        from mlflow.entities import Dataset, DatasetInput

        data = Dataset(name, digest, source_type="local", source=json.dumps({"uri": source}))
        client.log_inputs(run_id, [DatasetInput(data, tags=[])])

    def _end(self, client: MlflowClient, run_id: str, status: str, at: int) -> None:
        client.set_terminated(run_id, status=status, end_time=at)

    def _warn(self, about: str, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if about not in self._warned:
            self._warned.add(about)
            self._answer({"warning": f"MLflow: {reason[:200]}"})

    def _answer(self, answer: dict[str, str]) -> None:
        try:
            print(json.dumps(answer), file=self._answers, flush=True)
        except OSError:  # the run's process is gone; the book is finished all the same
            return


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _find(client: MlflowClient, experiment: str, run: str) -> str | None:
    """MLflow's id of the run that is called ``run`` here."""
    found = client.search_runs([experiment], f"tags.`{RUN}` = '{run}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _open(uri: str, artifacts: str | None) -> tuple[MlflowClient, str]:
    """A client and the experiment's id. One process at a time makes a database and its experiment."""
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite:///"):
        client = MlflowClient(uri)
        return client, _experiment(client, artifacts)
    from filelock import FileLock

    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        client = MlflowClient(uri)
        return client, _experiment(client, artifacts)


def _experiment(client: MlflowClient, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        tags = dict([KIND])
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts, tags=tags))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


if __name__ == "__main__":
    main()
