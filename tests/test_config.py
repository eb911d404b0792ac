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
        ("finetune.epsilon=.inf", "at least 0 and finite, got inf"),
        (f"finetune.epsilon={'9' * 400}", "takes a number"),
        ("finetune.batch_size='a\n\nb'", "takes a whole number, not 'a b'"),
        ("finetune.forward_passes=0", "at least 1"),
        ("pretrain.mask_probability=2", "from 1e-06 to 1"),
        ("pretrain.validation_examples=0", "at least 1"),
        ("prepare.test_size=-1", "at least 0"),
        ("seed=-1", "from 0"),
        ("seed=99999999999999999999999999", "from 0"),
        ("finetune.optimizer.epsilon=0.1", "options in it: finetune.optimizer=NAME,option=1"),
        ("finetune.batch_size.x=1", "'finetune.batch_size' is one value"),
        ("prepare.text.x=1", "'prepare.text' is one value"),
        ("finetune.descriptions={1.10: good}", "write it in quotes"),
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
