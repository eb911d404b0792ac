"""Runs are written to a real sqlite store by the real scribe, and read back from the database itself."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import processes
from pipeline.config import Config, TuneConfig, build
from pipeline.layout import Layout
from pipeline.tracking import Tracker, ledger, spool, track
from pipeline.tracking import tracker as tracker_module
from pipeline.tracking.lending import borrow, lending
from pipeline.tracking.store import mlruns

TUNING = Config(tune=TuneConfig(enabled=True))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of its own, and a working directory elsewhere in which nothing may appear."""
    for name in ("MLFLOW_TRACKING_URI", "PIPELINE_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert not list((tmp_path / "elsewhere").iterdir())


def rows(home: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(home / "mlruns" / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def card(layout: Layout) -> None:
    layout.prepared.mkdir(parents=True)
    content = {"hash": "a" * 64, "sources": [{"source": "package:movies"}]}
    (layout.prepared / "card.json").write_text(json.dumps(content))


def test_a_run_is_written_whole(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layout = Layout(home / "runs" / "spsa-1")
    card(layout)
    (picture := home / "accuracy.png").write_bytes(b"png")
    with track("finetune", Config(seed=3), layout) as tracker:
        for step in range(1500):
            tracker.metrics({"train_loss": 1 / (step + 1), "gradient": 0.5}, step)
        tracker.metrics({"broken": math.inf, "empty": math.nan}, 1500)
        tracker.metrics({"loss": 0.42441662513226036, "passes": 12_345_678}, 1501)
        tracker.artifact(picture, "plots")
        tracker.tags({"words": "two"})
    assert capfd.readouterr() == ("", "")
    assert rows(home, "select name, status from runs") == [("spsa-1/finetune", "FINISHED")]
    assert rows(home, "select end_time - start_time between 0 and 60000 from runs") == [(1,)]
    assert rows(home, "select name, artifact_location from experiments where experiment_id != 0") == [
        ("gradient-free", (home / "mlruns" / "artifacts").as_uri())
    ]
    assert rows(home, "select count(*), max(step) from metrics where key = 'train_loss'") == [(1500, 1499)]
    assert rows(home, "select value from metrics where key = 'train_loss' and step = 4") == [(0.2,)]
    assert rows(home, "select key, is_nan from metrics where step = 1500") == [("broken", 1), ("empty", 1)]
    assert rows(home, "select value from metrics where step = 1501 order by key") == [
        (0.424417,),
        (12_345_678,),
    ]
    params = dict(rows(home, "select key, value from params"))
    assert params["seed"] == "3"
    assert params["finetune.optimizer"] == "spsa"
    assert not [key for key in params if key.startswith(("prepare.", "pretrain.", "evaluate."))]
    tags = dict(rows(home, "select key, value from tags"))
    expected = {"stage": "finetune", "optimizer": "spsa", "space": "head", "data": "a" * 64, "words": "two"}
    assert tags.items() >= expected.items()
    assert tags.keys() >= {"python", "torch", "transformers", "machine", "device", "mlflow.source.name"}
    assert rows(home, "select name, digest from datasets") == [("package:movies", "a" * 36)]
    assert [p.name for p in (home / "mlruns" / "artifacts").glob("*/artifacts/plots/*")] == ["accuracy.png"]


def test_evaluate_notes_every_parameter_and_repro_has_a_name(home: Path) -> None:
    with track("evaluate", Config(), Layout(home)):
        pass
    assert rows(home, "select name from runs") == [("repro/evaluate",)]
    params = dict(rows(home, "select key, value from params"))
    assert set(params) == set(Config().flat())
    # what the method takes by itself; it has no sigma
    names = [f"finetune.{name}" for name in ("epsilon", "learning_rate", "sigma")]
    assert [params[name] for name in names] == ["0.01", "0.002", ""]


def test_a_run_that_goes_on_in_another_store_is_whole_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(home / "runs" / "one")
    with track("finetune", Config(seed=7), layout):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    (tmp_path / "mlruns").mkdir()
    with track("finetune", Config(seed=7), layout, resume=True):
        pass
    for store in (home, tmp_path):
        assert rows(store, "select name, status from runs") == [("one/finetune", "FINISHED")]
        assert rows(store, "select value from params where key = 'seed'") == [("7",)]


def test_a_comparison_is_one_row_over_its_runs(home: Path) -> None:
    whole, chosen = Layout(home / "runs" / "compare"), Config()
    with track("compare", chosen, whole) as tracker:
        layout = Layout(whole.root / "spsa" / "seed-0")
        with track("finetune", chosen, layout, parent=tracker.id):
            pass
    with track("compare", chosen, whole, resume=True) as again:
        assert again.id == tracker.id
    assert set(rows(home, "select name, status from runs")) == {
        ("compare/compare", "FINISHED"),
        ("compare/spsa/seed-0/finetune", "FINISHED"),
    }
    [(identity,)] = rows(home, "select run_uuid from runs where name = 'compare/compare'")
    assert rows(home, "select value from tags where key = 'mlflow.parentRunId'") == [(identity,)]
    of_it = f"where run_uuid = '{identity}'"
    params = dict(rows(home, f"select key, value from params {of_it}"))
    several = {f"finetune.{key}" for key in ("optimizer", "epsilon", "sigma", "learning_rate")}
    assert set(params) == set(Config().flat()) - several
    tags = dict(rows(home, f"select key, value from tags {of_it}"))
    assert (tags["leaderboard"], tags["mlflow.source.name"]) == ("true", "pipeline compare")
    assert not {"optimizer", "space"} & set(tags)


def test_a_chain_is_noted_with_all_its_methods_and_its_whole_budget(home: Path) -> None:
    chain = {"finetune": {"optimizer": "adamw", "forward_passes": 30}}
    chain["finetune"]["then"] = [{"optimizer": "spsa", "forward_passes": 70}]  # type: ignore[assignment]
    with track("evaluate", build(chain, "test"), Layout(home / "runs" / "one")):
        pass
    params = dict(rows(home, "select key, value from params"))
    assert params["finetune.optimizer"] == "adamw, then spsa"
    assert params["finetune.forward_passes"] == "100"


def test_prepare_notes_the_data_it_made(home: Path) -> None:
    layout = Layout(home / "runs" / "one")
    with track("prepare", Config(), layout):
        card(layout)
    assert rows(home, "select value from tags where key = 'data'") == [("a" * 64,)]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("a bad\nday"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_error_passes_through_and_is_noted(home: Path, error: BaseException, status: str) -> None:
    def fail() -> None:
        with track("pretrain", Config(), Layout(home / "runs" / "one")) as tracker:
            tracker.metrics({"loss": 1.0}, 1)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert rows(home, "select status from runs") == [(status,)]
    assert rows(home, "select value from metrics") == [(1.0,)]
    noted = rows(home, "select value from tags where key = 'error'")
    assert noted == ([("ValueError: a bad day",)] if status == "FAILED" else [])
    with track("pretrain", Config(), Layout(home / "runs" / "one"), resume=True):
        pass
    assert rows(home, "select status from runs") == [("FINISHED",)]
    assert rows(home, "select value from tags where key = 'error'") == []


def test_a_part_names_its_whole_from_another_process_too(home: Path) -> None:
    study = Layout(home / "runs" / "study")
    part = "import sys\nfrom pathlib import Path\nfrom pipeline.config import Config\n"
    part += "from pipeline.layout import Layout\nfrom pipeline.tracking import track\n"
    part += "with track('finetune', Config(), Layout(Path(sys.argv[1])), parent=sys.argv[2]): pass\n"
    with track("tune", TUNING, study) as whole:
        assert whole.id
        trial = study.tuning / "0123456789ab" / "trials" / "trial-007"
        subprocess.run([sys.executable, "-c", part, str(trial), whole.id], check=True)
        with track("finetune", Config(), Layout(home / "runs" / "other"), parent=whole.id):
            pass
    above = dict(
        rows(home, "select name, value from runs join tags using (run_uuid) where key = 'mlflow.parentRunId'")
    )
    [(identity,)] = rows(home, "select run_uuid from runs where name = 'study/tune'")
    assert above == {"study/trial-007/finetune": identity, "other/finetune": identity}
    board = rows(home, "select name from runs join tags using (run_uuid) where key = 'leaderboard'")
    assert sorted(board) == [("study/trial-007/finetune",), ("study/tune",)]


def test_a_run_that_goes_on_is_the_run_it_was(home: Path) -> None:
    layout = Layout(home / "runs" / "one")

    def cut_off() -> None:
        with track("pretrain", Config(), layout) as tracker:
            tracker.metrics({"loss": 2.0}, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    with track("pretrain", Config(), layout, resume=True) as tracker:
        tracker.metrics({"loss": 1.0}, 2)
    assert rows(home, "select name, status from runs") == [("one/pretrain", "FINISHED")]
    assert sorted(rows(home, "select step, value from metrics")) == [(1, 2.0), (2, 1.0)]
    with track("pretrain", Config(), layout):
        pass
    assert len(rows(home, "select name from runs")) == 2


SCRIPT = """
import os, pathlib, signal, sys
from pipeline.config import Config, TuneConfig, build
from pipeline.layout import Layout
from pipeline.tracking import track
with track("finetune", Config(), Layout(pathlib.Path(sys.argv[1]))) as tracker:
    tracker.metrics({"loss": 1.0}, 1)
    assert "mlflow" not in sys.modules
    if sys.argv[2] == "die":
        tracker.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_processes_on_a_fresh_store_one_of_them_killed(home: Path) -> None:
    commands = [[sys.executable, "-c", SCRIPT, str(home / "runs" / end), end] for end in ("live", "die")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate(timeout=120)[1] for process in both] == ["", ""]
    assert [process.returncode for process in both] == [0, -9]
    wanted = [("die/finetune", "KILLED"), ("live/finetune", "FINISHED")]
    until = time.monotonic() + 300
    while rows(home, "select name, status from runs order by name") != wanted:
        assert time.monotonic() < until, rows(home, "select name, status from runs order by name")
        time.sleep(0.1)
    assert rows(home, "select count(*) from metrics where value = 1.0") == [(2,)]
    assert rows(home, "select count(*) from experiments where name = 'gradient-free'") == [(1,)]


def _borrower(address: str, parent: str, root: Path, end: str) -> None:
    borrow(address)
    with track("finetune", Config(), Layout(root), parent=parent) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        if end == "die":
            tracker.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def test_processes_borrow_the_scribe_of_the_one_that_started_them(home: Path) -> None:
    ends = {"live": 0, "longer": 0, "die": -signal.SIGKILL}
    with track("tune", TUNING, Layout(home / "runs" / "study")) as whole:
        mine = psutil.Process().children(recursive=True)
        with lending() as address:
            parts = [
                processes.context().Process(
                    target=_borrower, args=(address, whole.id, home / "runs" / each, each)
                )
                for each in ends
            ]
            for part in parts:
                part.start()
            while any(part.is_alive() for part in parts):
                assert not [
                    each
                    for process in psutil.Process().children(recursive=True)
                    if process not in mine and "scribe" in (each := " ".join(cmdline(process)))
                ]
                time.sleep(0.2)
        assert [part.exitcode for part in parts] == list(ends.values())
    assert sorted(rows(home, "select name, status from runs")) == [
        ("die/finetune", "KILLED"),
        ("live/finetune", "FINISHED"),
        ("longer/finetune", "FINISHED"),
        ("study/tune", "FINISHED"),
    ]
    assert rows(home, "select count(*) from metrics where value = 1.0") == [(3,)]
    assert rows(home, "select count(*) from tags where key = 'mlflow.parentRunId'") == [(3,)]


def test_lending_ends_though_callers_died_while_they_were_let_in(home: Path) -> None:
    def lend() -> None:
        with lending() as address:
            for _ in range(20):
                Client(address).close()  # it gives no answer to the desk's challenge

    lender = threading.Thread(target=lend, daemon=True)
    lender.start()
    lender.join(60)
    assert not lender.is_alive()


def cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):  # it has ended meanwhile
        return process.cmdline()
    return []


@pytest.mark.parametrize("kind", ["no server", "no database"])
def test_a_broken_store_costs_one_line(
    kind: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if kind == "no server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    else:
        (home / "mlruns").mkdir(parents=True)
        (home / "mlruns" / "mlflow.db").write_text("this is not a database" * 100)
    for stage in ("pretrain", "finetune"):
        with track(stage, Config(), Layout(home)) as tracker:
            tracker.metrics({"loss": 1.0}, 1)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("tracking: MLflow: ")
    assert "pipeline sync" in err
    assert err.count("\n") == 1
    assert len(spool.waiting(spool.folder())) == 2


def test_a_missing_artifact_costs_one_line(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with track("finetune", Config(), Layout(home)) as tracker:
        tracker.artifact(home / "nothing.png")
        tracker.artifact(home / "nothing.md")
        tracker.metrics({"loss": 1.0}, 1)
    assert capfd.readouterr().err.count("\n") == 1
    assert rows(home, "select status, value from runs, metrics") == [("FINISHED", 1.0)]


@pytest.mark.parametrize("why", ["off", "not installed"])
def test_nothing_is_written_without_tracking(why: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "off":
        monkeypatch.setenv("PIPELINE_TRACKING", "off")
    else:
        monkeypatch.setitem(sys.modules, "mlflow", None)
    with track("finetune", Config(), Layout(home)) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        tracker.artifact(home / "nothing.png")
    assert not home.exists()


def test_metrics_are_sent_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    tracker = Tracker(sent.append)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"loss": 0.5}, 2)
    assert sent == []
    monkeypatch.setattr(tracker_module, "FLUSH_SECONDS", 0.0)
    tracker.metrics({"loss": 0.25}, 3)
    (message,) = sent
    assert [(key, value, step) for key, value, _, step in message["metrics"]] == [
        ("loss", 1.0, 1),
        ("loss", 0.5, 2),
        ("loss", 0.25, 3),
    ]
    tracker.flush()
    assert len(sent) == 1


def test_what_lies_there_names_the_run_that_made_it(home: Path) -> None:
    """Also where DVC has put back what an earlier run made."""
    layout = Layout(home / "runs" / "one")
    for content in ("first", "second"):
        with track("tune", TUNING, layout):
            layout.tuned.write_text(content)
        ledger.made(layout, "tune")
    first, second = (
        json.loads(line)["run"] for line in (home / "mlruns/made.jsonl").read_text().splitlines()
    )
    assert first != second
    for content, run in (("second", second), ("first", first)):
        layout.tuned.write_text(content)
        found = ledger.maker(layout, "tune")
        assert found
        assert (found["run"], found["name"]) == (run, "one/tune")
    ledger.forget(layout, "tune")  # a stage that was not tracked
    layout.tuned.write_text("untracked")
    ledger.made(layout, "tune")
    assert ledger.maker(layout, "tune") is None
    layout.tuned.write_text("by hand")
    assert ledger.maker(layout, "tune") is None
    assert ledger.maker(layout, "finetune") is None


def test_experiments_that_dvc_runs_elsewhere_are_noted_in_the_project(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = home / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    monkeypatch.setenv("PIPELINE_HOME", str(copy))
    monkeypatch.setenv("DVC_EXP_NAME", "curly-finn")
    assert mlruns() == home / "mlruns"
    with track("evaluate", Config(), Layout(copy)):
        pass
    assert rows(home, "select name from runs") == [("curly-finn/evaluate",)]
    assert rows(home, "select value from tags where key = 'dvc.experiment'") == [("curly-finn",)]


def test_a_search_that_is_switched_off_is_no_run(home: Path) -> None:
    with track("tune", Config(), Layout(home / "runs" / "one")) as tracker:
        assert tracker.id is None
    assert not (home / "mlruns").exists()


def test_a_model_is_registered_on_request(home: Path) -> None:
    layout = Layout(home / "runs" / "one")
    command = [sys.executable, "-m", "pipeline", "register", "one", "--as", "sentiment"]

    def register() -> tuple[str, str, int]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout, done.stderr, done.returncode

    layout.root.mkdir(parents=True)
    layout.params.write_text("seed: 0")
    assert register() == (
        "",
        f"error: {layout.root} holds no model yet: neither pretrain nor finetune has run\n",
        2,
    )
    with track("finetune", Config(), layout):
        layout.finetuned.mkdir(parents=True)
        for name in ("config.json", "metrics.json"):
            (layout.finetuned / name).write_text("{}")
    assert "holds no weights" in register()[1]
    (layout.finetuned / "model.safetensors").write_bytes(b"weights")
    for inside in ("phase-1", "adapter"):
        (layout.finetuned / inside).mkdir()
        (layout.finetuned / inside / "model.safetensors").write_bytes(b"others")
    assert "no tracked run made" in register()[1]
    ledger.made(layout, "finetune")
    for version in (1, 2):
        out, err, status = register()
        assert (out, err, status) == (
            f"sentiment, version {version}: models:/sentiment/{version}. Review: pipeline ui\n",
            "",
            0,
        )
    [(run, source)] = set(rows(home, "select run_id, source from model_versions"))
    assert rows(home, "select name from runs where run_uuid = '" + run + "'") == [("one/finetune",)]
    kept = Path(source.removeprefix("file://"))
    assert (kept / "model.safetensors").read_bytes() == b"weights"
    assert (kept / "adapter" / "model.safetensors").read_bytes() == b"others"
    assert not (kept / "phase-1").exists()
