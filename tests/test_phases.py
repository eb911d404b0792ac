"""Fine-tuning in phases: whole chains on the tiny model, cut between and within phases, replayed, refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline import config, phases
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.trajectory import FILE
from tests.test_cli import pipeline, started

BY_GRADIENT = {
    "optimizer": "adamw,learning_rate=0.001",
    "objective": "cross_entropy",
    "space": "full",
    "forward_passes": 60,
}
BY_ERRORS = {"optimizer": "spsa,epsilon=0.1", "objective": "error", "space": "head", "forward_passes": 128}
CHAINS = {
    "gradient, then none": [BY_GRADIENT, BY_ERRORS],
    "none, then gradient": [{**BY_ERRORS, "objective": "f1"}, BY_GRADIENT],
    "none at all": [
        {**BY_ERRORS, "space": "lora,rank=2"},
        {"optimizer": "es,population_size=4", "objective": "cross_entropy", "space": "biases"},
        {"optimizer": "cmaes:SepCMA", "objective": "margin", "space": "head", "patience": 3},
    ],
}
KINDS = pytest.mark.parametrize("kind", CHAINS)


def chained(kind: str, **more: object) -> dict[str, object]:
    first, *then = CHAINS[kind]
    common = {"batch_size": 16, "evaluate_every": 30}
    return {**common, **first, "then": then, **more}


def written(folder: Path, model: Path, table: Path, finetune: dict[str, object]) -> Path:
    """A configuration file of a chain."""
    content = {
        "model": str(model),
        "prepare": {"train": str(table), "text": "review", "label": "verdict"},
        "pretrain": {"enabled": False},
        "finetune": finetune,
        "evaluate": {"baselines": False},
    }
    path = folder / "hybrid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(bert: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each chain, run from start to end: its folder."""
    homes = {}
    for kind in CHAINS:
        home = tmp_path_factory.mktemp("whole")
        path = written(home, bert, table, chained(kind))
        done = pipeline("run", "--config", str(path), "--name", "mine", home=home)
        assert done.returncode == 0, done.stderr
        homes[kind] = home / "runs" / "mine"
    return homes


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor file that fine-tuning left."""
    root = run / "models" / "finetuned"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


@KINDS
def test_a_phase_starts_where_the_one_before_ended(kind: str, whole: dict[str, Path]) -> None:
    metrics = json.loads((whole[kind] / "metrics.json").read_text())
    count = len(CHAINS[kind])
    ends = [metrics[f"phase_{number}/validation/loss"] for number in range(1, count + 1)]
    assert metrics["validation/loss"] == ends[-1]
    assert len({*ends, metrics["start/validation/loss"]}) == count + 1
    spent = [metrics[f"phase_{number}/forward_passes"] for number in range(1, count + 1)]
    assert metrics["forward_passes"] == sum(spent)
    with (whole[kind] / "plots" / "finetune.csv").open() as file:
        curve = [(int(row["forward_passes"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert curve[0] == (0, metrics["start/validation/loss"])
    assert [made for made, _ in curve] == sorted(made for made, _ in curve)
    boundary = [loss for made, loss in curve if made == spent[0]]
    assert boundary == pytest.approx([ends[0]] * 2, abs=1e-6)  # measured at its end and at the next's start
    assert curve[-1][0] == sum(spent)


@KINDS
def test_the_report_shows_the_phases(kind: str, whole: dict[str, Path]) -> None:
    text = (whole[kind] / "report.md").read_text()
    names = [str(each["optimizer"]) for each in CHAINS[kind]]
    assert f"**{', then '.join(names)}** (this run)" in text
    for number, each in enumerate(CHAINS[kind], 1):
        assert f"- phase {number}: validation loss " in text
        assert f"`{each['optimizer']}` over the space `{each['space']}`" in text


def test_a_metric_without_a_gradient_takes_over(whole: dict[str, Path]) -> None:
    """After AdamW the losses are shares of errors: means over a step's 16 points of 16 texts each."""
    root = whole["gradient, then none"] / "models" / "finetuned"
    losses = [json.loads(line).get("loss") for line in (root / FILE).read_text().splitlines()]
    shares = [loss for loss in losses if loss is not None]
    assert shares
    assert all(share * 256 == pytest.approx(round(share * 256), abs=1e-3) for share in shares)


@KINDS
def test_replay_gives_the_chain_back(kind: str, whole: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[kind], run)
    recorded = [phases.leaves_record(str(each["optimizer"])) for each in CHAINS[kind]]
    if all(recorded):  # trajectories are enough
        for path in (run / "models" / "finetuned" / "phase-1").glob("*.safetensors"):
            path.unlink()
    done = pipeline("replay", str(run), home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"finetune, phase {number}" for number in range(1, len(recorded) + 1)
    ]
    for line, kept in zip(lines, recorded, strict=True):
        assert ("identical" if kept else "gradients, which leave no record") in line
    out = ["--stage", "finetune", "--out", str(tmp_path / "rebuilt")]
    rebuilt = pipeline("replay", str(run), *out, home=tmp_path)
    if not recorded[-1]:
        assert rebuilt.returncode == 2
        assert "used gradients" in rebuilt.stderr
        return
    head = "classifier.safetensors"
    assert (tmp_path / "rebuilt" / head).read_bytes() == (run / "models" / "finetuned" / head).read_bytes()


def test_replay_finds_what_was_changed_in_an_earlier_phase(whole: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["none at all"], run)
    path = run / "models" / "finetuned" / "phase-2" / "classifier.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = pipeline("replay", str(run), home=tmp_path)
    assert done.returncode == 2
    assert "was changed after the run" in done.stderr


@KINDS
def test_a_chain_cut_anywhere_goes_on_to_the_same_weights(
    kind: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Cut within each phase, in half a line; and between it and the next."""
    count = len(CHAINS[kind])
    for number in range(1, count + 1):
        for within in (True, False):
            home = tmp_path / f"{number}-{within}"
            run = home / "runs" / "mine"
            shutil.copytree(whole[kind], run)
            cut(run, number, within=within)
            done = pipeline("run", "--resume", "mine", home=home)
            assert done.returncode == 0, done.stderr
            again = within or number == count  # the last phase is whole with the stage
            assert done.stdout.count("finetune: phase") == count - number + again
            assert weights(run) == weights(whole[kind])
            for file in ("metrics.json", "plots/finetune.csv", "predictions.csv"):
                assert timeless(run / file) == timeless(whole[kind] / file)


def cut(run: Path, number: int, *, within: bool) -> None:
    """Leaves what a run has that was killed in a phase, or right after it."""
    for name in ("metrics.json", "report.md", "predictions.csv"):
        (run / name).unlink()
    shutil.rmtree(run / "plots")
    root = run / "models" / ".finetuned.partial"
    (run / "models" / "finetuned").rename(root)
    for path in list(root.iterdir()):
        after = path.name.startswith("phase-") and int(path.name[6:]) > number
        if after or (path.is_file() and path.name not in ("start.safetensors", FILE)):
            shutil.rmtree(path) if after else path.unlink()
    folder = root / f"phase-{number}"
    if folder.is_dir():
        (root / FILE).unlink()
        if within:
            folder = folder.rename(root / f".phase-{number}.partial")
    else:
        folder = root
    if within:
        content = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes(content[: len(content) // 2])


def timeless(path: Path) -> object:
    """What a file holds, but for how long it took and what memory."""
    if path.suffix != ".json":
        return path.read_text()
    metrics = json.loads(path.read_text()).items()
    return {key: value for key, value in metrics if key.split("/")[-1] not in ("seconds", "peak_memory_mib")}


def test_a_chain_killed_in_its_second_phase_goes_on(
    whole: dict[str, Path], bert: Path, table: Path, tmp_path: Path
) -> None:
    kind = "gradient, then none"
    path = written(tmp_path, bert, table, chained(kind))
    trajectory = tmp_path / "runs" / "mine" / "models" / ".finetuned.partial" / FILE
    with started("run", "--config", str(path), "--name", "mine", home=tmp_path) as process:
        while not trajectory.is_file() or trajectory.read_bytes().count(b"\n") < 2:
            assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
    done = pipeline("run", "--resume", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "phase 1 of 2" not in done.stdout
    assert weights(tmp_path / "runs" / "mine") == weights(whole[kind])


def test_phases_have_noise_of_their_own() -> None:
    chain = config.override(Config(seed=3), ["finetune.then=[{}, {}]"])
    seeds = [phase.config.seed for phase in phases.of(chain)]
    assert seeds[0] == 3
    assert len(set(seeds)) == 3
    assert seeds == [phase.config.seed for phase in phases.of(chain)]


def test_what_a_phase_leaves_out_is_as_in_finetune_but_for_its_optimizers_scales() -> None:
    first = config.override(
        Config(),
        [
            "finetune.optimizer=adamw",
            "finetune.learning_rate=1e-4",
            "finetune.batch_size=8",
            "finetune.then=[{optimizer: spsa, epsilon: 1e-2}, {forward_passes: 7}]",
            "finetune.then[0].patience=2",
        ],
    )
    one, two, three = first.finetune.phases
    assert (one.learning_rate, two.learning_rate, three.learning_rate) == (1e-4, None, 1e-4)
    assert (one.patience, two.patience, three.patience) == (0, 2, 0)
    assert two.epsilon == 1e-2
    assert (three.optimizer, three.forward_passes, three.batch_size) == ("adamw", 7, 8)
    assert config.with_yardstick(first).finetune.forward_passes == 2000 + 2000 + 7
    assert config.with_yardstick(first).finetune.phases == [config.with_yardstick(first).finetune]


@pytest.mark.parametrize(
    ("assignments", "error"),
    [
        (["finetune.then=[{optimzer: spsa}]"], r"cannot say 'finetune.then\[0\].optimzer'; did you mean"),
        (["finetune.then=[{}, {max_length: 8}]"], r"cannot say 'finetune.then\[1\].max_length'; it takes"),
        (["finetune.then=[{batch_size: 0}]"], r"'finetune.then\[0\].batch_size' must be at least 1"),
        (["finetune.then=[{learning_rate: fast}]"], r"then\[0\].learning_rate' takes a number, not 'fast'"),
        (["finetune.then=spsa"], r"'finetune.then\[0\]' takes a phase such as"),
        (["finetune.then={optimizer: spsa}"], "'finetune.then' takes a list of phases"),
        (["finetune.then[1].patience=2"], r"there is no finetune.then\[1\]: it has 0 phases"),
        (["finetune.then=[{}]", "tune.enabled=true"], "tune searches one phase"),
    ],
)
def test_a_phase_that_does_not_fit_is_one_line_that_says_which(assignments: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        config.override(Config(), assignments)
    assert "\n" not in str(caught.value)


def test_phases_that_cannot_follow_each_other_are_refused(gpt2: Path) -> None:
    chain = [f"model={gpt2}", "finetune.then=[{space: 'lora,rank=2'}]", "finetune.template='{text} It was'"]
    with pytest.raises(UserError, match="a layer of its own, which no other space has"):
        phases.check(config.override(Config(), [*chain, "finetune.space=head"]))
    phases.check(config.override(Config(), [*chain, "finetune.space=biases"]))
    with pytest.raises(UserError, match=r"finetune\.then with dtype=int8"):
        phases.check(config.override(Config(), ["finetune.then=[{}]", "dtype=int8"]))


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("{optimizer: nope}", "phase 2 of 2 (nope): unknown optimizer 'nope'"),
        ("{space: ful}", "phase 2 of 2 (spsa): unknown space 'ful'"),
        ("{objective: chrf}", "phase 2 of 2 (spsa): the objective scores texts"),
        ("{optimizer: adamw, objective: error}", "phase 2 of 2 (adamw): this optimizer needs a gradient"),
    ],
)
def test_a_phase_is_refused_before_anything_is_computed(phase: str, error: str, tmp_path: Path) -> None:
    done = pipeline("run", "--name", "mine", "-S", f"finetune.then=[{phase}]", home=tmp_path)
    assert done.returncode == 2
    assert error in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_a_phase_meets_at_work_is_said_of_it(bert: Path, table: Path, tmp_path: Path) -> None:
    short = chained("gradient, then none", then=[{**BY_ERRORS, "forward_passes": 1}])
    path = written(tmp_path, bert, table, short)
    done = pipeline("run", "--config", str(path), "--name", "mine", home=tmp_path)
    assert done.returncode == 2
    assert "error: phase 2 of 2 (spsa,epsilon=0.1): 1 forward passes are fewer than one step" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize(
    ("command", "error"),
    [("tune", "tune searches one phase"), ("compare", "compare runs one optimizer from start to end")],
)
def test_studies_and_comparisons_take_one_phase(command: str, error: str, tmp_path: Path) -> None:
    done = pipeline(command, "-S", "finetune.then=[{optimizer: es}]", home=tmp_path)
    assert done.returncode == 2
    assert error in done.stderr
