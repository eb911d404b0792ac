"""The other process: ``python -m pipeline.tracking.scribe`` sends to MLflow what it is told."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import IO, Any

from pipeline.tracking.sender import Sender
from pipeline.tracking.store import killed

IDLE_SECONDS = 1.0  # without a message; then what earlier processes left is sent


def main() -> None:
    """Reads messages from stdin until it ends, answers on stdout.

    A run that is open when stdin ends was killed with its process, and is marked so.
    """
    # mlflow prints; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(**content: str) -> None:
        try:
            print(json.dumps(content), file=answers, flush=True)
        except OSError:  # the run's process is gone; its runs are finished all the same
            return

    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    # Reading never waits for mlflow, or a full pipe would hold up training.
    threading.Thread(target=_read, args=(sys.stdin, messages), daemon=True).start()
    sender = Sender(lambda text: answer(warning=text))
    while (message := _next(messages, sender)) is not None:
        run = message.pop("run")
        sender.take(run, message)
        if message["do"] == "end":
            answer(ended=run)
    for run in sender.runs:
        for message in killed():
            sender.take(run, message)


def _read(stream: IO[str], messages: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        messages.put(json.loads(line))
    messages.put(None)


def _next(messages: queue.Queue[dict[str, Any] | None], sender: Sender) -> dict[str, Any] | None:
    """The next message; while there is none, what waits from earlier is sent."""
    while True:
        try:
            return messages.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            if not sender.send_one_left_behind():
                return messages.get()


if __name__ == "__main__":
    main()
