"""An Optuna study that survives its processes: no trial is lost, none is run twice.

A trial is taken, new or left behind by a process that died, under the study's lock; whoever runs it holds the
trial's own lock until its end is told. Both are the kernel's and go with the process, so a trial that is
RUNNING with a free lock was left behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.noise import derive
from pipeline.tuning.search import Parameter

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "journal.log"
_PATH = 13  # to the seeds of this module
_RANDOM_TRIALS = 10  # before the sampler models anything


@dataclass
class Taken:
    """A trial that this process runs: its number, its folder, and what was suggested, by label."""

    number: int
    folder: Path
    suggested: dict[str, Any]


class Study:
    """The study in ``folder``, whose trials are in ``folder/trials/trial-<number>``.

    ``direction`` is Optuna's; ``seed`` decides the suggestions, together with the trials that have ended when
    each is made.

    Raises:
        UserError: the storage cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Sequence[Parameter],
        *,
        name: str,
        direction: Literal["minimize", "maximize"],
        seed: int,
        storage: str | None = None,
        workers: int = 1,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.parameters = folder, list(parameters)
        self._seed, self._workers = seed, workers
        self._lock = FileLock(folder / ".lock")
        with self._lock:
            self._study = optuna.create_study(
                storage=_storage(folder, storage), study_name=name, direction=direction, load_if_exists=True
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self._study.get_trials(deepcopy=False)

    @property
    def ended(self) -> list[FrozenTrial]:
        """Those with an end: a value, or a failure."""
        return [each for each in self.trials if each.state.is_finished()]

    @property
    def best(self) -> FrozenTrial | None:
        """The trial of the best value; None before there is one."""
        told = [each for each in self.trials if each.value is not None and math.isfinite(each.value)]
        sign = 1 if self._study.direction.name == "MINIMIZE" else -1
        return min(told, key=lambda each: sign * (each.value or 0.0), default=None)

    @property
    def optuna(self) -> optuna.Study:
        """For its reports."""
        return self._study

    def close(self) -> None:
        """Lets a database's connections go; nothing else of the study is used after it."""
        from optuna.storages import RDBStorage

        storage: Any = self._study._storage
        storage = getattr(storage, "_backend", storage)  # behind Optuna's cache
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()

    def guess_first(self, guess: dict[str, Any]) -> None:
        """Has the first trial try ``guess``; nothing where there is one already."""
        with self._lock:
            if guess and not self.trials:
                self._study.enqueue_trial(guess)

    @contextmanager
    def take(self, at_most: int) -> Iterator[Taken | None]:
        """A trial left behind, or the next of ``at_most``; None when there is nothing more to take."""
        with self._lock:
            found = self._left_behind() or self._next(at_most)
        if found is None:
            yield None
            return
        taken, lock = found
        try:
            yield taken
        finally:
            lock.release()

    def tell(self, taken: Taken, value: float) -> None:
        """The trial's end; a value that is not finite is the worst there is."""
        if not math.isfinite(value):
            value = math.inf if self._study.direction.name == "MINIMIZE" else -math.inf
        self._study.tell(taken.number, value)

    def fail(self, taken: Taken, reason: str) -> None:
        """The trial's end, where it came to no value."""
        trial = next(each for each in self.trials if each.number == taken.number)
        self._study._storage.set_trial_user_attr(trial._trial_id, "error", reason)
        import optuna

        self._study.tell(taken.number, state=optuna.trial.TrialState.FAIL)

    def _left_behind(self) -> tuple[Taken, FileLock] | None:
        import optuna

        for each in self.trials:
            if each.state == optuna.trial.TrialState.RUNNING and (lock := self._held(each.number)):
                return self._taken(optuna.trial.Trial(self._study, each._trial_id), lock)
        return None

    def _next(self, at_most: int) -> tuple[Taken, FileLock] | None:
        import optuna

        waiting = optuna.trial.TrialState.WAITING
        begun = sum(each.state != waiting for each in self.trials)
        if begun >= at_most:
            return None
        # as new for each trial: what it suggests must not hang on how often the process was killed
        self._study.sampler = optuna.samplers.TPESampler(
            seed=derive(self._seed, _PATH, begun) % 2**32,
            n_startup_trials=_RANDOM_TRIALS,
            constant_liar=self._workers > 1,
        )
        trial = self._study.ask()
        lock = self._held(trial.number)
        assert lock  # of a trial that did not exist
        return self._taken(trial, lock)

    def _taken(self, trial: Trial, lock: FileLock) -> tuple[Taken, FileLock]:
        """What was suggested before is suggested again."""
        suggested = {each.label: _suggest(trial, each) for each in self.parameters}
        return Taken(trial.number, self._folder_of(trial.number), suggested), lock

    def _folder_of(self, number: int) -> Path:
        return self.folder / "trials" / f"trial-{number:03d}"

    def _held(self, number: int) -> FileLock | None:
        """The trial's lock, taken; None where another process has it."""
        folder = self._folder_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".trial")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock


class _KernelLock:
    """What a journal file is locked with; a process that is killed leaves none behind."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def _storage(folder: Path, url: str | None) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url is None:
        lock: Any = _KernelLock(folder / ".journal.lock")
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_obj=lock))
    try:
        return RDBStorage(url)
    except ImportError as error:
        raise UserError(f"tune.storage needs a driver: {error}; pip install psycopg[binary]") from None
    except Exception as error:  # whatever a driver may raise
        reason = " ".join(str(error).split())
        raise UserError(f"tune.storage '{url}' cannot be opened: {reason:.200}") from None


def _suggest(trial: Trial, parameter: Parameter) -> Any:
    if parameter.choices:
        return trial.suggest_categorical(parameter.label, parameter.choices)
    log = parameter.low > 0
    if parameter.whole:
        return trial.suggest_int(parameter.label, int(parameter.low), int(parameter.high), log=log)
    return trial.suggest_float(parameter.label, parameter.low, parameter.high, log=log)
