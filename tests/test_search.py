"""What may be searched: ranges, their first guesses, and what a trial makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.tuning.search import Parameter, assignments, first_guess, parse, searched, values_of


def with_(config: Config, **values: Any) -> Config:
    return configuration.updated(config, {k.replace("__", "."): v for k, v in values.items()}, source="test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=1e-4..1e-1", Parameter("learning_rate", 1e-4, 1e-1)),
        ("optimizer.directions=4..64", Parameter("optimizer.directions", 4, 64, whole=True)),
        ("batch_size=16|32", Parameter("batch_size", choices=(16, 32))),
        ("learning_rate=0.1..10*epsilon", Parameter("learning_rate", 0.1, 10, times="epsilon")),
        ("learning_rate=1..10*epsilon", Parameter("learning_rate", 1, 10, times="epsilon")),
    ],
)
def test_a_range_is_read(text: str, expected: Parameter) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("search", "error"),
    [
        (["learning_rate"], "is not NAME=LOW..HIGH"),
        (["learning_rate=2..1"], "is not NAME=LOW..HIGH"),
        (["learning_rate=a..b"], "is not NAME=LOW..HIGH"),
        (["learning_rat=1..2"], "did you mean 'learning_rate'"),
        (["sigma=1..2"], "'spsa' takes no sigma"),
        (["optimizer.direction=1..2"], "did you mean 'directions'"),
        (["learning_rate=1..2*epsilon"], "ties 'learning_rate' to 'epsilon'"),
        (["epsilon=1..2", "epsilon=1..3"], "names 'epsilon' twice"),
        (["space.rank=2..16"], "'head' has no option 'rank'; it takes none"),
        (["epsilon=1..2*epsilon"], "ties 'epsilon' to 'epsilon', which is not searched by itself"),
    ],
)
def test_a_search_that_does_not_fit_is_one_line(search: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        searched(with_(Config(), tune__search=search))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ("spsa", ["epsilon", "learning_rate"]),
        ("spsa,epsilon=0.1", ["learning_rate"]),
        ("es", ["sigma", "learning_rate"]),
        ("cmaes:SepCMA", ["sigma"]),
        ("nevergrad:DE", ["sigma"]),
        ("adamw", ["learning_rate"]),
    ],
)
def test_an_optimizer_is_searched_around_its_defaults(optimizer: str, names: list[str]) -> None:
    chosen = with_(Config(), finetune__optimizer=optimizer)
    found = searched(chosen)
    assert [each.name for each in found] == names
    guess = first_guess(chosen, found)
    assert list(guess) == names
    assert all(each.low < guess[each.name] < each.high for each in found)


def test_a_value_that_was_set_is_the_first_guess() -> None:
    chosen = with_(Config(), finetune__epsilon=0.5, finetune__learning_rate=0.25)
    tied = with_(chosen, tune__search=["epsilon=1e-3..1", "learning_rate=1e-2..1e2*epsilon"])
    assert first_guess(chosen, searched(chosen)) == {"epsilon": 0.5, "learning_rate": 0.25}
    assert first_guess(tied, searched(tied)) == {"epsilon": 0.5, "learning_rate/epsilon": 0.5}


def test_a_ratio_becomes_a_rate_and_an_option_a_part_of_its_spec() -> None:
    chosen = with_(
        Config(),
        finetune__optimizer="spsa,schedule=constant",
        tune__search=["learning_rate=0.1..10*epsilon", "epsilon=1e-3..1", "optimizer.directions=2..8"],
    )
    suggested = {"epsilon": 0.5, "learning_rate/epsilon": 4.0, "optimizer.directions": 3}
    values = assignments(values_of(suggested, searched(chosen)), chosen)
    assert values == {
        "finetune.epsilon": 0.5,
        "finetune.learning_rate": 2.0,
        "finetune.optimizer": "spsa,schedule=constant,directions=3",
    }


def test_a_guess_is_what_a_run_would_have_had() -> None:
    config = Config()
    rank = with_(config, finetune__space="lora", tune__search=["space.rank=2..16"])
    assert first_guess(rank, searched(rank)) == {"space.rank": 8}
    apart = with_(config, tune__search=["epsilon=0.5..1", "learning_rate=1e-9..1"])
    assert list(first_guess(apart, searched(apart))) == ["learning_rate"]  # the default lies elsewhere


def test_a_choice_may_be_any_text() -> None:
    template = "{text} It was|Review: {text}"
    assert parse(f"template={template}").choices == tuple(template.split("|"))
