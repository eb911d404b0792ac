"""The held-out test, once, beside what it should be compared with."""

from __future__ import annotations

from pipeline import phases, start
from pipeline.config import Config, with_yardstick
from pipeline.engine import shared
from pipeline.measuring.evaluation import measured, tested
from pipeline.models.loading import choose_device
from pipeline.models.quantized import FORMATS
from pipeline.reporting.report import table, verdict, write_report
from pipeline.stage import Context, read_metrics, script, write_metrics, write_predictions
from pipeline.tasks.base import Start
from pipeline.tasks.users import check_start, checked_figures
from pipeline.trainer import train
from pipeline.tuned import with_tuned


def evaluate(context: Context) -> dict[str, float]:
    """Writes ``metrics.json``, the plots and the report."""
    layout = context.layout
    config = with_tuned(context.config, layout)
    metrics = {**read_metrics(layout.pretrained / "metrics.json")}
    write_predictions(layout.predictions, [], [])
    if config.prepare.task != "none":
        metrics.update(read_metrics(layout.finetuned / "metrics.json"))
        with shared.sharing():  # what several rows read of the same texts
            metrics = _test(context, metrics)
    write_metrics(layout.metrics, metrics)
    curves = {name: layout.plots / f"{name}.csv" for name in ("pretrain", "finetune")}
    write_report(config, layout, metrics, {name: path for name, path in curves.items() if path.is_file()})
    for picture in sorted(layout.plots.glob("*.png")):
        context.tracker.artifact(picture, "plots")
    for file in (layout.report, layout.metrics, layout.prepared / "card.md"):
        context.tracker.artifact(file)
    context.tracker.tags({"mlflow.note.content": verdict(metrics, config.finetune.method)})
    context.tracker.metrics(metrics, int(metrics.get("forward_passes", 0)))
    context.say(table(metrics))
    return metrics


def _test(context: Context, metrics: dict[str, float]) -> dict[str, float]:
    layout = context.layout
    config = with_tuned(context.config, layout)
    task = start.task(config, "finetune")
    begin = task.start(phases.as_last(config), layout, layout.finetuned)
    check_start(config.prepare.task, begin, "test")
    result = task.load(layout.finetuned).to(choose_device(config.device))
    test = tested(begin, result)
    write_predictions(layout.predictions, test.losses, test.scores, test.written)
    rows = {"test": test.figures}
    write_metrics(layout.metrics, {**metrics, **_flat(rows)})  # whatever becomes of the yardsticks
    if config.evaluate.baselines:
        rows |= checked_figures(config.prepare.task, task.yardsticks(begin))
        if config.evaluate.adamw:
            why = _no_adamw(config, begin)
            if why:
                context.say(f"evaluate: AdamW is left out: {why}")
            else:
                as_one = phases.as_first(config) if config.finetune.then else None
                rows["adamw"] = _adamw(
                    context, config, task.start(as_one, layout, layout.finetuned) if as_one else begin
                )
    return {**metrics, **_flat(rows)}


def _flat(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{row}/{key}": value for row, figures in rows.items() for key, value in figures.items()}


def _no_adamw(config: Config, begin: Start) -> str:
    """Why the yardstick by backpropagation is not made; empty where it is."""
    if not len(begin.test[0].targets):
        return "without targets there is no gradient"
    if config.dtype in FORMATS:
        return f"it moves every weight, and dtype={config.dtype} holds them as they are"
    return ""


def _adamw(context: Context, config: Config, begin: Start) -> dict[str, float]:
    """The same start, data order and budget, by backpropagation; the best validation loss is kept."""
    as_run = with_yardstick(config)
    begin.model.float()  # small steps would be lost in half precision: no fair yardstick
    space = start.space(as_run.finetune, as_run, begin.model)
    training = start.training(as_run.finetune, as_run, as_run.finetune.patience)
    with context.training_progress("adamw", training.forward_passes) as (on_step, _):
        result = train(
            training,
            begin.model,
            space,
            begin.batch,
            lambda: measured(begin),
            on_step=on_step,
        )
    return {
        **tested(begin, begin.model).figures,
        "forward_passes": result.forward_passes,
        "seconds": result.seconds,
    }


if __name__ == "__main__":
    script("evaluate")
