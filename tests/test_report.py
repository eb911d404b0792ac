"""What is absent stays absent, the sentence is honest, the pictures are pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Config
from pipeline.layout import Layout
from pipeline.reporting.report import table, verdict, write_report
from pipeline.stage import read_metrics, write_metrics

METRICS = {
    "majority/accuracy": 0.504,
    "zero_shot/accuracy": 0.715,
    "zero_shot/accuracy_low": 0.686,
    "zero_shot/accuracy_high": 0.742,
    "linear_probe/accuracy": 0.802,
    "test/accuracy": 0.786,
    "test/accuracy_low": 0.76,
    "test/accuracy_high": 0.81,
    "test/loss": 0.4787,
    "forward_passes": 20000,
    "seconds": 183.25,
    "adamw/accuracy": 0.844,
    "adamw/accuracy_low": 0.805,
    "adamw/accuracy_high": 0.866,
    "adamw/forward_passes": 840,
    "pretrain/loss_before": 10.41,
    "pretrain/loss_after": 8.2,
}


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    return Layout(tmp_path / "runs" / "mine")


def curve(layout: Layout, name: str, header: str) -> Path:
    layout.plots.mkdir(parents=True, exist_ok=True)
    path = layout.plots / f"{name}.csv"
    values = ",0.7" if "accuracy" in header else ""
    path.write_text(f"{header}\n" + "".join(f"{100 * i},{1 / (i + 1)}{values}\n" for i in range(5)))
    return path


def test_the_table_is_aligned_and_leaves_out_what_was_not_made() -> None:
    lines = table(METRICS).splitlines()
    names = [line[:18].strip() for line in lines[1:6]]
    assert names == ["majority", "zero-shot", "linear probe", "this run", "AdamW (gradients)"]
    assert lines[4].split() == ["this", "run", "78.6%", "76.0", "to", "81.0%", "0.4787", "20,000", "183.2"]
    assert lines[1].split() == ["majority", "50.4%"]
    ends = {line.index("%") for line in lines[1:6]}
    assert ends == {lines[0].index("test accuracy") + len("test accuracy") - 1}
    assert lines[6] == "pretraining: held-out loss 10.4100 before, 8.2000 after"


def test_a_table_of_little_holds_little() -> None:
    assert table({}) == ""
    only = table({"test/accuracy": 0.5, "seconds": 0.0})
    assert only.splitlines()[0].split() == ["test", "accuracy", "seconds"]
    assert only.splitlines()[1].split() == ["this", "run", "50.0%", "0.0"]
    assert "0" not in table({"majority/accuracy": 0.55}).replace("55.0%", "")


def test_a_diverged_run_leaves_json_that_any_reader_takes_and_a_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_metrics(path, {**METRICS, "test/loss": math.inf, "adamw/loss": math.nan})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["test/loss"] is None
    read = read_metrics(path)
    assert math.isnan(read["test/loss"])
    assert table(read).splitlines()[4].split()[6] == "nan"


def test_the_verdict_compares_and_says_whether_intervals_overlap() -> None:
    assert verdict(METRICS, "spsa") == (
        "spsa is 7.1 points above zero-shot (95% intervals do not overlap) "
        "and 5.8 points below AdamW (95% intervals overlap)."
    )
    worse = {"test/accuracy": 0.7, "zero_shot/accuracy": 0.715}
    assert verdict(worse, "cmaes") == "cmaes is 1.5 points below zero-shot."
    assert verdict({**worse, "zero_shot/accuracy": 0.7}, "cmaes") == "cmaes is level with zero-shot."
    assert "nothing to compare" in verdict({"test/accuracy": 0.7}, "cmaes")
    assert verdict({"majority/accuracy": 0.5}, "cmaes") == "Nothing was tested."


def test_the_report_says_what_was_run_and_how_to_replay_it(layout: Layout) -> None:
    curves = {"pretrain": curve(layout, "pretrain", "forward_passes,loss")}
    curves["finetune"] = curve(layout, "finetune", "forward_passes,loss,accuracy")
    write_report(Config(seed=7), layout, METRICS, curves)
    text = layout.report.read_text()
    for part in (
        "# Run mine",
        verdict(METRICS, "spsa"),
        "| **spsa** (this run) | 78.6% | 76.0 to 81.0% | 0.4787 | 20,000 | 183.2 |",
        "| majority | 50.4% |  |  |  |  |",
        "- model: package:minilm",
        "`spsa` over the space `head`",
        "- seed: 7",
        "10.4100 before, 8.2000 after: 2.2100 nats lower",
        "pipeline replay mine",
    ):
        assert part in text
    for name in ("accuracy", "finetune", "pretrain"):
        assert f"](plots/{name}.png)" in text
        with Image.open(layout.plots / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 24) or []
            assert picture.width > 900
        # white, grid, axis, text and the curve's blue, smoothed
        assert len(colours) > 50
        assert any(blue > red + 60 for _, (red, _, blue) in colours)  # type: ignore[misc]


def test_further_figures_stand_beneath_the_headline(layout: Layout) -> None:
    figures = {"test/f1": 0.7812, "test/f1_low": 0.75, "test/f1_high": 0.805, "majority/mcc": 0.0}
    write_report(Config(), layout, {**METRICS, **figures}, {})
    text = layout.report.read_text()
    assert "| majority |  | 0.000 |  |\n| **spsa** (this run) | 0.781 [0.750, 0.805] |  |  |" in text
    assert table({**METRICS, **figures}) == table(METRICS)
    write_report(Config(), layout, METRICS, {})
    assert "Further figures" not in layout.report.read_text()


def test_a_run_that_only_pretrains_reports_only_that(layout: Layout) -> None:
    config = Config()
    config = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, task="none"))
    figures = {key: METRICS[key] for key in ("pretrain/loss_before", "pretrain/loss_after")}
    write_report(config, layout, figures, {"pretrain": curve(layout, "pretrain", "forward_passes,loss")})
    text = layout.report.read_text()
    assert "## Result" not in text
    assert "fine-tuning" not in text
    assert re.findall(r"plots/\w+\.png", text) == ["plots/pretrain.png"]
    # dvc.yaml names all three as outputs
    assert len(list(layout.plots.glob("*.png"))) == 3


def test_the_projects_own_run_is_replayed_as_such(tmp_path: Path, layout: Layout) -> None:
    write_report(Config(), Layout(tmp_path), METRICS, {})
    assert "pipeline replay ." in (tmp_path / "report.md").read_text()
