"""Rebuilds a run's final weights from its start and its trajectory, and holds them against the saved ones."""

from __future__ import annotations

import filecmp
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import config as configuration
from pipeline import phases, start
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout, partial
from pipeline.models import prompt
from pipeline.models.loading import choose_device, make_plain
from pipeline.space import Space
from pipeline.tasks.base import Start
from pipeline.tasks.classification import START_FILE
from pipeline.trajectory import FILE, Trajectory

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Replayed:
    """A stage, or a phase of it, replayed: the digest of its searched weights, and its steps and bytes.

    ``whole`` is false where the run was cut off: then there are no final weights to hold it against.
    ``digest`` is empty of a phase that cannot be replayed, after which the next starts from what it left.
    """

    what: str
    digest: str
    steps: int
    bytes: int
    whole: bool


def root_of(layout: Layout, stage: str) -> Path:
    """The stage's folder: the finished one, else what a killed run left."""
    folder = layout.pretrained if stage == "pretrain" else layout.finetuned
    return folder if folder.is_dir() else partial(folder)


def recorded(layout: Layout, stage: str) -> list[Path]:
    """The folders with the stage's trajectories, phase by phase."""
    return phases.recorded_in(root_of(layout, stage))


def replay(layout: Layout, stage: str, out: Path | None = None) -> list[Replayed]:
    """Replays ``pretrain`` or each phase of ``finetune``; saves the rebuilt model to ``out`` if given.

    A phase starts from the weights that were rebuilt of the one before: trajectories are enough. Only what
    follows AdamW, whose gradients leave no record, starts from the weights that it left.

    Raises:
        UserError: there is no trajectory, the start has changed, or the weights differ in any bit.
    """
    root = root_of(layout, stage)
    folders = recorded(layout, stage) or [root]
    if out and (out.resolve() == root.resolve() or (out.exists() and not out.is_dir())):
        raise UserError(f"--out {out} is a file, or the run's own folder; name another folder")
    done: list[Replayed] = []
    with tempfile.TemporaryDirectory() as scratch:
        before = None
        for number, folder in enumerate(folders, 1):
            what = f"{stage}, phase {number}" if len(folders) > 1 or folder != root else stage
            last = folder == folders[-1]
            trajectory = Trajectory.read(folder / FILE)
            left = stage == "pretrain" or what != stage  # others come after it
            if left and not phases.leaves_record(trajectory.header.optimizer) and not (last and out):
                done.append(_left(what, folder, trajectory))
                before = folder
                continue
            rebuilt = out if last and out else Path(scratch) / str(number)
            begun = _begun(layout, stage, root, before, trajectory)
            done.append(_replayed(what, folder, trajectory, begun, rebuilt))
            before = rebuilt
    return done


def _left(what: str, folder: Path, trajectory: Trajectory) -> Replayed:
    """A phase that has no record to replay."""
    size = (folder / FILE).stat().st_size
    return Replayed(what, "", len(trajectory.steps), size, trajectory.end is not None)


def _begun(
    layout: Layout, stage: str, root: Path, before: Path | None, trajectory: Trajectory
) -> tuple[Start, Space]:
    """Where the recorded run began, and the space that it moved in."""
    config: Config = configuration.build(trajectory.header.config, source=str(root / FILE))
    try:
        choose_device(config.device)
    except UserError:  # made elsewhere: moves along seeds have the same bits here
        config = replace(config, device="auto")
    if stage == "pretrain":
        begin = start.begin(config, layout, stage, root)
        return begin, start.space(config.pretrain, config, begin.model)
    begin = phases.begin(config, layout, root, before)
    return begin, start.space(config.finetune, config, begin.model)


def _replayed(
    what: str, folder: Path, trajectory: Trajectory, begun: tuple[Start, Space], rebuilt: Path
) -> Replayed:
    begin, space = begun
    digest = trajectory.replay(space)
    make_plain(begin.model.encoder)
    begin.model.save(rebuilt, begin.tokenizer)
    whole = trajectory.end is not None
    if whole:
        _compare(folder, rebuilt)
    return Replayed(what, digest, len(trajectory.steps), (folder / FILE).stat().st_size, whole)


def _compare(saved: Path, rebuilt: Path) -> None:
    for file in sorted([*saved.glob("*.safetensors"), *saved.glob(f"{prompt.FOLDER}/*.safetensors")]):
        same = rebuilt / file.relative_to(saved)
        if file.name != START_FILE and not filecmp.cmp(file, same, shallow=False):
            raise UserError(
                f"{file} is not what its trajectory gives: the saved model was changed after the run"
            )
