"""Sends what was told of runs to MLflow, and keeps what it does not get there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking.book import Book, Rejected
from pipeline.tracking.spool import Entry, left_behind

RETRY_SECONDS = 30.0  # after a store has failed, before it is tried again


class Sender:
    """Takes messages run by run. Nothing a store does raises: ``warn`` is told, once for each store.

    ``warn`` gets one line.
    """

    def __init__(self, warn: Callable[[str], None], unsent: Path | None = None) -> None:
        self._unsent = unsent  # where it lies; else the start of a run says so
        self._warn_someone = warn
        self._books: dict[str, Book] = {}
        self._down: dict[str, float] = {}
        self._open: dict[str, _Run] = {}
        self._warned: set[str] = set()
        self._behind: Iterator[Entry] | None = None

    @property
    def runs(self) -> list[str]:
        """Those begun and not ended."""
        return [*self._open]

    def take(self, run: str, message: dict[str, Any]) -> None:
        """Notes one message of ``run``: writes it down, then sends it if the store is there."""
        if message["do"] == "start":
            self._unsent = Path(message.pop("unsent"))
            self._open[run] = _Run(run, message, self._entry(run, self._unsent))
        if (open_ := self._open.get(run)) is None:
            return
        open_.take(message)
        self._send(open_)
        if message["do"] == "end":
            open_.close()
            del self._open[run]

    def send_one_left_behind(self) -> bool:
        """Sends a run that an earlier process could not; whether there was one whose store is there."""
        if self._unsent is None:
            return False
        self._behind = self._behind or left_behind(self._unsent)
        for entry in self._behind:
            run = _Run(entry.run, {**entry.messages()[0], "late": True}, entry)
            run.pending[0] = run.first
            if self._is_down(run.uri):
                entry.release()
                continue
            self._send(run)
            run.close()
            return True
        self._behind = None
        return False

    def _entry(self, run: str, unsent: Path) -> Entry | None:
        try:
            return Entry(run, unsent)
        except OSError as error:  # a timeout is one
            self._warn("spool", f"what is not sent cannot be kept: {error}")
            return None

    def _send(self, run: _Run) -> None:
        while run.pending and not self._is_down(run.uri):
            try:
                if run.uri not in self._books:
                    self._books[run.uri] = Book(run.uri, run.first.get("artifacts"))
                self._books[run.uri].write(run.name, run.pending[0])
            except Rejected as error:
                self._warn(f"{run.uri} rejected", f"MLflow: {_line(error)}")
            except Exception as error:  # whatever a store may raise: tracking never stops a run
                self._down[run.uri] = time.monotonic()
                kept = "what it notes is kept and sent by the next run, or by `pipeline sync`"
                self._warn(run.uri, f"MLflow: {_line(error)}; {kept}")
                return
            run.pending.pop(0)

    def _is_down(self, uri: str) -> bool:
        return uri in self._down and time.monotonic() - self._down[uri] < RETRY_SECONDS

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._warn_someone(text)


class _Run:
    """A run at work: what of it is still to be sent, and where that is written down."""

    def __init__(self, name: str, first: dict[str, Any], entry: Entry | None) -> None:
        self.name, self.first, self.uri, self._entry = name, first, str(first["uri"]), entry
        # a run that goes on: what its first part could not send comes first
        self.pending = entry.messages() if entry else []

    def take(self, message: dict[str, Any]) -> None:
        self.pending.append(message)
        if self._entry:
            self._entry.append(message)

    def close(self) -> None:
        """Leaves what is not sent to others."""
        if self._entry is None:
            return
        if not self.pending:
            self._entry.drop()
            return
        begun = self.pending[0]["do"] == "start"
        self._entry.keep(self.pending if begun else [self.first, *self.pending])


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
