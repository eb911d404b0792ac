"""``pipeline run``: the stages in order, into a folder of the run's own."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline import config as configuration
from pipeline.config import Config, TrainConfig
from pipeline.errors import UserError, out_of_space, unknown
from pipeline.layout import Layout, partial, project_root
from pipeline.stage import ORDER, run


def stages_between(first: str | None, last: str | None) -> tuple[str, ...]:
    """The stages from ``first`` to ``last``, both included.

    Raises:
        UserError: an unknown stage, or an order that runs backwards.
    """
    for name in (first, last):
        if name is not None and name not in ORDER:
            raise unknown("stage", name, ORDER)
    low = ORDER.index(first) if first else 0
    high = ORDER.index(last) if last else len(ORDER) - 1
    if low > high:
        raise UserError(f"--from {first} comes after --to {last}; the order is {' → '.join(ORDER)}")
    return ORDER[low : high + 1]


def folder(name: str | None, config: Config, *, make: bool) -> Path:
    """``runs/<name>``; without a name, the optimizer's and the first free number.

    ``make`` makes an unnamed folder at once, so that of two processes no two take the same number.

    Raises:
        UserError: a name that is not a plain file name.
    """
    runs = project_root() / "runs"
    if name is not None:
        if not re.fullmatch(r"[\w.,=+-]+", name) or name in (".", ".."):
            raise UserError(f"--name '{name}': use letters, digits, '.', '_', '-', '=' and '+' only")
        return runs / name
    for number in itertools.count(1):
        path = runs / f"{slug(config.finetune.method)}-{number}"
        with contextlib.suppress(FileExistsError):
            if make:
                path.mkdir(parents=True)
            if make or not path.exists():
                return path
    raise AssertionError("unreachable")


def slug(text: str) -> str:
    """``text`` as a part of a folder's name."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")


def preflight(config: Config, stages: Sequence[str]) -> None:
    """Finds what can be found wrong before anything is computed: specs, spaces, files that are not there.

    Raises:
        UserError: whatever it finds.
    """
    from pipeline import phases
    from pipeline.data.prepare import check_sources
    from pipeline.models.loading import check, choose_device, choose_dtype
    from pipeline.start import task
    from pipeline.tasks.template import check as check_template
    from pipeline.tuning.search import searched

    choose_device(config.device)
    choose_dtype(config.dtype)
    if "prepare" in stages:
        check_sources(config)
    check(config.model)
    if config.pretrain.enabled and config.pretrain.task != "auto":
        task(config, "pretrain")
    if config.prepare.task != "none":
        task(config, "finetune")
        check_template(config.finetune)
    if config.tune.enabled and "tune" in stages:
        searched(config)
    if config.pretrain.enabled:
        _check_training(config.pretrain, config)
    if config.prepare.task != "none":
        phases.check(config)
    for phase in phases.of(config) if config.prepare.task != "none" else ():
        try:
            _check_training(phase.config.finetune, phase.config)
        except UserError as error:
            raise phase.named(error) from error


def _check_training(options: TrainConfig, config: Config) -> None:
    from pipeline.optimizer import Problem
    from pipeline.registry import create
    from pipeline.space import parse
    from pipeline.start import training

    plan = training(options, config)
    kind = parse(options.space).backend
    create(plan.optimizer, Problem(8, kind, max(1, options.forward_passes), config.seed), plan.defaults)


def unfinished(layout: Layout) -> tuple[Config, tuple[str, ...]]:
    """The parameters of a run that was cut off, and the stages it has still to do.

    Raises:
        UserError: it is whole.
    """
    if layout.root.resolve() == project_root():
        raise UserError("the project's own stages go on by `dvc repro`")
    config = configuration.read(layout.params)
    if first := first_unfinished(layout, config):
        return config, stages_between(first, None)
    raise UserError(f"{layout.root} is finished: nothing is left to resume")


def first_unfinished(layout: Layout, config: Config) -> str | None:
    """The first stage that has not written all it writes; None where all have."""
    begun = layout.finetuned.is_dir() or partial(layout.finetuned).is_dir()
    skipped = {
        "tune": not config.tune.enabled or begun,  # fine-tuning went on without it
        "finetune": config.prepare.task == "none",
    }
    for stage in ORDER:
        if not layout.last_written(stage).is_file() and not skipped.get(stage):
            return stage
    return None


def refuse_to_replace(layout: Layout) -> None:
    """What was trained is not lost to a name that was used before.

    Raises:
        UserError: the folder holds a model, or training that was cut off.
    """
    if any(path.exists() for stage in ("pretrain", "finetune") for path in layout.outputs(stage)):
        raise UserError(
            f"{layout.root} holds a run already, which this would replace: choose another --name, go on with "
            f"pipeline run --resume {layout.name}, do stages again with --from, or remove the folder"
        )


def execute(
    config: Config,
    layout: Layout,
    stages: Sequence[str],
    *,
    resume: bool = False,
    parent: str | None = None,
) -> None:
    """Runs the stages; the parameters as used are written first, and what the stages will replace goes.

    With ``resume`` the first of them goes on from what was left of it. ``parent`` is the ``id`` of the
    tracked run that these are part of.

    Raises:
        UserError: the folder holds a run with other parameters for the stages that are kept, or another
            process is at work in it.
    """
    from filelock import FileLock, Timeout

    layout.root.mkdir(parents=True, exist_ok=True)
    lock = layout.root / ".lock"
    try:
        with FileLock(lock, timeout=0):
            if layout.params.is_file():
                _same_before(layout, config, stages[0])
            if not resume:
                _clear_from(layout, stages[0])
            configuration.write(config, layout.params)
            for stage in stages:
                run(stage, config, layout, resume=resume and stage == stages[0], parent=parent)
    except Timeout:
        raise UserError(f"another process is at work in {layout.root}; choose another --name") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; to go on: pipeline run --resume {layout.name}") from None
    except UserError:
        if {path.name for path in layout.root.rglob("*")} <= {
            lock.name,
            layout.params.name,
            layout.ledger.name,
            layout.files.name,
            "data",
        }:
            shutil.rmtree(layout.root)  # nothing came of it
        raise
    except Exception as error:
        if out_of_space(error):
            raise UserError(
                f"no space is left on the disk of {layout.root}: free some, then go on with "
                f"pipeline run --resume {layout.name}"
            ) from error
        raise


def _clear_from(layout: Layout, first: str) -> None:
    """Deletes what ``first`` and the stages after it wrote: the results of two executions must not mix."""
    for stage in ORDER[ORDER.index(first) :]:
        for path in layout.outputs(stage):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _same_before(layout: Layout, config: Config, first: str) -> None:
    """Results of kept stages must be those of these parameters."""
    before = configuration.read(layout.params).flat()
    now = config.flat()
    kept = ORDER[: ORDER.index(first)]
    for key, value in now.items():
        section = key.split(".")[0]
        if (section in kept or ("." not in key and kept)) and before.get(key) != value:
            raise UserError(
                f"{layout.root} was made with {key}={before.get(key)}, now {value}: "
                f"--config {layout.params} keeps its parameters; or use another --name"
            )


def branch(base: Layout, root: Path) -> Layout:
    """A run's folder at ``root`` that goes on from ``base``'s prepared data and pretrained model.

    They are links, not copies: many runs share one start. What is there already stays.
    """
    layout = Layout(root)
    for here, there in ((layout.prepared, base.prepared), (layout.pretrained, base.pretrained)):
        here.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink() and not here.exists():  # the project has moved
            here.unlink()
        if not here.exists():
            here.symlink_to(there.resolve(), target_is_directory=True)
    curve = "pretrain.csv"
    if (base.plots / curve).is_file():
        layout.plots.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.plots / curve, layout.plots / curve)
    return layout


def find(name: str) -> Layout:
    """The run a person means: a folder, a name under ``runs/``, or ``.`` for the project's own ``dvc repro``.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    for path in (project_root() if name == "." else project_root() / "runs" / name, Path(name)):
        if (path / "params.yaml").is_file():
            return Layout(path.resolve())
    runs = project_root() / "runs"
    if name != "." and (runs / name).is_dir():
        raise UserError(f"{runs / name} holds no run: it has no params.yaml")
    names = [path.name for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    raise unknown("run", name, names) if names else UserError(f"no run '{name}'; `pipeline run` makes one")


def plan(config: Config, layout: Layout, stages: Sequence[str]) -> str:
    """What would be done, as YAML a person can read and ``--config`` can take."""
    shown = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    return f"# {layout.root}\n# stages: {' → '.join(stages)}\n{shown}"
