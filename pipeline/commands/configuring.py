"""The parameters of a run, from everything that a command line says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models.fresh import PREFIX, is_fresh

if TYPE_CHECKING:
    from pipeline.config import Config


def configure(
    file: Path | None,
    files: dict[str, str | None],
    flags: dict[str, Any],
    assignments: list[str],
    tuned: str | None = None,
) -> Config:
    """Parameters of a run: the file's, those found by tuning, then the user's data, then flags, then ``-S``.

    Without a file they are those of the study that ``tuned`` names, else the project's. ``--train`` replaces
    the data as a whole: the default's words for labels and its corpora are not its own.
    """
    from pipeline import config as configuration
    from pipeline.layout import project_root

    default = project_root() / "params.yaml"
    if tuned is not None:
        from pipeline.runs import find

        default = find(tuned).params
    if file is None and not default.is_file():
        chosen = configuration.Config()
    else:
        chosen = configuration.read(file or default)
    applied: dict[str, Any] = {}
    if tuned is not None:
        from pipeline.tuned import as_tuned

        chosen = as_tuned(chosen, find(tuned).tuned)
        applied["tune.enabled"] = False
    if files.get("train") is not None:
        applied |= {f"prepare.{key}": None for key in ("validation", "test", "text", "label")}
        applied |= {"prepare.corpus": ["task"], "finetune.descriptions": None, "finetune.verbalizers": None}
    for key, value in files.items():
        if value is not None:
            applied[f"prepare.{key}"] = value if key in ("text", "label") else absolute(value)
    applied |= {key: value for key, value in flags.items() if value is not None}
    chosen = configuration.override(chosen, assignments, applied)
    if tuned is not None:
        from pipeline.tuned import check

        check(chosen, find(tuned).tuned)
    return _absolute_files(chosen)


def _absolute_files(config: Config) -> Config:
    """The user's own code, and the model of a file of parameters, are meant from here too."""
    from pipeline import config as configuration
    from pipeline import user_code

    named = ("prepare.task", "pretrain.task", "pretrain.objective", "finetune.objective")
    known = config.flat()
    values: dict[str, Any] = {key: user_code.absolute(known[key]) for key in named}
    values["model"] = absolute(config.model)
    values["finetune.then"] = [
        {**each, **({"objective": user_code.absolute(each["objective"])} if "objective" in each else {})}
        for each in config.finetune.then
    ]
    return configuration.updated(config, values, "the command line")


def absolute(source: str) -> str:
    """Files are meant from where the user stands; runs live elsewhere."""
    prefix = PREFIX if is_fresh(source) else ""
    path = Path(source.removeprefix(prefix)).expanduser()
    return f"{prefix}{path.resolve()}" if path.exists() else source
