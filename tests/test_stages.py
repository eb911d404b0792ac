"""dvc.yaml, params.yaml and the stages' code say the same thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.stage import ORDER

ROOT = Path(__file__).parent.parent
# What a stage is run by, not what it computes: a change here must not run it again.
HARNESS = ("__init__.py", "config", "errors.py", "layout.py", "stage.py", "tracking")


def _imported(module: str) -> list[Path]:
    path = ROOT / module.replace(".", "/")
    return [found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()]


def _closure(file: Path, seen: set[Path]) -> set[Path]:
    """Every file of ``pipeline`` that ``file`` imports, at any depth, inside functions too."""
    if file in seen or file.relative_to(ROOT).parts[1] in HARNESS:
        return seen
    seen.add(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                for found in _imported(module):
                    _closure(found, seen)
    return seen


@pytest.fixture(scope="module")
def declared() -> dict[str, dict[str, list[str]]]:
    content: dict[str, dict[str, list[str]]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return content


def test_the_stages_are_the_four(declared: dict[str, dict[str, list[str]]]) -> None:
    assert tuple(declared) == ORDER


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_depends_on_the_code_it_runs(stage: str, declared: dict[str, dict[str, list[str]]]) -> None:
    deps = [ROOT / dep for dep in declared[stage]["deps"]]
    files = _closure(ROOT / "stages" / f"{stage}.py", set())
    missing = [file for file in files if not any(dep == file or dep in file.parents for dep in deps)]
    assert not missing


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_declares_parameters_that_exist(
    stage: str, declared: dict[str, dict[str, list[str]]]
) -> None:
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert stage in declared[stage]["params"]
    assert set(declared[stage]["params"]) <= set(given)


def test_params_yaml_is_a_configuration() -> None:
    assert config.read(ROOT / "params.yaml").finetune.optimizer == "spsa"


def test_every_parameter_is_documented() -> None:
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    said = {row[0].strip("|` "): row[2] for row in rows}
    defaults = config.Config().flat()
    defaults["prepare.corpus"] = " ".join(defaults["prepare.corpus"])
    defaults = {
        key: str(value).lower() if value in (None, True, False) else value for key, value in defaults.items()
    }
    assert said == {key: str(value).replace("none", "null") for key, value in defaults.items()}
