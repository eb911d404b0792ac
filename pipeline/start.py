"""Where training starts: task, model, data and space, built alike by the stages and by replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import objective, user_code
from pipeline import space as spaces
from pipeline.config import YARDSTICK, Config, FinetuneConfig, TrainConfig
from pipeline.data.prepare import LABELS, PROMPTS, data_of
from pipeline.engine.evaluator import NO_GRADIENT
from pipeline.entry_points import load
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.models import fresh, quantized
from pipeline.models.loading import choose_device, locate, self_supervised_task
from pipeline.noise import derive
from pipeline.registry import Spec
from pipeline.tasks.base import WRITES_NONE, Start, Task, TaskModel
from pipeline.trainer import Training
from pipeline.user_code import Reference

READS = {"pretrain": "corpus", "finetune": "task"}  # what each training stage reads of the prepared data


def task_name(config: Config, stage: str) -> str:
    """The name of the ``pretrain`` or ``finetune`` stage's task."""
    name = _named_task(config, stage)
    return self_supervised_task(locate(config.model)) if name == "auto" else name


def _named_task(config: Config, stage: str) -> str:
    return config.prepare.task if stage == "finetune" else config.pretrain.task


def task(config: Config, stage: str) -> Task:
    """The task of the ``pretrain`` or ``finetune`` stage.

    Raises:
        UserError: there is none of that name, or it is one for the other stage.
    """
    name = task_name(config, stage)
    with user_code.watched(Reference.parse(name), "when made"):
        made = load("task", name)()
    if not isinstance(made, Task):
        lacks = [each for each in ("reads", "start", "load", "yardsticks") if not hasattr(made, each)]
        raise UserError(
            f"task '{name}' is a {type(made).__name__}, which lacks {', '.join(lacks)} of a Task: "
            "see docs/plugins.md"
        )
    if made.reads != READS[stage]:
        raise UserError(
            f"the task of {stage} is {name}, which reads {made.reads}; it needs one that reads {READS[stage]}"
        )
    return made


def begin(config: Config, layout: Layout, stage: str, folder: Path | None) -> Start:
    """`Task.start` of the stage's task. Raises UserError as it does."""
    chosen, reference = task(config, stage), Reference.parse(task_name(config, stage))
    with user_code.watched(reference, "where training starts"):
        made = chosen.start(config, layout, folder)
    if not isinstance(made, Start):
        raise UserError(
            f"{reference or chosen} gave a {type(made).__name__} from start(); it must give a Start"
        )
    return made


def space(options: TrainConfig, config: Config, model: TaskModel) -> spaces.Space:
    """The space that ``options.space`` names, over ``model``, which is moved to its device.

    Raises:
        UserError: the space is not in it.
    """
    spec = spaces.parse(options.space)
    spaces.prepare_model(spec, model, derive(config.seed, 8))
    model.eval().to(choose_device(config.device))
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the yardstick needs it; PEFT freezes what it wraps
    return spaces.build(spec, model, config.seed)


def training(options: TrainConfig, config: Config, patience: int = 0) -> Training:
    """A section of the configuration as the trainer takes it.

    Raises:
        UserError: a spec that does not parse, or an objective or a space that does not suit task and dtype.
    """
    stage = "finetune" if isinstance(options, FinetuneConfig) else "pretrain"
    where = spaces.parse(options.space)
    spaces.check_held(where, config.dtype in quantized.FORMATS)
    chosen = objective.parse(options.objective, lambda folder: task(config, stage).load(folder))
    _check_objective(config, options, chosen)
    offered: dict[str, Any] = {
        "epsilon": options.epsilon,
        "sigma": options.sigma,
        "learning_rate": options.learning_rate,
    }
    return Training(
        optimizer=Spec.parse(options.optimizer),
        space=where,
        forward_passes=options.forward_passes,
        evaluate_every=options.evaluate_every,
        run_seed=config.seed,
        patience=patience,
        objective=chosen,
        provenance=config.to_dict(),
        code=user_code.digests(options.objective, _named_task(config, stage)) | fresh.digests(config.model),
        defaults={key: value for key, value in offered.items() if value is not None},
    )


def _check_objective(config: Config, options: TrainConfig, chosen: objective.AnyObjective) -> None:
    """Raises UserError for a score of texts where none are written, or where targets are needed and missing,
    or for AdamW on an objective that is known to have no gradient.

    No model is needed to tell: a run is refused before anything is computed.
    """
    plain = (objective.error, objective.f1)
    if Spec.parse(options.optimizer).backend == YARDSTICK and (
        isinstance(chosen, objective.TextObjective) or chosen in plain
    ):
        raise UserError(NO_GRADIENT)
    data = data_of(config.prepare.task) if isinstance(options, FinetuneConfig) else LABELS
    if isinstance(chosen, objective.TextObjective) and data == LABELS:
        raise UserError(WRITES_NONE)
    if not isinstance(chosen, objective.TextObjective) and data == PROMPTS and config.prepare.label is None:
        raise UserError(
            f"the objective {options.objective} needs target texts, and the prompts have none: "
            "name their column with --label, or choose an objective on what is written, such as length"
        )
