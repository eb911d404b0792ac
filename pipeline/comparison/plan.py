"""What a comparison runs: every optimizer with every seed, from one start a seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import user_code
from pipeline.config import SCALES, YARDSTICK, Config, TuneConfig
from pipeline.data.prepare import check_unchanged, digests
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models import fresh
from pipeline.registry import Spec
from pipeline.runs import slug
from pipeline.tuned import applied

FILE = "plan.json"
FILES = ("data", "code")  # of what the plan says: the digests of files, by path


@dataclass(frozen=True)
class Plan:
    """A comparison in ``root``.

    ``optimizers`` are specs; ``seeds`` those that are reported; ``tune`` how many trials tune each optimizer
    before, on a seed that is not among them, or 0.
    """

    root: Path
    config: Config
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    tune: int = 0

    @property
    def tuning_seed(self) -> int:
        return max(self.seeds) + 1

    def base(self, seed: int) -> Layout:
        """Where the seed's data is prepared and its model pretrained."""
        return Layout(self.root / "base" / f"seed-{seed}")

    def run(self, optimizer: str, seed: int) -> Layout:
        return Layout(self.root / slug(optimizer) / f"seed-{seed}")

    def study(self, optimizer: str) -> Layout:
        return Layout(self.root / slug(optimizer) / "tuning")

    def base_config(self, seed: int) -> Config:
        return dataclasses.replace(self.config, seed=seed, tune=TuneConfig())

    def study_config(self, optimizer: str) -> Config:
        """Of the optimizer's study: the same number of trials for each, on validation."""
        tune = dataclasses.replace(self.config.tune, enabled=True, trials=self.tune, workers=1, storage=None)
        return dataclasses.replace(self._of(optimizer, self.tuning_seed), tune=tune)

    def run_config(self, optimizer: str, seed: int, *, yardsticks: bool) -> Config:
        """Of one run, with what its optimizer's study found, and with or without the seed's yardsticks."""
        config = self._of(optimizer, seed)
        if self.tune:
            config = applied(config, self.study(optimizer).tuned)
        return configuration.updated(
            config, {"evaluate.baselines": yardsticks, "evaluate.adamw": False}, source="compare"
        )

    def preflight_config(self, optimizer: str) -> Config:
        """What can be looked at before anything runs."""
        return self._of(optimizer, self.seeds[0])

    def _of(self, optimizer: str, seed: int) -> Config:
        config = self.base_config(seed)
        if Spec.parse(optimizer).backend == YARDSTICK:
            return configuration.with_yardstick(config, optimizer)
        values: dict[str, Any] = {"finetune.optimizer": optimizer}
        if not self.is_configured(optimizer):
            values |= {f"finetune.{key}": None for key in SCALES}
        return configuration.updated(config, values, source="compare")

    def is_configured(self, optimizer: str) -> bool:
        """Whether it is the configuration's method: the scales and the rate there are meant for that one."""
        ours, theirs = Spec.parse(self.config.finetune.optimizer), Spec.parse(optimizer)
        if theirs.backend == YARDSTICK:  # whose rate is in evaluate
            return False
        return (ours.backend, ours.name) == (theirs.backend, theirs.name)

    def keep(self) -> None:
        """Writes the plan into its folder, or holds it against the one that is there.

        Raises:
            UserError: the folder holds another comparison.
        """
        path, now = self.root / FILE, self._said()
        if path.is_file():
            before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for key, value in now.items():
                # older plans say nothing of files
                known: Any = before.get(key, value if key in FILES else None)
                if known == value:
                    continue
                if key in FILES:
                    check_unchanged(known, value, self.root)
                raise UserError(f"{self.root} compares with {key}={known}, now {value}; use another --name")
            return
        self.root.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")

    def _said(self) -> dict[str, Any]:
        """Parameters first: with another file as one, it is the parameter that differs."""
        own: dict[str, Any] = {"optimizers": list(self.optimizers), "seeds": list(self.seeds)}
        own["tune"] = self.tune
        own |= {key: value for key, value in self.config.flat().items() if key != "seed"}
        if any(getattr(self.config.finetune, key) is not None for key in SCALES):
            own["scales of"] = self.config.finetune.optimizer  # older plans gave them to all methods
        code = user_code.digests(self.config.prepare.task, self.config.finetune.objective)
        code |= fresh.digests(self.config.model)
        return own | dict(zip(FILES, (digests(self.config), code), strict=True))


def parse_optimizers(text: str) -> tuple[str, ...]:
    """Specs apart by commas; a part with ``=`` is an option of the spec before it. AdamW is among them.

    Raises:
        UserError: no spec, an option before any, one that does not parse, or one twice.
    """
    specs: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if "=" not in part:
            specs.append(part)
        elif specs:
            specs[-1] += f",{part}"
        else:
            raise UserError(f"--optimizers begins with the option '{part}'; write a name before it")
    for spec in specs:
        Spec.parse(spec)
        if specs.count(spec) > 1:
            raise UserError(f"--optimizers names '{spec}' twice")
    yardstick = [spec for spec in specs if Spec.parse(spec).backend == YARDSTICK] or [YARDSTICK]
    return (*(spec for spec in specs if spec not in yardstick), *yardstick)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``3`` is 0, 1, 2; ``0,5,7`` is those.

    Raises:
        UserError: not whole numbers, none, or one twice.
    """
    parts: Sequence[str] = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seeds '{text}' is neither how many nor a list such as 0,5,7")
    seeds = tuple(range(int(parts[0]))) if len(parts) == 1 else tuple(int(part) for part in parts)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds '{text}': name at least one, and each once")
    return seeds
