"""The door: specs, options, refusals, each in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from pipeline import registry
from pipeline.errors import UserError
from pipeline.optimizer import Problem
from pipeline.registry import Spec, create, plugins

SMALL = Problem(10, "head", 100, 0)


@pytest.mark.parametrize(
    "text", ["spsa", "nevergrad:DE", "cmaes:SepCMA,sigma=0.3", "spsa,directions=4,epsilon=0.1"]
)
def test_a_spec_is_its_text(text: str) -> None:
    assert str(Spec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("spas", "did you mean 'spsa'"),
        ("nope", "choose one of adamw, cmaes, es, nevergrad, spsa"),
        ("", "names no backend"),
        ("spsa,epsilon", "is not key=value"),
        ("spsa,epsilom=1", "did you mean 'epsilon'"),
        ("spsa,epsilon=abc", "takes float, not 'abc'"),
        ("spsa,directions=2.5", "takes int"),
        ("spsa,distribution=normal", "choose one of gaussian, rademacher, sphere"),
        ("spsa:Fast", "choose one of CurvatureClipped, LazyLowRank, OneSided, TwoPoint"),
        ("adamw:Fast", "has no variants"),
        ("cmaes:SepCM", "did you mean 'SepCMA'"),
        ("nevergrad:OnePlusOn", "did you mean 'OnePlusOne'"),
        ("nevergrad", "nevergrad:OnePlusOne"),
    ],
)
def test_what_is_wrong_with_a_spec_is_one_line(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        create(Spec.parse(text), SMALL)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_defaults_reach_only_those_who_name_them_and_specs_win() -> None:
    offered = {"epsilon": 0.5, "sigma": 0.7, "learning_rate": 0.25}
    spsa: Any = create(Spec.parse("spsa,epsilon=0.125"), SMALL, offered)
    assert (spsa.epsilon, spsa.learning_rate) == (0.125, 0.25)
    create(Spec.parse("cmaes"), SMALL, offered)


def test_a_space_too_large_is_refused_before_anything_is_built() -> None:
    whole_model = Problem(22_700_000, "full", 100, 0)
    with pytest.raises(UserError, match=r"needs [\d.,]+ PB .* projection,dimension=1000"):
        create(Spec.parse("cmaes:CMA"), whole_model)


def test_two_distributions_of_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dist:
        def __init__(self, name: str) -> None:
            self.name, self.version = name, "1"

    class Entry:
        name, value = "spsa", "a:b"

        def __init__(self, dist: str) -> None:
            self.dist = Dist(dist)

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("one"), Entry("two")])
    with pytest.raises(UserError, match="one and two"):
        plugins()


def test_a_plugin_that_fails_to_import_is_named_when_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("broken", "no_such_module_at_all:Thing", registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    with pytest.raises(UserError, match="failed to import: ModuleNotFoundError"):
        create(Spec.parse("broken"), SMALL)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plugins"]])
def test_help_and_the_list_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'nevergrad', 'datasets', 'numpy', 'plugins.seeded'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
