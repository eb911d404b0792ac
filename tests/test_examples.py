"""Every configuration under examples/ is one that runs, and says how."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.commands import configuring
from pipeline.models.fresh import PREFIX
from pipeline.user_code import absolute
from tests.test_cli import ROOT, pipeline

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_examples() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {"generation", "summarization", "translation", "qa", "digits", "hybrid"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_passes_all_checks_that_come_before_a_run(path: Path, tmp_path: Path) -> None:
    read = config.read(path)
    prepare = read.prepare
    if read.model.startswith(f"{PREFIX}./"):  # what examples/fresh.py makes
        made = tmp_path / read.model.removeprefix(PREFIX)
        made.mkdir()
        (made / "config.json").touch()
    for source in (prepare.train, prepare.validation, prepare.test):
        if source and not source.startswith("package:"):
            (tmp_path / source).touch()  # what examples/texts.py makes
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = pipeline("run", "--config", str(path), "--dry-run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    with chdir(tmp_path):
        own = {"prepare.task": absolute(prepare.task), "model": configuring.absolute(read.model)}
        meant = config.updated(read, own, source="test")
    assert config.build(yaml.safe_load(done.stdout), source="plan") == meant


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_does_and_how_long_it_takes(path: Path) -> None:
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"#   pipeline run --config examples/{path.name}" in comment
    assert any("minutes" in line for line in comment)
