"""What a parameter may be, and the one line when it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from pipeline.config import Config
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        ("finetune.batch_size=0", "'finetune.batch_size' must be at least 1, got 0"),
        ("finetune.evaluate_every=0", "at least 1"),
        ("finetune.max_length=1", "at least 4"),
        ("finetune.pooled_layers=0", "at least 1"),
        ("finetune.patience=-1", "at least 0"),
        ("finetune.learning_rate=.nan", "at least 0"),
        ("finetune.epsilon=.inf", "at least 0"),
        ("finetune.forward_passes=0", "at least 1"),
        ("pretrain.mask_probability=2", "from 0.01 to 0.99"),
        ("pretrain.validation_examples=0", "at least 1"),
        ("prepare.test_size=0", "at least 1"),
        ("seed=-1", "from 0"),
        ("seed=99999999999999999999999999", "from 0"),
        ("finetune.optimizer.epsilon=0.1", "'finetune.optimizer' is a value, such as 'spsa'"),
        ("finetune.batch_size.x=1", "is a value, such as '64'"),
        ("prepare.text=2020-13-01", "not readable YAML"),
        ("prepare.corpus=[no]", "takes texts, not 'False'; write it in quotes"),
        ("prepare.corpus=[{a: 1}]", "takes texts"),
        ("finetune.descriptions={yes: good}", "takes texts, not 'True'; write it in quotes"),
        ("finetune.descriptions=[a]", "a mapping of texts"),
        ("finetune.epsilon=abc", "takes a number, not 'abc'"),
        ("finetune.epsilom=1", "did you mean 'finetune.epsilon'"),
    ],
)
def test_what_does_not_fit_is_one_line(assignment: str, error: str) -> None:
    with pytest.raises(UserError, match=error.replace("[", r"\[")) as caught:
        config.override(Config(), [assignment])
    assert "\n" not in str(caught.value)


def test_numbers_among_texts_are_texts() -> None:
    chosen = config.override(
        Config(), ["prepare.corpus=[2020, a.txt]", "finetune.descriptions={0: bad, 1: good}"]
    )
    assert chosen.prepare.corpus == ["2020", "a.txt"]
    assert chosen.finetune.descriptions == {"0": "bad", "1": "good"}


def test_one_description_is_set_by_its_label() -> None:
    chosen = config.override(Config(), ["finetune.descriptions.up=good", "finetune.descriptions.down=bad"])
    assert chosen.finetune.descriptions == {"up": "good", "down": "bad"}


def test_a_configuration_is_what_was_written(tmp_path: Path) -> None:
    chosen = config.override(Config(), ["finetune.epsilon=1e-3", "seed=7", "prepare.corpus=a.txt"])
    config.write(chosen, tmp_path / "params.yaml")
    assert config.read(tmp_path / "params.yaml") == chosen
    assert chosen.finetune.epsilon == 0.001
    assert chosen.prepare.corpus == ["a.txt"]
