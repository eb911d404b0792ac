"""Comparisons: what a list means, the statistics, and a whole one: it repeats, goes on, tells of refusals."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison.jobs import planned
from pipeline.comparison.page import page
from pipeline.comparison.plan import Plan, parse_optimizers, parse_seeds
from pipeline.comparison.results import Measured, Run, _scales, _timings
from pipeline.comparison.statistics import paired, spread
from pipeline.comparison.table import markdown
from pipeline.config import Config, updated
from pipeline.errors import UserError
from pipeline.strict_json import strict_json

LARGE = "cmaes:SepCMA,population_size=200"  # a generation of it is more than the budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spsa,es", ("spsa", "es", "adamw")),
        ("spsa,directions=4,spsa", ("spsa,directions=4", "spsa", "adamw")),
        ("adamw,learning_rate=1e-4, spsa", ("spsa", "adamw,learning_rate=1e-4")),
        ("cmaes:SepCMA,sigma=1,population_size=8", ("cmaes:SepCMA,sigma=1,population_size=8", "adamw")),
    ],
)
def test_a_list_of_specs_is_read(text: str, expected: tuple[str, ...]) -> None:
    assert parse_optimizers(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("directions=4,spsa", "begins with the option"),
        ("spsa,spsa", "names 'spsa' twice"),
        ("spsa,,es", "names no backend"),
    ],
)
def test_a_list_that_is_none_is_one_line(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        parse_optimizers(text)


def test_seeds_are_a_count_or_a_list() -> None:
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("5,0") == (5, 0)
    for text in ("0", "a", "1,1", "-1", ""):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(text)


def test_a_run_waits_for_what_it_reads_and_no_more(tmp_path: Path) -> None:
    plan = Plan(tmp_path, Config(), ("spsa", "es", "adamw"), (0, 1))
    assert {job.label for job in planned(plan) if job.encodes} == {"spsa, seed 0", "spsa, seed 1"}
    after = {job.label: job.after.label if job.after else None for job in planned(plan)}
    assert after == {
        "start of seed 0": None,
        "start of seed 1": None,
        "spsa, seed 0": "start of seed 0",
        "spsa, seed 1": "start of seed 1",
        "adamw, seed 0": "start of seed 0",
        "adamw, seed 1": "start of seed 1",
        "es, seed 0": "spsa, seed 0",
        "es, seed 1": "spsa, seed 1",
    }


def test_a_scale_of_the_configuration_is_for_its_own_method(tmp_path: Path) -> None:
    config = updated(Config(), {"finetune.epsilon": 0.3, "finetune.learning_rate": 0.5}, "test")
    plan = Plan(tmp_path, config, ("spsa,directions=4", "es", "spsa:OneSided", "adamw"), (0,))
    used = {each: plan.run_config(each, 0, yardsticks=False).finetune for each in plan.optimizers}
    assert (used["spsa,directions=4"].epsilon, used["spsa,directions=4"].learning_rate) == (0.3, 0.5)
    assert all(used[each].epsilon is used[each].learning_rate is None for each in ("es", "spsa:OneSided"))
    assert used["adamw"].learning_rate == config.evaluate.adamw_learning_rate
    assert _scales(plan) == {"epsilon": 0.3, "learning_rate": 0.5}
    assert _scales(replace(plan, optimizers=("es", "adamw"))) == {}
    by_gradients = updated(config, {"finetune.optimizer": "adamw"}, "test")
    assert _scales(replace(plan, config=by_gradients)) == {}  # its rate is in evaluate
    assert plan._said()["scales of"] == "spsa"  # older plans, without it, are of another comparison
    assert "scales of" not in replace(plan, config=Config())._said()


def test_equal_time_is_that_of_the_fastest_from_its_first_step() -> None:
    def made(*curve: tuple[float, float]) -> Run:
        points = [
            Measured(i, second, {"loss": loss, "accuracy": 0.5}) for i, (second, loss) in enumerate(curve)
        ]
        return Run({"peak_memory_mib": 1.0}, curve=points, seconds=curve[-1][0])

    quick = [made((0, 9.0), (2, 5.0)), made((0, 9.0), (4, 6.0))]
    slow = [made((0, 9.0), (3, 8.0), (4.5, 7.0)), made((0, 9.0), (9, 1.0))]
    found = _timings({"quick": quick, "slow": slow})
    assert found["equal_time_seconds"] == 4
    assert found["rows"]["quick"]["validation_loss_at_equal_time"] == [5.0, 6.0]
    assert found["rows"]["slow"]["validation_loss_at_equal_time"] == [8.0, 9.0]


def test_where_every_study_was_refused_nothing_runs(tmp_path: Path) -> None:
    assert planned(Plan(tmp_path, Config(), ("spsa", "adamw"), (0,), tune=2)) == []


def test_a_paired_interval_is_scipys_bootstrap_and_repeats() -> None:
    draw = np.random.default_rng(0)
    theirs = (draw.random((3, 400)) < 0.7).astype(float)
    ours = np.where(draw.random((3, 400)) < 0.1, 1.0, theirs)
    found = paired(ours, theirs)
    assert found == paired(ours, theirs)
    by_example = (ours - theirs).mean(0)
    reference = stats.bootstrap(
        (by_example,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found[0] == pytest.approx(by_example.mean())
    assert found[1:] == pytest.approx((reference.low, reference.high), abs=0.003)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([1.0]) == (1.0, 0.0)


def test_what_diverges_is_said_and_breaks_nothing() -> None:
    assert all(map(math.isnan, paired(np.full((2, 9), np.inf), np.full((2, 9), np.inf))))
    assert all(map(math.isnan, spread([1.0, math.inf])))
    row = {"name": "wild", "forward_passes": [4, 4], "coordinates": 2}
    for key in ("validation/loss", "validation/accuracy", "test/loss", "test/accuracy"):
        row[key] = {"mean": math.nan, "sd": math.nan, "seeds": [math.inf, 1.0]}
    row["test/loss_difference"] = {"mean": math.nan, "low": math.nan, "high": math.nan}
    points = [{"forward_passes": 0, "loss": 0.7, "accuracy": 0.5}, {"forward_passes": 4, "loss": math.inf}]
    points[1]["accuracy"] = 0.5
    timed = {"seconds": [1.0, 1.0], "peak_memory_mib": [5, 5], "curve_seconds": [[0.0, 1.0]] * 2}
    timed |= {
        "validation_loss_at_equal_time": [math.inf, 1.0],
        "validation_accuracy_at_equal_time": [0.5, 0.5],
    }
    setup = dict.fromkeys(("model", "data", "space", "objective"), "x")
    setup |= {"scales": {"epsilon": 0.5}, "optimizer": "wild"}
    setup |= dict.fromkeys(("forward_passes", "batch_size", "max_length", "tuning_trials"), 0)
    found = {
        "setup": {**setup, "seeds": [0, 1]},
        "reference": "wild",
        "results": [row],
        "curves": {"wild": [points, points]},
        "tuned": {},
        "timings": {"equal_time_seconds": 1.0, "rows": {"wild": timed}},
    }
    assert markdown(found).count("diverged") == 4
    assert "`wild` has epsilon=0.5 of the configuration; each other method has its own" in markdown(found)
    assert page(found).count("<svg") == 4
    read = json.loads(strict_json(found), parse_constant=pytest.fail)
    assert read["results"][0]["test/loss"] == {"mean": None, "sd": None, "seeds": [None, 1.0]}


def command(bert: Path, table: Path, home: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    values: dict[str, Any] = {
        "model": bert,
        "prepare.train": table,
        "prepare.text": "review",
        "prepare.label": "verdict",
        "prepare.validation_size": 20,
        "prepare.test_size": 30,
        "prepare.corpus_validation_size": 10,
        "pretrain.enabled": False,
        "finetune.batch_size": 8,
        "finetune.max_length": 16,
        "finetune.evaluate_every": 48,
        "evaluate.adamw_evaluate_every": 12,
    }
    assigned = [text for key, value in values.items() for text in ("-S", f"{key}={value}")]
    line = [sys.executable, "-m", "pipeline", "compare", "--forward-passes", "96", *assigned, *more]
    return line, {**os.environ, "PIPELINE_HOME": str(home), "PIPELINE_TRACKING": "off"}


def run(line: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


MANY = "spsa,directions=64"  # a step of it too, which is known before anything runs
METHODS = ["--optimizers", f"{LARGE},spsa,nevergrad:DE,{MANY}", "--seeds", "2"]


@pytest.fixture(scope="module")
def whole(
    bert: Path, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Of four methods, two of which are refused, on two seeds, by two processes."""
    home = tmp_path_factory.mktemp("whole")
    line, environment = command(bert, table, home, *METHODS, "--workers", "2")
    return home / "runs" / "compare", run(line, environment)


def test_a_whole_comparison(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "comparison.json").read_text("utf-8"))
    rows = {row["name"]: row for row in found["results"]}
    yardsticks = ["majority", "zero-shot", "linear probe"]
    assert list(rows) == [*yardsticks, LARGE, "spsa", "nevergrad:DE", MANY, "adamw"]
    assert found["reference"] == "spsa"
    assert all("fewer than one step" in rows[name]["error"] for name in (LARGE, MANY))
    assert rows["spsa"]["forward_passes"] == rows["nevergrad:DE"]["forward_passes"] == [96, 96]
    assert all(0 < passes <= 96 for passes in rows["adamw"]["forward_passes"])
    assert len(rows["spsa"]["test/accuracy"]["seeds"]) == 2
    assert "test/accuracy_difference" not in rows["spsa"]
    difference = rows["nevergrad:DE"]["test/accuracy_difference"]
    means = [rows[name]["test/accuracy"]["mean"] for name in ("nevergrad:DE", "spsa")]
    assert difference["mean"] == pytest.approx(means[0] - means[1])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert set(found["timings"]["rows"]) == {"spsa", "nevergrad:DE", "adamw"}
    assert list((folder / "features").glob("*.safetensors")), "the methods share what they read"
    text = (folder / "comparison.md").read_text("utf-8")
    assert "not run: " in text
    assert text in done.stdout


def test_the_page_stands_alone(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    text = (whole[0] / "comparison.html").read_text("utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", text)
    assert [url for url in links if not url.startswith("#")] == []
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("<svg") == 4
    assert text.count("<table") == 2


def test_a_comparison_repeats_and_goes_on_after_a_kill(
    whole: tuple[Path, subprocess.CompletedProcess[str]], bert: Path, table: Path, tmp_path: Path
) -> None:
    line, environment = command(bert, table, tmp_path, *METHODS)
    folder = tmp_path / "runs" / "compare"
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        patience = time.monotonic() + 300
        while not list(folder.glob("adamw/seed-*/models/.finetuned.partial/trajectory.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
    other = run([*line, "--seeds", "3"], environment)
    assert other.returncode == 2
    assert "compares with seeds=[0, 1], now [0, 1, 2]; use another --name" in other.stderr
    other = run([*line, "-S", "prepare.corpus=[]"], environment)
    assert other.returncode == 2
    assert "compares with prepare.corpus=" in other.stderr
    before = table.read_bytes()
    table.write_bytes(before + before.splitlines(keepends=True)[-1])
    changed = run(line, environment)
    table.write_bytes(before)
    assert changed.returncode == 2
    assert f"{table} was changed since" in changed.stderr
    done = run([*line, "--json"], environment)
    assert done.returncode == 0, done.stderr
    once, again = json.loads((whole[0] / "comparison.json").read_text("utf-8")), json.loads(done.stdout)
    for part in ("results", "curves", "reference"):
        assert once[part] == again[part]


def test_each_method_is_tuned_the_same_way(bert: Path, table: Path, tmp_path: Path) -> None:
    methods = ["--optimizers", f"{LARGE},spsa", "--seeds", "1", "--tune", "2"]
    line, environment = command(bert, table, tmp_path, *methods)
    done = run([*line, "--json"], environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["tuned"]) == {"spsa", "adamw"}
    for suffix in ("md", "html"):
        shown = (tmp_path / "runs" / "compare" / f"comparison.{suffix}").read_text("utf-8")
        assert "Tuned to" in shown
        assert f"spsa: finetune.epsilon={found['tuned']['spsa']['finetune.epsilon']}" in shown
    rows = {row["name"]: row for row in found["results"]}
    assert "none of 2 trials came to a value" in rows[LARGE]["error"]  # and ends nothing else
    assert len(rows["zero-shot"]["test/accuracy"]["seeds"]) == 1
    assert set(found["tuned"]["spsa"]) == {"finetune.epsilon", "finetune.learning_rate"}
    made = tmp_path / "runs" / "compare" / "spsa"
    trajectory = (made / "seed-0" / "models" / "finetuned" / "trajectory.jsonl").read_text("utf-8")
    used = json.loads(trajectory.splitlines()[0])["config"]
    assert used["finetune"]["epsilon"] == found["tuned"]["spsa"]["finetune.epsilon"]
    assert used["seed"] == 0
    study = json.loads((made / "tuning" / "tuned.json").read_text("utf-8"))
    assert (study["seed"], study["trials"]) == (1, 2)


def test_what_does_not_fit_is_refused_before_anything_runs(bert: Path, table: Path, tmp_path: Path) -> None:
    for options, error in (
        (["--optimizers", "spsa,epsilom=1"], "has no option 'epsilom'"),
        (["--optimizers", "spso"], "did you mean 'spsa'"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--task", "none"], "there is no fine-tuning to compare"),
        (["--optimizers", MANY, "-S", "dtype=int8", "-S", "finetune.space=full"], "moves every weight"),
        (["--tune", "2", "-S", "tune.search=[max_length=8..16]"], "is equal for all methods"),
    ):
        line, environment = command(bert, table, tmp_path, *options)
        done = run(line, environment)
        assert done.returncode == 2
        assert error in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
