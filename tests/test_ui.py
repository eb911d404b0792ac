"""The real MLflow server over a real store; what it would show is asked of its REST API and of chromium."""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import Config, FinetuneConfig, TuneConfig
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.tracking import track
from pipeline.ui import COLUMNS, serve

FIGURES = {"test/accuracy": 0.786, "test/accuracy_low": 0.76, "test/accuracy_high": 0.81, "seconds": 3.0}


@dataclasses.dataclass
class Review:
    """A server that runs, and what it printed."""

    process: subprocess.Popen[str]
    printed: list[str]
    taken: int

    @property
    def link(self) -> str:
        return next(line for line in self.printed if line.startswith("http"))


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Review]:
    """Two logged runs, and the review of them on the port beside one that is taken."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, closing(socket.socket()) as taken:
        for name in ("MLFLOW_TRACKING_URI", "PIPELINE_TRACKING"):
            patch.delenv(name, raising=False)
        patch.setenv("PIPELINE_HOME", str(home))
        for stage in ("finetune", "evaluate"):
            with track(stage, Config(), Layout(home / "runs" / "spsa-1")) as tracker:
                tracker.metrics(FIGURES if stage == "evaluate" else {"train_loss": 0.5}, 100)
        study = Layout(home / "runs" / "tune-spsa")
        with track("tune", Config(tune=TuneConfig(enabled=True)), study) as whole:
            for number in range(2):
                trial = Layout(study.tuning / "0123" / "trials" / f"trial-{number:03d}")
                options = FinetuneConfig(optimizer="spsa", learning_rate=0.25 + number)
                with track("finetune", Config(finetune=options), trial, parent=whole.id) as tracker:
                    tracker.metrics({"validation/loss": 0.4444 + number}, 100)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", SERVE.format(port=port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        yield Review(process, _printed(process), port)
        process.kill()
        process.communicate()


# A job started in the background inherits an ignored SIGINT; a person's terminal does not.
SERVE = """
import signal
from pipeline.ui import serve
signal.signal(signal.SIGINT, signal.default_int_handler)
serve(port={port})
"""


def _printed(process: subprocess.Popen[str]) -> list[str]:
    """What the server prints until it is ready."""
    assert process.stdout
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    printed = [lines.get(timeout=120).strip()]
    while not printed[-1].startswith("Ctrl-C"):
        printed.append(lines.get(timeout=120).strip())
    return printed


def _ask(review: Review, method: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{review.link.split('/#')[0]}/api/2.0/mlflow/{method}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_a_taken_port_is_said_and_the_next_used(review: Review) -> None:
    port = int(review.link.split("/#")[0].rsplit(":", 1)[1])
    assert port > review.taken
    assert review.printed[0] == f"port {review.taken} is taken, using {port}"


def test_the_link_names_a_view_of_the_runs_table(review: Review) -> None:
    found = re.search(r"/#/experiments/(\d+)/runs\?workflowType=machine_learning&viewStateShareKey=(\w+)$",
                      review.link)  # fmt: skip
    assert found
    experiment = _ask(review, f"experiments/get?experiment_id={found[1]}")["experiment"]
    tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    assert experiment["name"] == "gradient-free"
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags[f"mlflow.sharedViewState.{found[2]}"])
    shown = _ask(review, "runs/search", experiment_ids=[found[1]], filter=view["searchFilter"],
                 order_by=[f"{view['orderByKey']} DESC"])["runs"]  # fmt: skip
    names = [run["info"]["run_name"] for run in shown]
    trials = [f"tune-spsa/trial-00{number}/finetune" for number in (1, 0)]
    assert names == [*trials, "tune-spsa/tune", "spsa-1/evaluate"]
    data = shown[-1]["data"]
    keys = {f"metrics.`{item['key']}`" for item in data["metrics"]}
    keys |= {f"params.`{item['key']}`" for item in data["params"]}
    expected = {f"metrics.`{key}`" for key in FIGURES} | {
        "params.`finetune.optimizer`",
        "params.`finetune.space`",
    }
    assert expected <= keys & set(view["selectedColumns"])
    assert view["selectedColumns"] == list(COLUMNS)


def _seen(link: str, folder: Path) -> str:
    """The page at ``link`` in a browser without a history, as HTML; its picture is left in ``folder``."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={folder / 'browser'}", "--window-size=2400,900"]
    flags += ["--virtual-time-budget=15000", f"--screenshot={folder / 'page.png'}"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", link], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


browser = pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed")


@browser
def test_a_fresh_browser_shows_the_columns(review: Review, tmp_path: Path) -> None:
    page = _seen(review.link, tmp_path)
    for text in ("spsa-1/evaluate", "finetune.optimizer", "test/accuracy_high", "0.786"):
        assert text in page
    assert "spsa-1/finetune" not in page


@browser
def test_a_study_is_one_row_that_opens_on_its_trials(review: Review, tmp_path: Path) -> None:
    page = _seen(review.link, tmp_path)
    assert "tune-spsa/tune" in page
    assert "tune-spsa/trial-000/finetune" not in page  # under its study, which is closed
    [study] = _runs(review, "tags.stage = 'tune'")
    children = _seen(f"{review.link.split('/runs')[0]}/runs/{study['info']['run_id']}", tmp_path)
    assert "tune-spsa/trial-000/finetune" in children
    assert "tune-spsa/trial-001/finetune" in children
    assert "30 trials of" in children  # the description


@browser
def test_trials_are_compared(review: Review, tmp_path: Path) -> None:
    trials = _runs(review, "tags.stage = 'finetune' and tags.leaderboard = 'true'")
    ids = json.dumps([trial["info"]["run_id"] for trial in trials])
    experiment = json.dumps([trials[0]["info"]["experiment_id"]])
    page = _seen(f"{review.link.split('/#')[0]}/#/compare-runs?runs={ids}&experiments={experiment}", tmp_path)
    for text in ("tune-spsa/trial-000/finetune", "tune-spsa/trial-001/finetune", "finetune.learning_rate"):
        assert text in page
    for text in ("0.25", "1.25", "0.444", "1.444"):
        assert text in page


def _runs(review: Review, search: str) -> list[dict[str, Any]]:
    experiment = re.search(r"experiments/(\d+)", review.link)
    assert experiment
    found: list[dict[str, Any]] = _ask(review, "runs/search", experiment_ids=[experiment[1]], filter=search)[
        "runs"
    ]
    return found


def test_interrupt_stops_every_process(review: Review) -> None:
    family = psutil.Process(review.process.pid).children(recursive=True)
    assert family
    review.process.send_signal(signal.SIGINT)
    assert review.process.wait(timeout=20) == 0
    assert psutil.wait_procs(family, timeout=1)[1] == []


def test_a_store_that_is_a_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.invalid:5000")
    with pytest.raises(UserError, match=r"open http://example\.invalid:5000"):
        serve()
