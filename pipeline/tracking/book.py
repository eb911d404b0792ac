"""Writes what was told of runs into one MLflow store. Told twice, it is written once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.layout import PHASE
from pipeline.tracking.store import EXPERIMENT, KIND

# What one call of log_batch takes (mlflow.utils.validation).
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 1000, 100, 100
LOCK_SECONDS = 60.0
PARENT_SECONDS = 30.0  # well under what the end of a run waits for its scribe
ABOUT_THE_STORE = ("uri", "artifacts")  # of the message that starts a run
RUN, PARENT = "pipeline.run", "pipeline.parent"  # tags: what a run is called here, and what it is a part of


MODEL = "model"  # the folder of a run's artifacts that holds it


class Rejected(Exception):
    """What MLflow will never take: sending it again would change nothing."""


class Book:
    """The store at ``uri``; opened when made.

    A run is known by what it is called here (the tag ``pipeline.run``), not by MLflow's id, so a message that
    was written before the connection broke does no harm when it comes again: MLflow itself drops a metric, a
    parameter and a data set that it has already.

    Raises:
        Exception: whatever MLflow raises for a store that cannot be reached; so does every method.
    """

    def __init__(self, uri: str, artifacts: str | None) -> None:
        self._client, self._experiment = _open(uri, artifacts)
        self._ids: dict[str, str] = {}

    def write(self, run: str, message: Mapping[str, Any]) -> None:
        """Writes one message of ``run``.

        Raises:
            Rejected: MLflow refuses it as such, or the file it names is not there.
        """
        from mlflow.exceptions import MlflowException

        words = {key: value for key, value in message.items() if key not in ("do", *ABOUT_THE_STORE)}
        try:
            if message["do"] == "start":
                self._start(run, **words)
            else:
                getattr(self, f"_{message['do']}")(self._ids[run], **words)
        except (FileNotFoundError, KeyError) as error:
            raise Rejected(str(error)) from error
        except MlflowException as error:
            if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                raise Rejected(error.message) from error
            raise

    def register(self, run: str, folder: Path, model: str) -> str:
        """Keeps ``folder`` with the run and makes it the next version of ``model``; the version.

        The models of earlier phases that lie in it are left out.

        Raises:
            Rejected: the store has no such run, or refuses the name.
        """
        from mlflow.exceptions import MlflowException

        identity = self._find(run)
        if identity is None:
            raise Rejected("it has not heard of the run; see pipeline sync")
        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise Rejected(error.message) from error
        for each in sorted(folder.iterdir()):
            if each.is_file():
                self._client.log_artifact(identity, str(each), MODEL)
            elif not each.name.startswith(PHASE):
                self._client.log_artifacts(identity, str(each), f"{MODEL}/{each.name}")
        source = f"{self._client.get_run(identity).info.artifact_uri}/{MODEL}"
        return str(self._client.create_model_version(model, source, identity).version)

    def _start(
        self,
        run: str,
        name: str,
        at: int,
        tags: dict[str, str],
        parent: str | None = None,
        late: bool = False,
    ) -> None:
        """Begins the run, or goes on with it where it is there. ``late``: nobody is at its parent now."""
        known = self._ids.get(run) or self._find(run)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            if "error" in self._client.get_run(known).data.tags:  # of how it was cut off
                self._client.delete_tag(known, "error")
            self._ids[run] = known
            return
        tags = {**tags, RUN: run}
        if parent:
            tags[PARENT] = parent
            if above := self._parent(parent, 0.0 if late else PARENT_SECONDS):
                tags["mlflow.parentRunId"] = above
        made = self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)
        self._ids[run] = made.info.run_id
        if late:
            self._adopt(run)

    def _parent(self, run: str, patience: float) -> str | None:
        """MLflow's id of a run that this process or another one began, which may not be so far yet."""
        if run in self._ids:
            return self._ids[run]
        until = time.monotonic() + patience
        while (found := self._find(run)) is None and time.monotonic() < until:
            time.sleep(1.0)
        return found

    def _adopt(self, run: str) -> None:
        """Puts the parts of ``run`` under it that were there before it."""
        for part in self._client.search_runs([self._experiment], f"tags.`{PARENT}` = '{run}'"):
            self._client.set_tag(part.info.run_id, "mlflow.parentRunId", self._ids[run])

    def _find(self, run: str) -> str | None:
        """MLflow's id of the run that is called ``run`` here."""
        found = self._client.search_runs([self._experiment], f"tags.`{RUN}` = '{run}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _log(
        self,
        run_id: str,
        metrics: Iterable[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        for some in _chunks([Param(*item) for item in (params or {}).items()], PARAMS_A_CALL):
            self._client.log_batch(run_id, params=some)
        for some in _chunks([RunTag(*item) for item in (tags or {}).items()], TAGS_A_CALL):
            self._client.log_batch(run_id, tags=some)
        for some in _chunks([Metric(*item) for item in metrics], METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=some)

    def _artifact(self, run_id: str, path: str, folder: str) -> None:
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(run_id, path, folder or None)

    def _dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        from mlflow.entities import Dataset, DatasetInput

        data = Dataset(name, digest, source_type="local", source=json.dumps({"uri": source}))
        self._client.log_inputs(run_id, [DatasetInput(data, tags=[])])

    def _end(self, run_id: str, status: str, at: int) -> None:
        self._client.set_terminated(run_id, status=status, end_time=at)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _open(uri: str, artifacts: str | None) -> tuple[Any, str]:
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


def _experiment(client: Any, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        tags = dict([KIND])
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts, tags=tags))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)
