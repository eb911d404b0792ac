"""Rebuilds a run's final weights from its start and its trajectory, and holds them against the saved ones."""

from __future__ import annotations

import filecmp
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configuration
from pipeline import start
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models import merge_lora
from pipeline.trajectory import FILE, Trajectory

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Replayed:
    """A stage replayed: the digest of its searched weights, and how many steps and bytes it took."""

    stage: str
    digest: str
    steps: int
    bytes: int


def replay(layout: Layout, stage: str, out: Path | None = None) -> Replayed:
    """Replays ``pretrain`` or ``finetune`` of a run; saves the rebuilt model to ``out`` if given.

    Raises:
        UserError: there is no trajectory, the start has changed, or the weights differ in any bit.
    """
    folder = layout.pretrained if stage == "pretrain" else layout.finetuned
    trajectory = Trajectory.read(folder / FILE)
    config: Config = configuration.build(trajectory.header.config, source=str(folder / FILE))
    begin: start.Pretraining | start.Finetuning
    if stage == "pretrain":
        begin = start.pretraining(config, layout)
        space = begin.space
    else:
        begin = start.classifier(config, layout)
        space = start.finetuning_space(config, begin)
    digest = trajectory.replay(space)
    if space.kind == "lora":
        merge_lora(begin.model.encoder)
    with tempfile.TemporaryDirectory() as scratch:
        rebuilt = out or Path(scratch)
        begin.model.save(rebuilt, begin.tokenizer)
        if trajectory.end is not None:
            _compare(folder, rebuilt)
    return Replayed(stage, digest, len(trajectory.steps), (folder / FILE).stat().st_size)


def _compare(saved: Path, rebuilt: Path) -> None:
    for file in sorted(saved.glob("*.safetensors")):
        if not filecmp.cmp(file, rebuilt / file.name, shallow=False):
            raise UserError(
                f"{file} is not what its trajectory gives: the saved model was changed after the run"
            )
