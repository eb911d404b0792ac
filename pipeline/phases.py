"""Fine-tuning in phases: each a fine-tuning run as any, but for where it starts.

A phase has a folder, a configuration and a trajectory of its own. The last one's folder is the stage's, so
that a run of one phase is what it always was; the others lie in it, and the next phase starts from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import start
from pipeline.config import YARDSTICK, Config
from pipeline.errors import UserError
from pipeline.layout import PHASE, Layout, partial
from pipeline.models.loading import choose_device, locate, self_supervised_task
from pipeline.models.quantized import FORMATS
from pipeline.noise import derive
from pipeline.registry import Spec
from pipeline.stage import fresh_folder
from pipeline.tasks.base import Start
from pipeline.trajectory import FILE


@dataclass(frozen=True)
class Phase:
    """``config`` is the whole run as this phase, of ``count``, sees it; ``number`` counts from 1."""

    number: int
    count: int
    config: Config

    @property
    def name(self) -> str:
        """``phase 2 of 3``; empty where there is but one."""
        return f"phase {self.number} of {self.count}" if self.count > 1 else ""

    @property
    def recorded(self) -> bool:
        return leaves_record(self.config.finetune.optimizer)

    def folder(self, root: Path) -> Path:
        """Where it lies in ``root``, the stage's folder."""
        return root if self.number == self.count else _numbered(root, self.number)

    def done(self, root: Path) -> bool:
        """Whether it lies there whole. The last is so with the stage as a whole."""
        return self.number < self.count and self.folder(root).is_dir()

    def before(self, root: Path) -> Path | None:
        """The folder of the phase that it starts from, None of the first."""
        return _numbered(root, self.number - 1) if self.number > 1 else None

    @contextmanager
    def building(self, root: Path, *, resume: bool) -> Iterator[Path]:
        """Its folder to write into, which takes its place when all went well.

        Raises:
            UserError: what is raised within it, with the phase's name before it.
        """
        folder = self.folder(root)
        place = contextlib.nullcontext(root) if folder == root else fresh_folder(folder, resume=resume)
        try:
            with place as building:
                yield building
        except UserError as error:
            raise self.named(error) from error

    def named(self, error: UserError) -> UserError:
        """``error``, which says of which phase it is."""
        if not self.name:
            return error
        return UserError(f"{self.name} ({self.config.finetune.optimizer}): {error}")


def of(config: Config) -> list[Phase]:
    """The phases of fine-tuning; each after the first has a seed of its own for its data order and noise."""
    sections = config.finetune.phases
    return [
        Phase(number, len(sections), replace(config, finetune=section, seed=_seed(config.seed, number)))
        for number, section in enumerate(sections, 1)
    ]


def as_last(config: Config) -> Config:
    """``config`` with the last phase's section: what its result is measured by."""
    return replace(config, finetune=config.finetune.phases[-1])


def as_first(config: Config) -> Config:
    """``config`` with the first phase's section: what a run in one phase beside it goes by."""
    return replace(config, finetune=config.finetune.phases[0])


def check(config: Config) -> None:
    """What can be told of the phases together before the first begins.

    Raises:
        UserError: they cannot follow each other.
    """
    options = config.finetune
    if not options.then:
        return
    if config.dtype in FORMATS:
        raise UserError(
            f"finetune.then with dtype={config.dtype}: what a phase leaves is no longer held in few bits; "
            "set dtype=float32 or bfloat16"
        )
    heads = {Spec.parse(each.space).backend == "head" for each in options.phases}
    if (
        options.template is not None
        and len(heads) > 1
        and self_supervised_task(locate(config.model)) == "clm"
    ):
        raise UserError(
            "finetune.then: over head a decoder's template has a layer of its own, which no other space has; "
            "give all phases the space head, or none"
        )


def leaves_record(optimizer: str) -> bool:
    """Whether a run of it can be resumed and replayed: gradients are no scalars to keep."""
    return Spec.parse(optimizer).backend != YARDSTICK


def begin(config: Config, layout: Layout, root: Path, before: Path | None) -> Start:
    """Where a phase starts: as fine-tuning does, from the model in ``before`` if given.

    What a start keeps, such as a classifier's head, lies in ``root`` for all phases.
    """
    begun = start.begin(config, layout, "finetune", root)
    if before is None:
        return begun
    model = start.task(config, "finetune").load(before)
    return replace(begun, model=model.to(choose_device(config.device)))


def recorded_in(root: Path) -> list[Path]:
    """The folders of ``root`` that hold a trajectory, in the phases' order; the last may be cut off."""
    found: list[Path] = []
    while folder := _holder(_numbered(root, len(found) + 1)):
        found.append(folder)
    return [*found, *([root] if (root / FILE).is_file() else [])]


def _holder(folder: Path) -> Path | None:
    return next((each for each in (folder, partial(folder)) if (each / FILE).is_file()), None)


def _numbered(root: Path, number: int) -> Path:
    return root / f"{PHASE}{number}"


def _seed(seed: int, number: int) -> int:
    return seed if number == 1 else derive(seed, 11, number) % 2**31
