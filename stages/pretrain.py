"""Self-supervised learning on unlabelled text, by forward passes."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline import phases, start
from pipeline.measuring.evaluation import measure
from pipeline.models.fresh import is_fresh
from pipeline.models.loading import make_plain, pass_through
from pipeline.models.quantized import FORMATS
from pipeline.noise import derive
from pipeline.stage import Context, fresh_folder, script, write_metrics
from pipeline.tasks.base import Start
from pipeline.tasks.language_modelling import target_size
from pipeline.tasks.users import check_start
from pipeline.trainer import train
from pipeline.trajectory import FILE

MOST_NATS = 700.0  # whose exponential is still a number


def pretrain(context: Context) -> dict[str, float]:
    """Writes ``models/pretrained``: the language model and its trajectory, or the model as it came."""
    config, layout = context.config, context.layout
    with fresh_folder(layout.pretrained, resume=context.resume) as folder:
        if not config.pretrain.enabled:
            context.write_curve("pretrain", [])
            pass_through(config.model, folder, derive(config.seed, 6))
            write_metrics(folder / "metrics.json", {})
            return {}
        metrics = _pretrain(context, folder)
        write_metrics(folder / "metrics.json", metrics)
    context.tracker.artifact(layout.plots / "pretrain.csv", "plots")
    context.tracker.artifact(layout.pretrained / FILE)
    return metrics


def _pretrain(context: Context, folder: Path) -> dict[str, float]:
    config = context.config
    begin = start.begin(config, context.layout, "pretrain", folder)
    check_start(config.pretrain.task, begin, "validation")
    space = start.space(config.pretrain, config, begin.model)
    training = start.training(config.pretrain, config)
    context.say(
        f"pretrain: {start.task_name(config, 'pretrain')}, {training.optimizer} over {training.space} "
        f"({space.size:,} coordinates), {training.forward_passes:,} forward passes"
    )
    with context.training_progress("pretrain", training.forward_passes) as (on_step, on_measure):
        result = train(
            training,
            begin.model,
            space,
            begin.batch,
            lambda: measure(begin.model, begin.validation),
            trajectory=folder / FILE,
            resume=context.resume and phases.leaves_record(config.pretrain.optimizer),
            on_step=on_step,
            on_measure=on_measure,
            say=context.say,
        )
    context.write_curve("pretrain", result.curve)
    # else its base is not what was trained, or is nowhere
    if training.space.backend == "lora" and config.dtype not in FORMATS and not is_fresh(config.model):
        begin.model.save_adapter(folder / "adapter", config.model, training.space.options["rank"])
    make_plain(begin.model.encoder)
    begin.model.save(folder, begin.tokenizer)
    last = result.curve[-1][1]
    return {
        "pretrain/loss_before": result.curve[0][1]["loss"],
        "pretrain/loss_after": last["loss"],
        "pretrain/perplexity": math.exp(min(last["loss"], MOST_NATS)),
        "pretrain/accuracy": last["accuracy"],
        **_bits_per_byte(begin, start.task_name(config, "pretrain"), last["loss"]),
        "pretrain/forward_passes": result.forward_passes,
        "pretrain/seconds": result.seconds,
    }


def _bits_per_byte(begin: Start, task: str, loss: float) -> dict[str, float]:
    """What does not hang on the tokenizer, for models that predict every token."""
    if task != "clm" or begin.tokenizer is None:
        return {}
    tokens, size = target_size(begin.validation, begin.tokenizer)
    if not size:
        return {}
    return {"pretrain/bits_per_byte": loss * tokens / size / math.log(2)}


if __name__ == "__main__":
    script("pretrain")
