"""Whole commands in processes of their own, on the tiny models and on a user's file."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from safetensors import SafetensorError

from pipeline import config
from pipeline.cli import app, main
from pipeline.config import Config
from pipeline.data.prepare import load_corpus
from pipeline.errors import UserError, guarded
from pipeline.layout import Layout
from pipeline.runs import execute
from pipeline.stage import ORDER
from tests.conftest import sentences

ROOT = Path(__file__).parent.parent


def pipeline(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The whole command, but in this process: importing everything again takes longer than a tiny run."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), chdir(home):
        patch.setenv("PIPELINE_HOME", str(home))
        patch.setenv("PIPELINE_TRACKING", "off")
        patch.setattr(sys, "argv", ["pipeline", *arguments])
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def started(*arguments: str, home: Path) -> subprocess.Popen[str]:
    own = {"PIPELINE_HOME": str(home), "PIPELINE_TRACKING": "off"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
        cwd=home,
    )


def small(model: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--forward-passes", "128", "-S", "pretrain.forward_passes=40"),
        *(
            "-S",
            "finetune.evaluate_every=64",
            "-S",
            "pretrain.evaluate_every=20",
            "-S",
            "finetune.batch_size=16",
        ),
        *more,
    ]


@pytest.fixture(scope="module")
def arguments(bert: Path, table: Path) -> list[str]:
    """A run on a user's file."""
    columns = ["--text", "review", "--label", "verdict"]
    return ["run", "--train", str(table), "--task", "classification", *columns, *small(bert)]


@pytest.fixture(scope="module")
def whole(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """That run from start to end: its folder, and what it said."""
    home = tmp_path_factory.mktemp("whole")
    done = pipeline(*arguments, "--name", "mine", home=home)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "mine", done


def test_a_run_on_a_users_file_from_start_to_replay(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, done = whole
    tmp_path = run.parent.parent
    metrics = json.loads((run / "metrics.json").read_text())
    for row in ("test", "zero_shot", "linear_probe", "adamw", "majority"):
        assert 0.0 <= metrics[f"{row}/accuracy_low"] <= metrics[f"{row}/accuracy"] <= 1.0
        assert metrics[f"{row}/f1_low"] <= metrics[f"{row}/f1"] <= metrics[f"{row}/f1_high"]
        assert -1.0 <= metrics[f"{row}/mcc_low"] <= metrics[f"{row}/mcc"] <= metrics[f"{row}/mcc_high"]
        assert (f"{row}/calibration_error" in metrics) == (row != "majority")
    assert {"validation/f1", "validation/mcc", "validation/calibration_error"} <= set(metrics)
    assert f"| {metrics['test/mcc']:.3f} [" in (run / "report.md").read_text()
    assert metrics["forward_passes"] == 128
    assert metrics["adamw/forward_passes"] <= 128
    assert {"pretrain/loss_before", "pretrain/loss_after", "seconds", "test/loss"} <= set(metrics)
    assert "this run" in done.stdout
    for file in ("report.md", "params.yaml", "plots/accuracy.png", "data/prepared/card.md"):
        assert (run / file).is_file()

    status = pipeline("status", "mine", home=tmp_path)
    assert status.returncode == 0, status.stderr
    assert [line.split()[:3] for line in status.stdout.splitlines()[1:]] == [
        ["mine", stage, "done"] for stage in ORDER
    ]
    replayed = pipeline("replay", "mine", home=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    assert replayed.stdout.count("identical") == 2

    shown = pipeline("show", "mine", "--json", home=tmp_path)
    assert json.loads(shown.stdout) == metrics

    finished = pipeline("run", "--resume", "mine", home=tmp_path)
    assert finished.returncode == 2
    assert "nothing is left to resume" in finished.stderr

    weights = run / "models" / "finetuned" / "classifier.safetensors"
    original = weights.read_bytes()
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused = pipeline("replay", "mine", "--stage", "finetune", home=tmp_path)
    assert refused.returncode == 2
    assert "was changed after the run" in refused.stderr
    weights.write_bytes(original)


def kill_within(folder: Path, command: list[str], home: Path) -> None:
    """Starts the command and kills it when the training that writes into ``folder`` has made some steps."""
    trajectory, until = folder / "trajectory.jsonl", time.monotonic() + 300
    with started(*command, home=home) as process:
        while not trajectory.is_file() or trajectory.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.002)
        process.kill()
    assert trajectory.is_file()


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(
    whole: tuple[Path, subprocess.CompletedProcess[str]], arguments: list[str], tmp_path: Path
) -> None:
    models = tmp_path / "runs" / "mine" / "models"
    command = [*arguments, "--name", "mine", "--no-baselines"]
    for stage in ("pretrained", "finetuned"):
        kill_within(models / f".{stage}.partial", command, tmp_path)
        command = ["run", "--resume", "mine"]
    replayed = pipeline("replay", "mine", home=tmp_path).stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in replayed] == [
        "identical to the run's",
        "where the run was cut off",
    ]
    done = pipeline(*command, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prepare:" not in done.stdout
    assert "pretrain:" not in done.stdout
    for stage in ("pretrained", "finetuned"):
        for file in (whole[0] / "models" / stage).glob("*.safetensors"):
            assert file.read_bytes() == (models / stage / file.name).read_bytes()


def test_a_pretraining_by_gradients_begins_anew_and_is_told_at_replay(
    arguments: list[str], tmp_path: Path
) -> None:
    more = ["--name", "mine", "--no-baselines", "-S", "pretrain.optimizer=adamw"]
    kill_within(tmp_path / "runs" / "mine" / "models" / ".pretrained.partial", [*arguments, *more], tmp_path)
    done = pipeline("run", "--resume", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    replayed = pipeline("replay", "mine", home=tmp_path).stdout.splitlines()
    assert replayed[0] == "pretrain: by gradients, which leave no record"
    assert replayed[1].endswith("identical to the run's")


def test_resume_takes_nothing_else(tmp_path: Path) -> None:
    refused = pipeline("run", "--resume", "mine", "--seed", "3", home=tmp_path)
    assert refused.returncode == 2
    assert "leave out --seed" in refused.stderr


# peft asks transformers in a way that the next major release will not know
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_leave_as_ordinary_directories(bert: Path, table: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    done = pipeline(
        *(
            "run",
            "--train",
            str(table),
            "--name",
            "mine",
            "--no-baselines",
            "-S",
            "finetune.space=lora,rank=2",
        ),
        *("--text", "review", "--label", "verdict", *small(bert)),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    finetuned = tmp_path / "runs" / "mine" / "models" / "finetuned"
    AutoModel.from_pretrained(finetuned, add_pooling_layer=False)
    assert pipeline("replay", "mine", home=tmp_path).stdout.count("identical") == 2
    base = AutoModel.from_pretrained(finetuned.parent / "pretrained", add_pooling_layer=False)
    PeftModel.from_pretrained(base, str(finetuned / "adapter"))


def test_a_decoder_learns_causally_and_classifies(gpt2: Path, table: Path, tmp_path: Path) -> None:
    done = pipeline(
        *("run", "--train", str(table), "--name", "mine", "--no-baselines", "-S", "pretrain.space=full"),
        *("--text", "review", "--label", "verdict", *small(gpt2)),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "pretrain: clm" in done.stdout
    figures = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    loss, validation = figures["pretrain/loss_after"], load_corpus(Layout(tmp_path / "runs" / "mine"))
    assert figures["pretrain/perplexity"] == pytest.approx(math.exp(loss))
    assert 0.0 <= figures["pretrain/accuracy"] <= 1.0
    # its tokenizer has whole words, each text's first is given, and each ends: a byte a letter and a space
    words = [text.split()[1:] for text in validation["validation"]["text"]]
    bits = loss * sum(len(each) for each in words) / math.log(2)
    bytes_ = sum(len(word) + 1 for each in words for word in each)
    assert figures["pretrain/bits_per_byte"] == pytest.approx(bits / bytes_, rel=0.1)


def test_stages_can_be_run_one_by_one(bert: Path, table: Path, tmp_path: Path) -> None:
    common = ["run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"]
    rest = [*small(bert), "--no-baselines", "-S", "pretrain.enabled=false"]
    assert pipeline(*common, *rest, "--to", "pretrain", home=tmp_path).returncode == 0
    other = pipeline(*common, *rest, "--from", "finetune", "-S", "pretrain.epsilon=0.5", home=tmp_path)
    assert other.returncode == 2
    assert "was made with pretrain.epsilon" in other.stderr
    done = pipeline(*common, *rest, "--from", "finetune", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pretrain:" not in done.stdout
    run = tmp_path / "runs" / "mine"
    assert (run / "metrics.json").is_file()
    assert "pretrain/loss_after" not in json.loads((run / "metrics.json").read_text())

    with FileLock(run / ".lock"):
        busy = pipeline(*common, *rest, "--from", "pretrain", home=tmp_path)
    assert busy.returncode == 2
    assert "another process is at work" in busy.stderr
    assert pipeline(*common, *rest, "--from", "pretrain", "--to", "pretrain", home=tmp_path).returncode == 0
    stale = [run / "metrics.json", run / "report.md", run / "models" / "finetuned"]
    assert not [path for path in stale if path.exists()]


def test_a_run_that_began_at_finetune_goes_on_there(bert: Path, table: Path, tmp_path: Path) -> None:
    common = ["run", "--name", "mine", "--train", str(table), "--text", "review", "--label", "verdict"]
    common += [*small(bert), "--no-baselines", "-S", "pretrain.enabled=false", "--forward-passes", "4000"]
    assert pipeline(*common, "--to", "pretrain", home=tmp_path).returncode == 0
    folder = tmp_path / "runs" / "mine" / "models" / ".finetuned.partial"
    kill_within(folder, [*common, "--from", "finetune"], tmp_path)
    made = [line for line in (folder / "trajectory.jsonl").read_text().splitlines() if "measured" in line]
    done = pipeline("run", "--resume", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = (folder.parent / "finetuned" / "trajectory.jsonl").read_text().splitlines()
    assert [line for line in whole if "measured" in line][: len(made)] == made  # with the seconds of then
    again = pipeline("run", "--resume", "mine", home=tmp_path)
    assert again.returncode == 2
    assert "is finished: nothing is left to resume" in again.stderr


def test_the_projects_own_stages_are_left_to_dvc(tmp_path: Path) -> None:
    text = "# mine\nseed: 3\n"
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "runs" / "repro").mkdir(parents=True)
    (tmp_path / "runs" / "repro" / "params.yaml").write_text("prepare: {train: none.csv}")
    assert "none.csv" in pipeline("run", "--resume", "repro", home=tmp_path).stderr  # which is a run
    done = pipeline("run", "--resume", ".", home=tmp_path)
    assert done.returncode == 2
    assert "go on by `dvc repro`" in done.stderr
    assert (tmp_path / "params.yaml").read_text() == text


def test_ctrl_c_says_what_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runs.run", stopped)
    layout = Layout(tmp_path / "runs" / "mine" / "seed-0")
    with pytest.raises(KeyboardInterrupt, match="; to go on: pipeline run --resume mine/seed-0"):
        execute(Config(), layout, ("finetune", "evaluate"))
    (tmp_path / "good.csv").write_text("text,label\ngood film,up\nbad film,down\n")
    done = pipeline("tune", "--train", "good.csv", home=tmp_path)
    assert done.returncode == 130
    assert "; the same command goes on" in done.stderr


def test_without_a_task_every_output_that_dvc_expects_is_there(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(60)[0]))
    given = small(bert)
    at = given.index("--forward-passes")
    without_a_task = given[:at] + given[at + 2 :]
    options = ["-S", f"prepare.corpus=[{tmp_path / 'text.txt'}]", "-S", "prepare.corpus_validation_size=20"]
    done = pipeline("run", "--task", "none", "--name", "mine", *options, *without_a_task, home=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    assert all(key.startswith("pretrain/") for key in metrics)
    states = json.loads(pipeline("status", "mine", "--json", home=tmp_path).stdout)
    assert [row["state"] for row in states] == ["done", "done", "done", "no task", "done"]
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for out in [*stage["outs"], *stage.get("plots", []), *stage.get("metrics", [])]:
            assert (tmp_path / "runs" / "mine" / (out if isinstance(out, str) else next(iter(out)))).exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--optimizer", "nevergrad:OnePlusOn"], "did you mean 'OnePlusOne'"),
        (["--optimizer", "nope"], "unknown optimizer 'nope'"),
        (["-S", "finetune.epsilom=1"], "did you mean 'finetune.epsilon'"),
        (["-S", "finetune.epsilon=abc"], "takes a number, not 'abc'"),
        (["-S", "finetune.space=ful"], "did you mean 'full'"),
        (["-S", "seed"], "is not section.key=value"),
        (["--train", "absent.csv"], "absent.csv"),
        (["--train", "empty.csv", "--text", "text", "--label", "label"], "label"),
        (["--train", "good.csv", "--text", "words"], "words"),
        (["--model", "./nowhere"], "no model directory at ./nowhere"),
        (["--config", "absent.yaml"], "no configuration at absent.yaml"),
        (["--from", "finetun", "--name", "x"], "did you mean 'finetune'"),
        (["--from", "evaluate"], "name it with --name"),
        (["--name", "../x"], "--name"),
        (["--task", "classificaton"], "did you mean 'classification'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.csv").write_text("text,label\ngood film,\nbad film,\n")
    (tmp_path / "good.csv").write_text("text,label\ngood film,up\nbad film,down\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_TRACKING", "off")
    with pytest.raises(SystemExit) as stopped:
        guarded(lambda: app(["run", *arguments]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    assert len(said.strip().splitlines()) == 1


def test_a_mistake_prints_no_traceback_from_the_installed_command(tmp_path: Path) -> None:
    with started("run", "--optimizer", "nope", home=tmp_path) as process:
        _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith("error: unknown optimizer 'nope'")
    assert len(said.strip().splitlines()) == 1


def test_a_dry_run_computes_nothing_and_prints_a_configuration(tmp_path: Path) -> None:
    done = pipeline("run", "--dry-run", "--seed", "7", home=tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "runs").exists()
    path = tmp_path / "again.yaml"
    path.write_text(done.stdout)
    assert config.read(path).seed == 7


def test_values_of_a_configuration_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, error in [
        ("finetune: 3", "is a section"),
        ("finetune: {batch_size: 1.5}", "takes a whole number"),
        ("finetune: {forward_passes: -1}", "must be at least 1, got -1"),
        ("evaluate: {baselines: 1}", "takes true or false"),
        ("prepare: {text: 2020-13-01}", "not readable YAML"),
        ("- a", "must map"),
        ("a: [", "not readable YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=error):
            config.read(path)
    path.write_text("finetune: {learning_rate: 1e-3}")
    assert config.read(path).finetune.learning_rate == 1e-3


def test_options_before_a_backend_are_not_swallowed(tmp_path: Path) -> None:
    for option in ("--verify", "--json"):
        done = pipeline("plugins", option, "spsa", home=tmp_path)
        assert done.returncode == 2
        assert "write --json behind it" in done.stderr
    assert json.loads(pipeline("plugins", "spsa", "--json", home=tmp_path).stdout)


def test_a_folder_that_holds_no_run_is_said_to_hold_none(tmp_path: Path) -> None:
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    done = pipeline("run", "--resume", "begun", home=tmp_path)
    assert done.returncode == 2
    assert "holds no run: it has no params.yaml" in done.stderr


def test_a_warning_is_one_line() -> None:
    code = (
        "import warnings\nfrom pipeline.errors import guarded\n"
        "guarded(lambda: warnings.warn('training ends early', stacklevel=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: training ends early\n"


def test_a_run_is_not_replaced_by_its_name(
    whole: tuple[Path, subprocess.CompletedProcess[str]], arguments: list[str], tmp_path: Path
) -> None:
    """Not a finished one, nor one that was cut off; stages are done again where that is said."""
    command = [*arguments, "--name", "mine", "--no-baselines"]
    kill_within(tmp_path / "runs" / "mine" / "models" / ".pretrained.partial", command, tmp_path)
    left = (tmp_path / "runs" / "mine" / "models" / ".pretrained.partial" / "trajectory.jsonl").read_bytes()
    for _ in range(2):
        refused = pipeline(*command, home=tmp_path)
        assert refused.returncode == 2
        assert "holds a run already" in refused.stderr
        assert "--resume mine" in refused.stderr
    kept = tmp_path / "runs" / "mine" / "models" / ".pretrained.partial" / "trajectory.jsonl"
    assert kept.read_bytes() == left
    assert pipeline("run", "--resume", "mine", home=tmp_path).returncode == 0
    assert "holds a run already" in pipeline(*command, home=tmp_path).stderr
    for stage in ("finetune", "prepare"):
        again = pipeline(*command, "--from", stage, home=tmp_path)
        assert again.returncode == 0, again.stderr


def test_a_budget_of_what_is_left_out_is_refused(bert: Path, tmp_path: Path) -> None:
    refused = pipeline("run", "--task", "none", "--model", str(bert), "--forward-passes", "9", home=tmp_path)
    assert refused.returncode == 2
    assert "set -S pretrain.forward_passes" in refused.stderr


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "runs" / "mine")

    def python() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("text")

    def safetensors() -> None:  # in its own words, as seen; to /dev/full it would put a file in its place
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (python, safetensors):

        def stage(*_: object, write: Callable[[], None] = write, **__: object) -> None:
            write()

        monkeypatch.setattr("pipeline.runs.run", stage)
        with pytest.raises(UserError, match=r"no space is left on the disk of .*mine: .*--resume mine"):
            execute(Config(), layout, ("prepare",))
