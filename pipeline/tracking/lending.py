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

_CALLERS = 128  # that may wait to be heard at once


class LentScribe(Scribe):
    """Another process's, at the other end of ``line``; who lent it waits for what is written."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._writing = threading.Lock()

    @property
    def alive(self) -> bool:
        return True

    def send(self, message: dict[str, Any]) -> None:
        with self._writing, suppress(OSError):  # the lender is gone, and this process ends with it
            self._line.send_bytes(json.dumps(message).encode())

    def _await(self, run: str) -> None:
        return


@contextmanager
def lending() -> Iterator[str]:
    """The address at which processes started by this one `borrow` its scribe.

    In the end it has all that they sent. Empty where tracking is off or no address is to be had: then
    each has its own.
    """
    listener = None
    if the_scribe() is not None:
        with suppress(OSError):  # a TMPDIR too long for the name of a socket
            listener = Listener(backlog=_CALLERS, authkey=current_process().authkey)
    if listener is None:
        yield ""
        return
    address, ending = str(listener.address), threading.Event()
    desk = threading.Thread(target=_serve, args=(listener, ending), daemon=True)
    desk.start()
    try:
        yield address
    finally:
        ending.set()
        with suppress(OSError):
            Client(address).close()  # wakes the desk; it must not wait for an answer
        desk.join()
        listener.close()


def borrow(address: str) -> None:
    """Has this process use the scribe that the one that started it lends; its own where that fails."""
    if address:
        with suppress(OSError, EOFError, AuthenticationError):
            use(LentScribe(Client(address, authkey=current_process().authkey)))


def _serve(listener: Listener, ending: threading.Event) -> None:
    """Takes callers until it is ``ending``, then hears those out that it has."""
    callers = []
    while not ending.is_set():
        with suppress(OSError, EOFError, AuthenticationError):  # no process of ours, or a dead one
            callers.append(threading.Thread(target=_pass_on, args=(listener.accept(),), daemon=True))
            callers[-1].start()
    for each in callers:
        each.join()


def _pass_on(line: Connection) -> None:
    """A run that is open when its process ends was killed with it."""
    running: dict[str, Scribe] = {}
    with line, suppress(OSError, EOFError, ValueError):  # a ValueError is a message that broke off
        while True:
            message = json.loads(line.recv_bytes())
            run = message["run"]
            if message["do"] == "start" and (scribe := the_scribe()):  # anew, if the last one has died
                running[run] = scribe
            if run in running:
                running[run].send(message)
            if message["do"] == "end":
                running.pop(run, None)
    for run, scribe in running.items():
        for last in killed():
            scribe.send({"run": run, **last})
