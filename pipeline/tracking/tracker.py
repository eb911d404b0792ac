"""What stages use: a tracked run, and what can be noted of it."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import SCALES, SECTIONS, Config
from pipeline.layout import DVC_EXPERIMENT, Layout, project_root
from pipeline.tracking import ledger, spool
from pipeline.tracking.process import Scribe, the_scribe
from pipeline.tracking.store import milliseconds, mlruns, store_uri

FLUSH_SECONDS = 10.0
LEADERBOARD = ("evaluate", "tune", "compare")  # what a person looks for; and a study's trials

Send = Callable[[dict[str, Any]], None]


class Tracker:
    """Notes one run. Every method returns at once; none raises when tracking fails.

    ``id`` is what the run is called here, before MLflow gives it an id; None where nothing is tracked.
    """

    def __init__(self, send: Send, id: str | None = None) -> None:
        self.id = id
        self._send = send
        self._metrics: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters as used; each is set once in a run."""
        self._send({"do": "log", "params": {key: str(value) for key, value in values.items()}})

    def metrics(self, values: Mapping[str, float], forward_passes: int) -> None:
        """Figures measured after so many forward passes (MLflow's step).

        They are kept here and sent every ``FLUSH_SECONDS``, to six digits: a table shows what fits, files
        have the rest. What is not finite is noted as NaN: MLflow would write infinity as 1.8e308, and no
        chart would show anything else.
        """
        now = milliseconds()
        for key, value in values.items():
            self._metrics.append((key, _short(value), now, forward_passes))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def tags(self, values: Mapping[str, Any]) -> None:
        """Words about the run; a later value replaces an earlier one."""
        self._send({"do": "log", "tags": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps a copy of the file ``path`` in the run's ``folder``; it must stay until the run ends."""
        self._send({"do": "artifact", "path": str(path.resolve()), "folder": folder})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The data the run used; ``digest`` is cut to the 36 characters MLflow takes."""
        self._send({"do": "dataset", "name": name, "digest": digest[:36], "source": source})

    def flush(self) -> None:
        """Sends the figures kept so far."""
        if self._metrics:
            self._send({"do": "log", "metrics": self._metrics})
        self._metrics = []
        self._flushed = time.monotonic()


def _short(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    return value if float(value).is_integer() else float(f"{value:.6g}")


@contextmanager
def track(
    stage: str, config: Config, layout: Layout, *, parent: str | None = None, resume: bool = False
) -> Iterator[Tracker]:
    """A tracked run of ``stage``: FINISHED, FAILED when an exception leaves it, KILLED on Ctrl-C.

    ``parent`` is the ``id`` of the run it is a part of, which may be another process's. With ``resume`` it is
    the run that was cut off, which goes on.

    ``PIPELINE_TRACKING=off``, or no mlflow installed: a tracker that does nothing. A store that cannot be
    reached costs one line on stderr. A search that is switched off is no run.
    """
    scribe = the_scribe() if stage != "tune" or config.tune.enabled else None
    if scribe is None:
        yield Tracker(lambda message: None)
        return
    before = ledger.noted(layout).get(stage, {}) if resume else {}
    run = before.get("run") or uuid.uuid4().hex
    told = before.get("store") == store_uri()  # MLflow refuses a second value of a parameter
    tracker = Tracker(lambda message: scribe.send({"run": run, **message}), run)
    _start(tracker, scribe, run, stage, config, layout, parent, again=told)
    status = "FINISHED"
    try:
        yield tracker
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException as error:
        status = "FAILED"
        tracker.tags({"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        raise
    finally:
        if stage == "prepare":
            _note_data(tracker, layout)
        tracker.flush()
        scribe.end(run, status, wait=parent is None)  # the end of the whole waits for its parts too


def _start(
    tracker: Tracker,
    scribe: Scribe,
    run: str,
    stage: str,
    config: Config,
    layout: Layout,
    parent: str | None,
    *,
    again: bool,
) -> None:
    commit = _commit()
    name = f"repro-{commit[:7]}" if layout.name == "repro" and commit else layout.name
    message: dict[str, Any] = {"do": "start", "run": run, "uri": store_uri(), "name": f"{name}/{stage}"}
    message |= {"at": milliseconds(), "parent": parent, "unsent": str(spool.folder())}
    ledger.note(layout, stage, {"run": run, "at": message["at"], "commit": commit, "store": message["uri"]})
    if message["uri"].startswith("sqlite:"):
        message["artifacts"] = (mlruns() / "artifacts").as_uri()
    tags = _tags(stage, config, commit)
    if stage in LEADERBOARD or layout.is_trial:
        tags["leaderboard"] = "true"
    scribe.send({**message, "tags": tags})
    if not again:
        tracker.params(_params(stage, config))
    if stage != "prepare":
        _note_data(tracker, layout)


def _params(stage: str, config: Config) -> dict[str, Any]:
    """What the stage reads: its section and what stands above all; of what is looked for, everything."""
    others = set() if stage in LEADERBOARD else set(SECTIONS) - {stage}
    values = {key: value for key, value in config.flat().items() if key.split(".")[0] not in others}
    for section in {"pretrain", "finetune"} - others:
        values |= _as_used(section, config)
    if stage == "compare":
        for key in ("optimizer", *SCALES):  # it has several
            del values[f"finetune.{key}"]
    elif config.finetune.then and "finetune.then" in values:
        values |= {
            "finetune.optimizer": config.finetune.method,
            "finetune.forward_passes": config.finetune.budget,
        }
    return values


def _as_used(section: str, config: Config) -> dict[str, Any]:
    """The scales that an optimizer takes by itself where none is set; those that it has not are blank."""
    from pipeline.errors import UserError
    from pipeline.registry import Spec, defaults_of

    options = getattr(config, section)
    try:
        own = defaults_of(Spec.parse(options.optimizer), Spec.parse(options.space).backend)
    except UserError:  # whoever runs it says so
        own = {}
    scales = {name: getattr(options, name) for name in SCALES}
    return {f"{section}.{name}": own.get(name, "") if set_ is None else set_ for name, set_ in scales.items()}


def _tags(stage: str, config: Config, commit: str) -> dict[str, str]:
    tags = {
        "stage": stage,
        "device": _device(config),
        "machine": f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "mlflow.source.name": "pipeline compare" if stage == "compare" else f"stages/{stage}.py",
        "mlflow.source.type": "LOCAL",
        **({"dvc.experiment": experiment} if (experiment := os.environ.get(DVC_EXPERIMENT)) else {}),
        "mlflow.user": _user(),
        "mlflow.note.content": _description(stage, config),
    }
    if stage not in ("prepare", "compare"):
        used = [config.pretrain] if stage == "pretrain" else config.finetune.phases
        tags.update(
            {key: ", then ".join(getattr(each, key) for each in used) for key in ("optimizer", "space")}
        )
    if commit:
        bare = commit.removesuffix("-dirty")
        tags.update({"git.commit": bare, "git.dirty": str(bare != commit).lower()})
        tags["mlflow.source.git.commit"] = bare
    return tags


def _description(stage: str, config: Config) -> str:
    """A sentence for a person who meets the run in a list."""
    data, model, budget = config.prepare.train, config.model, config.finetune.budget
    learns, by = (
        f"{config.prepare.task} on {data}",
        ", then ".join(f"`{each.optimizer}` over `{each.space}`" for each in config.finetune.phases),
    )
    before = f"`{config.pretrain.optimizer}` over `{config.pretrain.space}`"
    return {
        "prepare": f"Data for {learns}.",
        "pretrain": f"{model} on the corpus: {before}, {config.pretrain.forward_passes:,} forward passes.",
        "tune": f"{config.tune.trials} trials of {by}, ranked by validation {config.tune.by}.",
        "finetune": f"{model} learns {learns}: {by}, {budget:,} forward passes.",
        "compare": f"Optimizers beside each other: {model}, {learns}, {budget:,} forward passes each.",
    }.get(stage, f"The held-out test of {model} on {data} after {by}, {budget:,} forward passes.")


def _device(config: Config) -> str:
    """The device chosen; torch is not imported only to say so."""
    if config.device != "auto" or "torch" not in sys.modules:
        return config.device
    from pipeline.models.loading import choose_device

    return str(choose_device("auto"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _commit() -> str:
    """The project's commit, with ``-dirty`` behind it if tracked files were changed; empty without git."""
    command = ["git", "-C", str(project_root()), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _note_data(tracker: Tracker, layout: Layout) -> None:
    """The hash of the prepared data, if there is any."""
    path = layout.prepared / "card.json"
    if not path.is_file():
        return
    card = json.loads(path.read_text(encoding="utf-8"))
    if digest := card.get("hash"):
        sources = [source["source"] for source in card.get("sources", [])]
        tracker.tags({"data": digest})
        tracker.dataset(sources[0] if sources else "data", digest, str(layout.prepared))
