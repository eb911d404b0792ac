"""The held-out test, once, beside what it should be compared with."""

from __future__ import annotations

import dataclasses

from pipeline import start
from pipeline.config import FinetuneConfig
from pipeline.evaluation import linear_probe, majority, measure, measure_with_interval
from pipeline.report import table, verdict, write_report
from pipeline.stage import Context, read_metrics, script, write_metrics
from pipeline.tasks.classification import START_FILE, TextClassifier
from pipeline.trainer import train


def evaluate(context: Context) -> dict[str, float]:
    """Writes ``metrics.json``, the plots and the report."""
    config, layout = context.config, context.layout
    metrics = {**read_metrics(layout.pretrained / "metrics.json")}
    if config.prepare.task == "classification":
        metrics.update(read_metrics(layout.finetuned / "metrics.json"))
        metrics = _test(context, metrics)
    write_metrics(layout.metrics, metrics)
    curves = {name: layout.plots / f"{name}.csv" for name in ("pretrain", "finetune")}
    write_report(config, layout, metrics, {name: path for name, path in curves.items() if path.is_file()})
    for picture in sorted(layout.plots.glob("*.png")):
        context.tracker.artifact(picture, "plots")
    for file in (layout.report, layout.metrics, layout.prepared / "card.md"):
        context.tracker.artifact(file)
    context.tracker.tags({"mlflow.note.content": verdict(metrics, config.finetune.optimizer)})
    context.tracker.metrics(metrics, int(metrics.get("forward_passes", 0)))
    context.say(table(metrics))
    return metrics


def _test(context: Context, metrics: dict[str, float]) -> dict[str, float]:
    config = context.config
    begin = start.classifier(config, context.layout, head=context.layout.finetuned / START_FILE)
    test = begin.test.by_length(config.finetune.batch_size)
    result = TextClassifier.load(context.layout.finetuned).to(next(begin.model.parameters()).device)
    rows = {"test": measure_with_interval(result, test)}
    write_metrics(context.layout.metrics, {**metrics, **_flat(rows)})  # whatever becomes of the yardsticks
    if config.evaluate.baselines:
        rows["majority"] = majority(begin.train, begin.test)
        rows["zero_shot"] = measure_with_interval(begin.model, test)
        rows["linear_probe"] = linear_probe(begin.model, begin.train, begin.validation, begin.test)
        rows["adamw"] = _adamw(context, begin)
    return {**metrics, **_flat(rows)}


def _flat(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{row}/{key}": value for row, figures in rows.items() for key, value in figures.items()}


def _adamw(context: Context, begin: start.Finetuning) -> dict[str, float]:
    """The same start, data order and budget, by backpropagation; the best validation loss is kept."""
    config, options = context.config, context.config.evaluate
    yardstick: FinetuneConfig = dataclasses.replace(
        config.finetune,
        optimizer="adamw",
        space="full",
        learning_rate=options.adamw_learning_rate,
        evaluate_every=options.adamw_evaluate_every,
    )
    as_run = dataclasses.replace(config, finetune=yardstick)
    begin.model.float()  # small steps would be lost in half precision: no fair yardstick
    space = start.finetuning_space(as_run, begin)
    validation = begin.validation.by_length(yardstick.batch_size)
    training = start.training(yardstick, as_run, options.adamw_patience)
    with context.training_progress("adamw", training.forward_passes) as (on_step, _):
        result = train(
            training,
            begin.model,
            space,
            begin.batch,
            lambda: measure(begin.model, validation),
            on_step=on_step,
        )
    figures = measure_with_interval(begin.model, begin.test.by_length(yardstick.batch_size))
    return {**figures, "forward_passes": result.forward_passes, "seconds": result.seconds}


if __name__ == "__main__":
    script("evaluate")
