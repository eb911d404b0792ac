"""One scribe for a process and for those that it starts: each one's own would import mlflow again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError, current_process
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from pipeline.tracking.process import Scribe, the_scribe, use
from pipeline.tracking.store import killed


class LentScribe(Scribe):
    """Another process's, at the ``address`` that it lends it at; who lent it waits for what is written."""

    def __init__(self, address: str) -> None:
        self._line = Client(address, authkey=current_process().authkey)

    @property
    def alive(self) -> bool:
        return True

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the lender is gone, and this process ends with it
            self._line.send_bytes(json.dumps(message).encode())

    def _await(self, run: str) -> None:
        return


@contextmanager
def lending() -> Iterator[str]:
    """The address at which processes started by this one `borrow` its scribe; empty where tracking is off.

    In the end it has all that they sent.
    """
    scribe = the_scribe()
    if scribe is None:
        yield ""
        return
    with Listener(authkey=current_process().authkey) as listener:
        address, ending = str(listener.address), threading.Event()
        desk = threading.Thread(target=_serve, args=(listener, scribe, ending), daemon=True)
        desk.start()
        try:
            yield address
        finally:
            ending.set()
            Client(address, authkey=current_process().authkey).close()  # wakes the desk
            desk.join()


def borrow(address: str) -> None:
    """Has this process use the scribe that the one that started it lends."""
    if address:
        use(LentScribe(address))


def _serve(listener: Listener, scribe: Scribe, ending: threading.Event) -> None:
    """Takes callers until it is ``ending``, then hears those out that it has."""
    callers = []
    while not ending.is_set():
        with suppress(OSError, EOFError, AuthenticationError):  # no process of ours, or a dead one
            line = listener.accept()
            callers.append(threading.Thread(target=_pass_on, args=(line, scribe), daemon=True))
            callers[-1].start()
    for each in callers:
        each.join()


def _pass_on(line: Connection, scribe: Scribe) -> None:
    """A run that is open when its process ends was killed with it."""
    running: set[str] = set()
    with line, suppress(OSError, EOFError):
        while True:
            message = json.loads(line.recv_bytes())
            (running.discard if message["do"] == "end" else running.add)(message["run"])
            scribe.send(message)
    for run in running:
        for last in killed():
            scribe.send({"run": run, **last})
