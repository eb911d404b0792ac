"""What is not in MLflow yet, as files: ``mlruns/unsent/<run>``, a line for each message.

A message is written here before it is sent, and the folder goes when all of it has arrived; so neither an
absent server nor a killed process loses any. Whoever is at a folder holds its lock, which dies with the
process.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.tracking.store import killed, mlruns

LOCK_SECONDS = 60.0
MESSAGES, LOCK, FILES = "messages.jsonl", "lock", "files"


def folder() -> Path:
    """Where what is unsent lies."""
    return mlruns() / "unsent"


class Entry:
    """The unsent messages of one run, in the folder ``under``, locked for this process.

    Raises:
        TimeoutError: another process holds it longer than ``patience`` seconds.
        OSError: the folder cannot be written.
    """

    def __init__(self, run: str, under: Path, patience: float = LOCK_SECONDS) -> None:
        self.run = run
        self._root = under / run
        until = time.monotonic() + patience
        while True:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._root / LOCK)
            self._lock.acquire(timeout=max(0.0, until - time.monotonic()))
            if (self._root / LOCK).exists():
                break
            self._lock.release()  # who held it has sent all, and removed what we waited for
        self._file = (self._root / MESSAGES).open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # behind a line that a killed process left half

    def append(self, message: Mapping[str, Any]) -> None:
        """Writes one more message down."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def messages(self) -> list[dict[str, Any]]:
        """All that was written down; a line that a killed process left half is left out."""
        self._file.flush()
        found = []
        for line in (self._root / MESSAGES).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # half a line, or none
                found.append(json.loads(line))
        return found

    def keep(self, messages: list[dict[str, Any]]) -> None:
        """Leaves ``messages`` for later, with copies of the files that they name, and lets go."""
        part = self._root / f"{MESSAGES}.part"
        kept = [self._with_copy(str(number), message) for number, message in enumerate(messages)]
        part.write_text("".join(json.dumps(message) + "\n" for message in kept), encoding="utf-8")
        part.replace(self._root / MESSAGES)
        self.release()

    def _with_copy(self, number: str, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] != "artifact" or not (path := Path(message["path"])).exists():
            return message
        if path.is_relative_to(self._root):
            return message
        copy = self._root / FILES / number / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            shutil.copy2(path, copy)
        return {**message, "path": str(copy)}

    def drop(self) -> None:
        """Removes it: all has arrived."""
        shutil.rmtree(self._root, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Leaves it as it is, for any process to take."""
        self._file.close()
        self._lock.release()


def waiting(under: Path) -> list[str]:
    """The runs that are not sent whole, those begun first first; some may be in a live process's hands."""
    found = []
    for path in under.glob(f"*/{MESSAGES}"):
        try:
            with path.open(encoding="utf-8") as file:
                found.append((json.loads(file.readline())["at"], path.parent.name))
        except (OSError, ValueError, KeyError):
            continue  # sent and gone meanwhile, or not begun yet
    return [run for _, run in sorted(found)]


def left_behind(under: Path) -> Iterator[Entry]:
    """The unsent runs that no process is at, one after another, each locked; an end is put to one without."""
    for run in waiting(under):
        if not (under / run).is_dir():
            continue
        try:
            entry = Entry(run, under, patience=0.0)
        except OSError:  # a timeout is one
            continue
        messages = entry.messages()
        if not messages:
            entry.drop()
            continue
        if messages[-1]["do"] != "end":
            for message in killed():
                entry.append(message)
        yield entry
