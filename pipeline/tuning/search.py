"""What is searched: parameters by name, the range of each, and a configuration that has their values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import SCALES, Config, FinetuneConfig
from pipeline.errors import UserError, nearest
from pipeline.registry import Spec, defaults_of, options_of

REACH = 30.0  # how far from its default a scale or a rate is searched, as a factor
UNKNOWN = {"epsilon": 1e-2, "sigma": 1e-1, "learning_rate": 1e-3}  # where a backend says no default
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\*(\w+))?")
_SPECS = ("optimizer", "space")


@dataclass(frozen=True)
class Parameter:
    """One dimension of a search.

    ``name`` is a parameter of finetune (``learning_rate``) or an option in one of its specs
    (``optimizer.directions``). It has ``choices``, or lies in [``low``, ``high``], on a log scale where
    ``low`` is above zero; ``whole`` numbers only; with ``times``, it is that other parameter multiplied with
    such a number.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[Any, ...] = ()
    times: str = ""

    @property
    def label(self) -> str:
        """What the study calls it: of a tied one, the ratio."""
        return f"{self.name}/{self.times}" if self.times else self.name

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one that a trial may have."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


def searched(config: Config) -> list[Parameter]:
    """The parameters that ``config.tune.search`` names, or the optimizer's own: its scale and its rate.

    Raises:
        UserError: a range that is none, a name that is none, or an optimizer that has neither scale nor rate.
    """
    found = [parse(text) for text in config.tune.search] or _of_optimizer(config)
    names = [each.name for each in found]
    free = [each.name for each in found if not each.times]
    for each in found:
        if names.count(each.name) > 1:
            raise UserError(f"tune.search names '{each.name}' twice")
        if each.times and each.times not in free:
            raise UserError(
                f"tune.search ties '{each.name}' to '{each.times}', which is not searched by itself"
            )
        _check(each.name, config)
    return sorted(found, key=lambda each: bool(each.times))


def parse(text: str) -> Parameter:
    """``NAME=LOW..HIGH``, ``NAME=LOW..HIGH*OTHER`` or ``NAME=A|B|C``.

    Raises:
        UserError: anything else.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    if match := _RANGE.fullmatch(values):
        low, high, times = match.groups()
        whole = low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit() and not times
        if float(low) < float(high) < math.inf:
            return Parameter(name, float(low), float(high), whole, times=times or "")
    elif equals and "|" in values:
        return Parameter(name, choices=tuple(_literal(each) for each in values.split("|")))
    raise UserError(
        f"tune.search: '{text}' is not NAME=LOW..HIGH, NAME=LOW..HIGH*OTHER or NAME=A|B|C, "
        "such as learning_rate=1e-4..1e-1"
    )


def values_of(suggested: Mapping[str, Any], parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Values by name from those by label: a ratio becomes what it is of."""
    values: dict[str, Any] = {}
    for each in parameters:
        value = suggested[each.label]
        values[each.name] = value * values[each.times] if each.times else value
    return values


def first_guess(config: Config, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """By label, what the configuration has now or the optimizer takes by itself, as far as it is searched."""
    now = _present(config)
    guess: dict[str, Any] = {}
    for each in parameters:
        value = now.get(each.name)
        if each.times:
            value = value / now[each.times] if value and now.get(each.times) else None
        if value is not None and each.holds(value):
            guess[each.label] = value
    return guess


def assignments(values: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """``{"finetune.learning_rate": …}``, as `pipeline.config.updated` takes them."""
    out: dict[str, Any] = {}
    specs = {kind: Spec.parse(getattr(config.finetune, kind)) for kind in _SPECS}
    for name, value in values.items():
        kind, dot, option = name.partition(".")
        if dot:
            specs[kind] = dataclasses.replace(specs[kind], options=specs[kind].options | {option: value})
            out[f"finetune.{kind}"] = str(specs[kind])
        else:
            out[f"finetune.{name}"] = value
    return out


def _of_optimizer(config: Config) -> list[Parameter]:
    spec = Spec.parse(config.finetune.optimizer)
    now = _present(config)
    names = [key for key in SCALES if key in now and key not in spec.options]
    if not names:
        raise UserError(
            f"'{spec}' has no epsilon, sigma or learning_rate left to tune: say what to search with "
            "--search NAME=LOW..HIGH"
        )
    centres = {name: now[name] or UNKNOWN[name] for name in names}
    return [Parameter(name, centre / REACH, centre * REACH) for name, centre in centres.items()]


def _present(config: Config) -> dict[str, Any]:
    """Every parameter that can be searched, with its value now."""
    from pipeline import space

    options, kind = config.finetune, space.parse(config.finetune.space)
    method = defaults_of(Spec.parse(options.optimizer), kind.backend)
    given = {key: value for key, value in dataclasses.asdict(options).items() if key not in _SPECS}
    scales = {key: method[key] for key in SCALES if key in method}
    given = {key: value for key, value in given.items() if key not in SCALES} | {
        key: value if getattr(options, key) is None else getattr(options, key)
        for key, value in scales.items()
    }
    return (
        given
        | {f"optimizer.{key}": value for key, value in method.items()}
        | {f"space.{key}": value for key, value in kind.options.items()}
    )


def _check(name: str, config: Config) -> None:
    from pipeline import space
    from pipeline.entry_points import load

    kind, dot, option = name.partition(".")
    if dot and kind in _SPECS:
        chosen = Spec.parse(getattr(config.finetune, kind))
        known = (
            space.parse(str(chosen)).options
            if kind == "space"
            else options_of(load("optimizer", chosen.backend))
        )
        if option not in known and (known or kind == "space"):
            hint = nearest(option, known) or f"; it takes {', '.join(known) or 'none'}"
            raise UserError(f"tune.search: '{chosen}' has no option '{option}'{hint}")
        return
    fields = [each.name for each in dataclasses.fields(FinetuneConfig)]
    if name not in fields:
        hint = nearest(name, fields) or "; it takes a parameter of finetune, optimizer.OPTION or space.OPTION"
        raise UserError(f"tune.search: unknown parameter '{name}'{hint}")
    if name in SCALES and name not in _present(config):
        raise UserError(f"tune.search: '{config.finetune.optimizer}' takes no {name}")


def _literal(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict | list) else value  # a template has braces and colons
