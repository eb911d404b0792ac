"""The scribe as the process that trains sees it."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import Any

from pipeline.tracking.store import PATIENCE, QUIET, milliseconds

# How long the end of a run, or of this process, waits for the scribe: an import of mlflow and a fresh
# database take under 20 s on 2 cores.
PATIENCE_SECONDS = 60.0


class Scribe(ABC):
    """Where messages about runs go."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it takes messages still."""

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Takes a message; nothing is waited for, and nothing raised."""

    def end(self, run: str, status: str, *, wait: bool = True) -> None:
        """Closes the run; if ``wait``, comes back when all of it is written."""
        self.send({"do": "end", "run": run, "status": status, "at": milliseconds()})
        if wait:
            self._await(run)

    @abstractmethod
    def _await(self, run: str) -> None: ...


class ScribeProcess(Scribe):
    """A pipe to the other process; nothing sent through it is waited for until a run ends."""

    def __init__(self) -> None:
        # Its own session: Ctrl-C and a kill of the process group must leave it time to close the run.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.tracking.scribe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**PATIENCE, **os.environ, **QUIET},
            start_new_session=True,
        )
        self._ended: queue.Queue[str] = queue.Queue()
        self._writing = threading.Lock()  # a process that lends it sends from several threads
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            with self._writing:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
        except (OSError, ValueError):  # it is gone, or closed, and `end` says so
            return

    def _await(self, run: str) -> None:
        patience = time.monotonic() + PATIENCE_SECONDS
        while self.alive and time.monotonic() < patience:
            try:
                if self._ended.get(timeout=0.2) == run:
                    return
            except queue.Empty:
                continue
        _warn("the run was not written in time" if self.alive else "mlflow's process ended early")

    def close(self) -> None:
        """Lets it go; it ends when it has read everything."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(timeout=PATIENCE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            if "warning" in answer:
                _warn(answer["warning"])
            else:
                self._ended.put(answer["ended"])


_scribe: Scribe | None = None
_starting = threading.Lock()


def the_scribe() -> Scribe | None:
    """This process's scribe, started when first asked for; none where tracking is off."""
    global _scribe
    if os.environ.get("PIPELINE_TRACKING", "").lower() == "off":
        return None
    if importlib.util.find_spec("mlflow") is None:
        return None
    with _starting:
        if _scribe is None or not _scribe.alive:
            _scribe = ScribeProcess()
        return _scribe


def use(scribe: Scribe) -> None:
    """Has this process send to ``scribe``."""
    global _scribe
    _scribe = scribe


def _warn(text: str) -> None:
    print(f"tracking: {text}; the run itself goes on", file=sys.stderr, flush=True)
