"""Rebuilds a run's final weights from its start and its trajectory, and holds them against the saved ones."""

from __future__ import annotations

import filecmp
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import config as configuration
from pipeline import prompt, start
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout, partial
from pipeline.models import choose_device, merge_lora
from pipeline.tasks.classification import START_FILE
from pipeline.trajectory import FILE, Trajectory

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Replayed:
    """A stage replayed: the digest of its searched weights, and how many steps and bytes it took.

    ``whole`` is false where the run was cut off: then there are no final weights to hold it against.
    """

    stage: str
    digest: str
    steps: int
    bytes: int
    whole: bool


def recorded(layout: Layout, stage: str) -> Path:
    """The folder that holds the stage's trajectory: the finished one, else what a killed run left."""
    folder = layout.pretrained if stage == "pretrain" else layout.finetuned
    return folder if (folder / FILE).is_file() else partial(folder)


def replay(layout: Layout, stage: str, out: Path | None = None) -> Replayed:
    """Replays ``pretrain`` or ``finetune`` of a run; saves the rebuilt model to ``out`` if given.

    Raises:
        UserError: there is no trajectory, the start has changed, or the weights differ in any bit.
    """
    folder = recorded(layout, stage)
    if out and (out.resolve() == folder.resolve() or (out.exists() and not out.is_dir())):
        raise UserError(f"--out {out} is a file, or the run's own folder; name another folder")
    trajectory = Trajectory.read(folder / FILE)
    config: Config = configuration.build(trajectory.header.config, source=str(folder / FILE))
    try:
        choose_device(config.device)
    except UserError:  # made elsewhere: moves along seeds have the same bits here
        config = replace(config, device="auto")
    begin = start.begin(config, layout, stage, folder)
    space = start.space(config.pretrain if stage == "pretrain" else config.finetune, config, begin.model)
    digest = trajectory.replay(space)
    if space.kind == "lora":
        merge_lora(begin.model.encoder)
    with tempfile.TemporaryDirectory() as scratch:
        rebuilt = out or Path(scratch)
        begin.model.save(rebuilt, begin.tokenizer)
        if trajectory.end is not None:
            _compare(folder, rebuilt)
    size, whole = (folder / FILE).stat().st_size, trajectory.end is not None
    return Replayed(stage, digest, len(trajectory.steps), size, whole)


def _compare(saved: Path, rebuilt: Path) -> None:
    for file in sorted([*saved.glob("*.safetensors"), *saved.glob(f"{prompt.FOLDER}/*.safetensors")]):
        same = rebuilt / file.relative_to(saved)
        if file.name != START_FILE and not filecmp.cmp(file, same, shallow=False):
            raise UserError(
                f"{file} is not what its trajectory gives: the saved model was changed after the run"
            )
