"""Transfer to the task, by forward passes; in one phase, or in several that go on from each other."""

from __future__ import annotations

from pathlib import Path

from pipeline import phases, start
from pipeline.measuring.evaluation import features, measured
from pipeline.models.loading import make_plain
from pipeline.models.quantized import FORMATS
from pipeline.peak_memory import PeakMemory
from pipeline.phases import Phase
from pipeline.reporting.phase_figures import together
from pipeline.stage import Context, fresh_folder, read_metrics, script, write_metrics
from pipeline.tasks.users import check_start
from pipeline.trainer import train
from pipeline.trajectory import FILE, Trajectory
from pipeline.tuned import with_tuned


def finetune(context: Context) -> dict[str, float]:
    """Writes ``models/finetuned``: the classifier and its trajectory; empty where there is no task."""
    layout = context.layout
    with fresh_folder(layout.finetuned, resume=context.resume) as folder:
        if context.config.prepare.task == "none":
            context.write_curve("finetune", [])
            return {}
        metrics = _finetune(context, folder)
        write_metrics(folder / "metrics.json", metrics)
    for each in phases.recorded_in(layout.finetuned):
        place = each.relative_to(layout.finetuned).as_posix()
        context.tracker.artifact(each / FILE, "" if place == "." else place)
    context.tracker.artifact(layout.plots / "finetune.csv", "plots")
    context.tracker.metrics(metrics, int(metrics["forward_passes"]))
    return metrics


def _finetune(context: Context, root: Path) -> dict[str, float]:
    """Runs the phases, or those that are left of them; their figures, and their curves as one."""
    done: list[dict[str, float]] = []
    curve: list[tuple[int, dict[str, float]]] = []
    for phase in phases.of(with_tuned(context.config, context.layout)):
        made = int(sum(each["forward_passes"] for each in done))
        if not phase.done(root):
            with phase.building(root, resume=context.resume) as folder:
                write_metrics(folder / "metrics.json", _phase(context, phase, root, folder, made))
        done.append(read_metrics(phase.folder(root) / "metrics.json"))
        curve += [(made + at, figures) for at, figures in Trajectory.read(phase.folder(root) / FILE).curve]
    context.write_curve("finetune", curve)
    return together(done, curve[0][1])


def _phase(context: Context, phase: Phase, root: Path, folder: Path, made: int) -> dict[str, float]:
    """Trains from where the phase before ended, after ``made`` forward passes."""
    layout, config = context.layout, phase.config
    begin = phases.begin(config, layout, root, phase.before(root))
    check_start(config.prepare.task, begin, "validation")
    space = start.space(config.finetune, config, begin.model)
    training = start.training(config.finetune, config, config.finetune.patience)
    name = f"{phase.name}, " if phase.name else ""
    context.say(
        f"finetune: {name}{training.optimizer} over {training.space} ({space.size:,} coordinates), "
        f"{training.forward_passes:,} forward passes"
    )
    if phase.name and not phase.recorded:
        context.say(f"finetune: {training.optimizer} leaves no record to replay: its end weights are kept")
    head_only = not begin.examiner and space.only_in(begin.model.head_parameters())
    kept = features(begin.model, begin.validation) if head_only else None
    with (
        PeakMemory(space.device) as memory,
        context.training_progress("finetune", training.forward_passes, made) as (on_step, on_measure),
    ):
        result = train(
            training,
            begin.model,
            space,
            begin.batch,
            lambda: measured(begin, kept),
            trajectory=folder / FILE,
            resume=context.resume and phase.recorded,
            on_step=on_step,
            on_measure=on_measure,
            say=context.say,
        )
    # of quantized weights the adapter's base would be the rounded ones, which nobody has
    if training.space.backend == "lora" and config.dtype not in FORMATS:
        base, rank = phase.before(layout.finetuned) or layout.pretrained, training.space.options["rank"]
        begin.model.save_adapter(folder / "adapter", str(base.resolve()), rank)
    make_plain(begin.model.encoder)
    begin.model.save(folder, begin.tokenizer)
    return {
        **{f"validation/{key}": value for key, value in result.kept.items()},
        "forward_passes": result.forward_passes,
        "seconds": result.seconds,
        "peak_memory_mib": memory.mib,
        "coordinates": space.size,
    }


if __name__ == "__main__":
    script("finetune")
