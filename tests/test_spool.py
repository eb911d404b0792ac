"""What MLflow does not get is kept in files and sent later, once, by a real scribe to a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, TuneConfig
from pipeline.layout import Layout
from pipeline.tracking import spool, track
from pipeline.tracking.book import Book, Rejected
from pipeline.tracking.store import store_uri

# sqlalchemy, of what mlflow does to it
pytestmark = pytest.mark.filterwarnings("ignore:The .*noload.* loader strategy")

KILLED = """
import os, pathlib, signal, sys
from pipeline.config import Config
from pipeline.layout import Layout
from pipeline.tracking import track
with track("finetune", Config(), Layout(pathlib.Path(sys.argv[1]))) as tracker:
    tracker.metrics({"loss": 3.0}, 1)
    tracker.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "PIPELINE_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A tracking server as a user starts one, its store in ``folder``."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    folder.mkdir()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while not _answers(port):
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def sync() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "sync"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def patiently(done: Any) -> None:
    until = time.monotonic() + 300
    while not done():
        assert time.monotonic() < until, spool.waiting(spool.folder())
        time.sleep(0.2)


def test_an_absent_server_gets_it_once_it_is_there(
    home: Path, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    trial = Layout(home / "runs" / "study" / "tuning" / "0" / "trials" / "trial-000")
    (model := trial.root / "model").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (curve := trial.root / "curve.csv").write_text("1,2")
    study = Layout(home / "runs" / "study")
    with (
        track("tune", Config(tune=TuneConfig(enabled=True)), study) as whole,
        track("finetune", Config(), trial, parent=whole.id) as tracker,
    ):
        tracker.metrics({"loss": 1.0}, 1)
        tracker.artifact(curve, "plots")
        tracker.artifact(model, "model")
    shutil.rmtree(trial.root)  # what is kept does not hang on the run's own folder
    assert capfd.readouterr().err.count("\n") == 1
    subprocess.run([sys.executable, "-c", KILLED, str(home / "runs" / "killed")], check=False)
    patiently(lambda: len(spool.waiting(spool.folder())) == 3)
    absent = sync()
    assert absent.returncode == 2
    assert absent.stderr.count("\n") == 1
    assert "3 runs wait in" in absent.stderr

    with server(home / "server", port):
        assert sync().stdout == "3 runs of 3 sent\n"
        assert sync().stdout == "nothing waits to be sent\n"
    database = home / "server" / "mlflow.db"
    assert rows(database, "select name, status from runs order by name") == [
        ("killed/finetune", "KILLED"),
        ("study/trial-000/finetune", "FINISHED"),
        ("study/tune", "FINISHED"),
    ]
    assert sorted(rows(database, "select value from metrics")) == [(1.0,), (3.0,)]
    [(identity,)] = rows(database, "select run_uuid from runs where name = 'study/tune'")
    assert rows(database, "select value from tags where key = 'mlflow.parentRunId'") == [(identity,)]
    kept = sorted(path.name for path in (home / "server" / "artifacts").rglob("*.*") if path.is_file())
    assert kept == ["config.json", "curve.csv"]
    assert not list(spool.folder().iterdir())


def test_the_next_run_sends_what_waits(home: Path) -> None:
    (home / "mlruns").mkdir()
    (home / "mlruns" / "mlflow.db").write_text("no database" * 100)
    for name in ("first", "second"):
        with track("pretrain", Config(), Layout(home / "runs" / name)) as tracker:
            tracker.metrics({"loss": 2.0}, 1)
    assert len(spool.waiting(spool.folder())) == 2
    (home / "mlruns" / "mlflow.db").unlink()
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(30)")
    live = subprocess.Popen([sys.executable, "-c", script, str(home / "runs" / "live")])
    try:
        patiently(lambda: len(spool.waiting(spool.folder())) == 1)
        assert sync().stderr.endswith("another process is at them\n")  # the live run's are left alone
    finally:
        live.kill()
        live.wait()
    patiently(lambda: not spool.waiting(spool.folder()))
    found = rows(home / "mlruns" / "mlflow.db", "select name, status from runs order by name")
    assert found == [
        ("first/pretrain", "FINISHED"),
        ("live/finetune", "KILLED"),
        ("second/pretrain", "FINISHED"),
    ]


def test_told_twice_is_written_once(home: Path) -> None:
    (file := home / "notes.txt").write_text("x")
    start = {"do": "start", "name": "a/b", "at": 1, "tags": {"stage": "b"}}
    log = {"do": "log", "params": {"p": "1"}, "tags": {"t": "2"}, "metrics": [["loss", 1.5, 5, 10]]}
    others = [
        {"do": "dataset", "name": "text", "digest": "d", "source": "s"},
        {"do": "artifact", "path": str(file), "folder": ""},
        {"do": "end", "status": "FINISHED", "at": 9},
    ]
    for _ in range(2):  # and by another process: a book of its own
        book = Book(store_uri(), None)
        for message in (start, log, *others):
            book.write("one", message)
    database = home / "mlruns" / "mlflow.db"
    for table in ("runs", "params", "metrics", "datasets", "inputs"):
        assert rows(database, f"select count(*) from {table}") == [(1,)], table
    with pytest.raises(Rejected):
        book.write("one", {"do": "log", "params": {"p": "another"}})
    with pytest.raises(Rejected):
        book.write("one", {"do": "artifact", "path": str(home / "none"), "folder": ""})


def test_a_whole_comes_after_its_part_and_takes_it_in(home: Path) -> None:
    book = Book(store_uri(), None)
    start = {"do": "start", "at": 1, "tags": {}, "late": True}
    book.write("part", {**start, "name": "part", "parent": "whole"})
    book.write("whole", {**start, "name": "whole"})
    database = home / "mlruns" / "mlflow.db"
    [(identity,)] = rows(database, "select run_uuid from runs where name = 'whole'")
    query = "select name, value from runs join tags using (run_uuid) where key = 'mlflow.parentRunId'"
    assert rows(database, query) == [("part", identity)]


def test_half_a_line_of_a_killed_process_is_left_out(home: Path) -> None:
    entry = spool.Entry("one", spool.folder())
    entry.append({"do": "start", "at": 3, "uri": "sqlite:///x"})
    entry.release()
    with (spool.folder() / "one" / spool.MESSAGES).open("a") as file:
        file.write('{"do": "log", "tags": {"half')
    [found] = spool.left_behind(spool.folder())
    assert [message["do"] for message in found.messages()] == ["start", "log", "end"]
    assert (
        json.loads((spool.folder() / "one" / spool.MESSAGES).read_text().splitlines()[-1])["status"]
        == "KILLED"
    )
    with pytest.raises(TimeoutError):
        spool.Entry("one", spool.folder(), patience=0.0)
    found.drop()
    assert spool.waiting(spool.folder()) == []
