"""The review of runs in a browser: MLflow's own server, started for one person and set to the runs table.

MLflow 3 opens on its page for traces and shows a table without a single result. The link printed here names
a *shared view*: what MLflow's Share button stores, an experiment tag with filter, order and columns, which a
browser without history shows at once (``mlflow/server/js``: ``mlflow.sharedViewState.<key>``, read for
``?viewStateShareKey=<key>``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.tracking.store import EXPERIMENT, KIND, QUIET, mlruns, store_uri

VIEW = "pipeline"
PORTS_TRIED = 50
# An import of mlflow twice over and a fresh database, on a busy machine.
START_SECONDS = 120.0
BOARD = "tags.leaderboard = 'true'"
# What the table shows, in this order, with its width in pixels.
COLUMNS = {
    "params.`finetune.optimizer`": 160,
    "params.`finetune.space`": 90,
    "params.`finetune.epsilon`": 90,
    "params.`finetune.sigma`": 90,
    "params.`finetune.learning_rate`": 110,
    "metrics.`forward_passes`": 120,
    "metrics.`validation/loss`": 120,
    "metrics.`test/accuracy`": 115,
    "metrics.`test/accuracy_low`": 145,
    "metrics.`test/accuracy_high`": 150,
    "metrics.`zero_shot/accuracy`": 145,
    "metrics.`linear_probe/accuracy`": 160,
    "metrics.`adamw/accuracy`": 130,
    "metrics.`seconds`": 85,
    "metrics.`peak_memory_mib`": 130,
}
FIXED = {"attributes.`Run Name`": 190, "runDateAndNestInfo": 125}


def serve(port: int = 5000, host: str = "127.0.0.1", open_browser: bool = False) -> None:
    """Serves the project's runs until Ctrl-C; prints the link once it answers.

    Raises:
        UserError: mlflow is missing, the store is a server already, no port is free, or the server ends.
    """
    store = store_uri()
    if store.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI names a server that runs already: open {store}")
    chosen = _free_port(host, port)
    if chosen != port:
        print(f"port {port} is taken, using {chosen}", flush=True)
    mlruns().mkdir(parents=True, exist_ok=True)
    log = mlruns() / "ui.log"
    with log.open("w+", encoding="utf-8") as output, _server(store, host, chosen, output) as process:
        address = f"http://{'localhost' if host in ('0.0.0.0', '::') else host}:{chosen}"
        _wait(process, address, log)
        link = _runs_table(address)
        print(f"{link}\nCtrl-C stops it.", flush=True)
        if open_browser:
            webbrowser.open(link)
        process.wait()
    raise UserError(f"the MLflow server stopped: {_last_line(log)}")


def _free_port(host: str, port: int) -> int:
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except PermissionError:
                raise UserError(f"--port {port} needs root; choose one above 1023") from None
            except socket.gaierror:
                raise UserError(f"--host {host} is no address of this machine") from None
            except OSError:
                continue
        return candidate
    raise UserError(f"no free port from {port} on {host}; choose another --port or --host")


@contextlib.contextmanager
def _server(store: str, host: str, port: int, output: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """MLflow's server as a subprocess that never outlives the block, be it left by Ctrl-C or SIGTERM."""
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--default-artifact-root", (mlruns() / "artifacts").as_uri(), "--workers", "1"]
    command += ["--host", host, "--port", str(port)]
    environment = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # mlflow reads its options from these too
    environment.pop("MLFLOW_TRACKING_URI", None)
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield process
    except KeyboardInterrupt:
        print("stopped", flush=True)
        raise SystemExit(0) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop(process)


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the server and its workers; those that do not listen within five seconds are killed."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    everyone = [psutil.Process(process.pid), *family] if process.poll() is None else family
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    for each in psutil.wait_procs(everyone, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def _wait(process: subprocess.Popen[str], address: str, log: Path) -> None:
    """Waits until the server answers.

    Raises:
        UserError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    why = "did not start" if process.poll() is not None else "does not answer"
    raise UserError(f"the MLflow server {why}: {_last_line(log)} (see {log})")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


def _runs_table(address: str) -> str:
    """Stores the view in the experiment, which is made if it is not there; the link to it."""
    experiment = _experiment(address)
    some = _call(address, "runs/search", experiment_ids=[experiment], max_results=1)
    if not some.get("runs"):
        print("no runs yet: `dvc repro` or `pipeline run` makes one", flush=True)
    done = _call(address, "runs/search", experiment_ids=[experiment], max_results=1, filter=BOARD)
    view = json.dumps(view_state(BOARD if done.get("runs") else ""))
    for key, value in ((f"mlflow.sharedViewState.{VIEW}", view), KIND):
        _call(address, "experiments/set-experiment-tag", experiment_id=experiment, key=key, value=value)
    # the workflow type takes the pages for chat traces out of the sidebar
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{address}/#/experiments/{experiment}/runs?{query}"


def view_state(search: str) -> dict[str, Any]:
    """What the page is set to: the newest run first, ``COLUMNS`` beside the name and the date."""
    return {
        "searchFilter": search,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "columnOrder": [*FIXED, *COLUMNS],
        "columnWidths": FIXED | COLUMNS,
    }


def _experiment(address: str) -> str:
    try:
        found = _call(address, f"experiments/get-by-name?experiment_name={EXPERIMENT}")
        return str(found["experiment"]["experiment_id"])
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    place = (mlruns() / "artifacts").as_uri()
    made = _call(address, "experiments/create", name=EXPERIMENT, artifact_location=place)
    return str(made["experiment_id"])


def _call(address: str, method: str, **body: Any) -> dict[str, Any]:
    """One call of MLflow's REST API; a GET where there is no body."""
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{method}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        content: dict[str, Any] = json.load(response)
    return content
