"""Transfer to the task, by forward passes."""

from __future__ import annotations

from pathlib import Path

from pipeline import start
from pipeline.evaluation import features, measured
from pipeline.models import merge_lora
from pipeline.peak_memory import PeakMemory
from pipeline.stage import Context, fresh_folder, script, write_metrics
from pipeline.trainer import train
from pipeline.trajectory import FILE
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
    for artifact, place in ((layout.finetuned / FILE, ""), (layout.plots / "finetune.csv", "plots")):
        context.tracker.artifact(artifact, place)
    context.tracker.metrics(metrics, int(metrics["forward_passes"]))
    return metrics


def _finetune(context: Context, folder: Path) -> dict[str, float]:
    layout = context.layout
    config = with_tuned(context.config, layout)
    begin = start.begin(config, layout, "finetune", folder)
    space = start.space(config.finetune, config, begin.model)
    training = start.training(config.finetune, config, config.finetune.patience)
    context.say(
        f"finetune: {training.optimizer} over {training.space} ({space.size:,} coordinates), "
        f"{training.forward_passes:,} forward passes"
    )
    head_only = not begin.examiner and space.only_in(begin.model.head_parameters())
    kept = features(begin.model, begin.validation) if head_only else None
    with (
        PeakMemory(space.device) as memory,
        context.training_progress("finetune", training.forward_passes) as (on_step, on_measure),
    ):
        result = train(
            training,
            begin.model,
            space,
            begin.batch,
            lambda: measured(begin, kept),
            trajectory=folder / FILE,
            resume=context.resume,
            on_step=on_step,
            on_measure=on_measure,
            say=context.say,
        )
    context.write_curve("finetune", result.curve)
    if training.space.backend == "lora":
        base, rank = str(layout.pretrained.resolve()), training.space.options["rank"]
        begin.model.save_adapter(folder / "adapter", base, rank)
        merge_lora(begin.model.encoder)
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
