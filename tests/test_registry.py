"""The door: specs, options, refusals, each in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.entry_points import GROUPS, installed, load
from pipeline.errors import UserError
from pipeline.measuring import scores
from pipeline.objective.sums import terms
from pipeline.optimizer import Problem
from pipeline.registry import Spec, catalogue, check_options, create, variants_of
from pipeline.scaffold import write_plugin
from plugins.seeded import ES, es

SMALL = Problem(10, "head", 100, 0)


@pytest.mark.parametrize(
    "text", ["spsa", "nevergrad:DE", "cmaes:SepCMA,sigma=0.3", "spsa,directions=4,epsilon=0.1"]
)
def test_a_spec_is_its_text(text: str) -> None:
    assert str(Spec.parse(text)) == text


@pytest.mark.parametrize("value", [r"\d+ stars", "a, b", "1+error", "it's"])
def test_a_value_in_quotes_is_what_stands_between_them(value: str) -> None:
    spec = Spec("regex", None, {"pattern": value, "n": 2})
    assert Spec.parse(str(spec)) == spec
    [(weight, term), rest] = terms(f"0.5*{spec}+length,words=3")
    assert (weight, Spec.parse(term), rest) == (0.5, spec, (1.0, "length,words=3"))


def test_what_an_option_of_text_is_given_may_look_like_a_number() -> None:
    assert check_options("objective", Spec.parse("regex,pattern=42"), scores.regex) == {"pattern": "42"}
    assert terms("regex,pattern=^a.*b$") == [(1.0, "regex,pattern=^a.*b$")]


@pytest.mark.parametrize("space", ["head", "full", "lora"])
def test_a_default_that_is_told_is_the_one_taken(space: str) -> None:
    for name in ES:
        made = es(Problem(20, space, 1000, 0), name=name)
        assert es.defaults(space, name)["population_size"] == made.passes_a_step  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("spas", "did you mean 'spsa'"),
        ("nope", "unknown optimizer 'nope'; choose one of adamw, .*spsa"),
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


def test_every_backend_says_which_variants_it_has() -> None:
    for backend, some in {"spsa": "OneSided", "es": "LowRank", "cmaes": "SepCMA"}.items():
        variants = {variant.name: variant.options for variant in variants_of(load("optimizer", backend))}
        assert some in variants
        for name, options in variants.items():
            create(Spec(backend, name, options), SMALL)
    assert "rank" not in {v.name: v.options for v in variants_of(load("optimizer", "spsa"))}["TwoPoint"]
    assert [variant.name for variant in catalogue(load("optimizer", "adamw"))] == [""]


def test_built_ins_of_every_kind_come_through_the_door() -> None:
    names = {kind: {plugin.name for plugin in installed([kind])} for kind in GROUPS}
    assert {"spsa", "es", "cmaes", "nevergrad", "adamw"} <= names["optimizer"]
    assert {"classification", "mlm", "clm"} <= names["task"]
    assert {"cross_entropy", "error", "squared_error", "margin", "cosine", "f1", "kl"} <= names["objective"]
    assert names["stage"] == {"prepare", "pretrain", "tune", "finetune", "evaluate"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random", "would hide the module random"),
        ("torch", "would hide the module torch"),
        ("My Method", "use lower-case letters"),
        ("lambda", "use lower-case letters"),
        ("spsa", "is installed already"),
    ],
)
def test_a_name_that_would_break_something_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_plugin("my-method", Path("/proc"))


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plugins"]])
def test_help_and_the_list_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'nevergrad', 'datasets', 'numpy', 'plugins.seeded'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
