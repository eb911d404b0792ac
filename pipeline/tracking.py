"""MLflow, one run per stage execution; and nothing where there is none.

Importing mlflow and opening its database costs some 5 s of processor time in every process, and a locked or
unreachable store can cost minutes. So none of it happens here: a second process, the scribe, imports mlflow
while this one imports torch, and writes down what it is told over a pipe, one JSON object a line. Training
neither waits for it nor fails with it, and when training is killed the scribe still closes the run.

The first half of this module is what stages use; the second, from `scribe` on, runs in the other process
(``python -m pipeline.tracking``).
"""

from __future__ import annotations

import atexit
import getpass
import importlib.util
import json
import math
import os
import platform
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.config import SECTIONS, Config
from pipeline.layout import Layout, project_root

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "gradient-free"
# The kind decides which pages MLflow 3 offers: those of training runs, not of traces.
KIND = ("mlflow.experimentKind", "custom_model_development")
FLUSH_SECONDS = 10.0
# How long the end of a run waits for the scribe: an import and a fresh database take under 20 s on 2 cores.
PATIENCE_SECONDS = 60.0
# What one call of log_batch takes (mlflow.utils.validation).
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 1000, 100, 100

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment for a process that imports mlflow: nothing is sent to its makers, nothing is chatted."""

Send = Callable[[dict[str, Any]], None]


def store_uri() -> str:
    """Where runs are noted: ``MLFLOW_TRACKING_URI`` if set, else ``mlruns/mlflow.db`` of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(mlruns() / 'mlflow.db').as_posix()}"


def mlruns() -> Path:
    """The folder of the project's own store; its artifacts are under ``artifacts``."""
    return project_root() / "mlruns"


class Tracker:
    """Notes one run. Every method returns at once; none raises when tracking fails."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._metrics: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters as used; each is set once in a run."""
        self._send({"do": "log", "params": {key: str(value) for key, value in values.items()}})

    def metrics(self, values: Mapping[str, float], forward_passes: int) -> None:
        """Figures measured after so many forward passes (MLflow's step).

        They are kept here and sent every ``FLUSH_SECONDS``. What is not finite is noted as NaN: MLflow would
        write infinity as 1.8e308, and no chart would show anything else.
        """
        now = _milliseconds()
        for key, value in values.items():
            self._metrics.append((key, value if math.isfinite(value) else math.nan, now, forward_passes))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def tags(self, values: Mapping[str, Any]) -> None:
        """Words about the run; a later value replaces an earlier one."""
        self._send({"do": "log", "tags": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps a copy of the file ``path`` in the run's ``folder``; it must stay until the run ends."""
        self._send({"do": "artifact", "path": str(path.resolve()), "folder": folder})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The data the run used; ``digest`` is cut to the 36 characters MLflow takes."""
        self._send({"do": "dataset", "name": name, "digest": digest[:36], "source": source})

    def flush(self) -> None:
        """Sends the figures kept so far."""
        if self._metrics:
            self._send({"do": "log", "metrics": self._metrics})
        self._metrics = []
        self._flushed = time.monotonic()


@contextmanager
def track(stage: str, config: Config, layout: Layout) -> Iterator[Tracker]:
    """A tracked run of ``stage``: FINISHED, FAILED when an exception leaves it, KILLED on Ctrl-C.

    ``PIPELINE_TRACKING=off``, or no mlflow installed: a tracker that does nothing. A store that cannot be
    reached costs one line on stderr.
    """
    scribe = _the_scribe()
    if scribe is None:
        yield Tracker(lambda message: None)
        return
    run = uuid.uuid4().hex
    tracker = Tracker(lambda message: scribe.send({"run": run, **message}))
    _start(tracker, scribe, run, stage, config, layout)
    status = "FINISHED"
    try:
        yield tracker
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException as error:
        status = "FAILED"
        tracker.tags({"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        raise
    finally:
        if stage == "prepare":
            _note_data(tracker, layout)
        tracker.flush()
        scribe.end(run, status)


def _start(tracker: Tracker, scribe: _Scribe, run: str, stage: str, config: Config, layout: Layout) -> None:
    commit = _commit()
    own = layout.root.resolve() != project_root()
    name = layout.root.name if own else "-".join(["repro", *([commit[:7]] if commit else [])])
    message: dict[str, Any] = {"do": "start", "run": run, "uri": store_uri(), "name": f"{name}/{stage}"}
    message["at"] = _milliseconds()
    if message["uri"].startswith("sqlite:"):
        message["artifacts"] = (mlruns() / "artifacts").as_uri()
    scribe.send({**message, "tags": _tags(stage, config, commit)})
    tracker.params(_params(stage, config))
    if stage != "prepare":
        _note_data(tracker, layout)


def _params(stage: str, config: Config) -> dict[str, Any]:
    """What the stage reads: its section and what stands above all sections; evaluate reads everything."""
    others = set(SECTIONS) - {stage} if stage != "evaluate" else set()
    return {key: value for key, value in config.flat().items() if key.split(".")[0] not in others}


def _tags(stage: str, config: Config, commit: str) -> dict[str, str]:
    tags = {
        "stage": stage,
        "device": _device(config),
        "machine": f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "mlflow.source.name": f"stages/{stage}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    if stage != "prepare":
        training = config.pretrain if stage == "pretrain" else config.finetune
        tags.update(optimizer=training.optimizer, space=training.space)
    if commit:
        bare = commit.removesuffix("-dirty")
        tags.update({"git.commit": bare, "git.dirty": str(bare != commit).lower()})
        tags["mlflow.source.git.commit"] = bare
    return tags


def _device(config: Config) -> str:
    """The device chosen; torch is not imported only to say so."""
    if config.device != "auto" or "torch" not in sys.modules:
        return config.device
    from pipeline.models import choose_device

    return str(choose_device("auto"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _commit() -> str:
    """The project's commit, with ``-dirty`` behind it if tracked files were changed; empty without git."""
    command = ["git", "-C", str(project_root()), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _note_data(tracker: Tracker, layout: Layout) -> None:
    """The hash of the prepared data, if there is any."""
    path = layout.prepared / "card.json"
    if not path.is_file():
        return
    card = json.loads(path.read_text(encoding="utf-8"))
    if digest := card.get("hash"):
        sources = [source["source"] for source in card.get("sources", [])]
        tracker.tags({"data": digest})
        tracker.dataset(sources[0] if sources else "data", digest, str(layout.prepared))


def _milliseconds() -> int:
    """The time as MLflow counts it, from 1970."""
    return int(time.time() * 1000)


class _Scribe:
    """The other process, as seen from this one."""

    def __init__(self) -> None:
        # Its own session: Ctrl-C and a kill of the process group must leave it time to close the run.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**_patience(), **os.environ, **QUIET},
            start_new_session=True,
        )
        self._ended: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone, and `end` says so
            return

    def end(self, run: str, status: str) -> None:
        """Closes the run and waits until all of it is written."""
        self.send({"do": "end", "run": run, "status": status, "at": _milliseconds()})
        patience = time.monotonic() + PATIENCE_SECONDS
        while self.alive and time.monotonic() < patience:
            try:
                if self._ended.get(timeout=0.2) == run:
                    return
            except queue.Empty:
                continue
        _warn("the run was not written in time" if self.alive else "mlflow's process ended early")

    def close(self) -> None:
        """Lets it go; it ends when it has read everything."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            if "warning" in answer:
                _warn(answer["warning"])
            else:
                self._ended.put(answer["ended"])


_scribe: _Scribe | None = None


def _the_scribe() -> _Scribe | None:
    """This process's scribe, started when first asked for; none where tracking is off."""
    global _scribe
    if os.environ.get("PIPELINE_TRACKING", "").lower() == "off":
        return None
    if importlib.util.find_spec("mlflow") is None:
        return None
    if _scribe is None or not _scribe.alive:
        _scribe = _Scribe()
    return _scribe


def _patience() -> dict[str, str]:
    """mlflow retries a server for minutes; a user's own setting wins."""
    return {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def _warn(text: str) -> None:
    print(f"tracking: {text}; the run itself goes on", file=sys.stderr, flush=True)


def scribe() -> None:
    """The other process: reads messages from stdin until it ends, answers on stdout.

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
            end = {"status": "KILLED", "at": _milliseconds()}
            self.take({"do": "log", "run": run, "tags": {"error": "the process was killed"}})
            self.take({"do": "end", "run": run, **end})

    def _start(
        self, run: str, uri: str, name: str, at: int, tags: dict[str, str], artifacts: str | None = None
    ) -> None:
        if uri not in self._stores:
            self._stores[uri] = _open(uri, artifacts)
        client, experiment = self._stores[uri]
        made = client.create_run(experiment, start_time=at, tags=tags, run_name=name)
        self._runs[run] = client, made.info.run_id

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


def _open(uri: str, artifacts: str | None) -> tuple[MlflowClient, str]:
    """A client and the experiment's id. One process at a time makes a database and its experiment."""
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite:///"):
        client = MlflowClient(uri)
        return client, _experiment(client, artifacts)
    from filelock import FileLock

    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=PATIENCE_SECONDS):
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
    scribe()
