"""MLflow, one run per stage execution; and nothing where there is none.

Importing mlflow and opening its database costs some 5 s of processor time in every process, and a locked or
unreachable store can cost minutes. So none of it happens where training runs: a second process, the scribe,
imports mlflow while the first imports torch, and writes down what it is told over a pipe, one JSON object a
line. Training neither waits for it nor fails with it, and when training is killed the scribe still closes the
run.

``tracker`` is what stages use, ``process`` its end of the pipe, which ``lending`` shares with processes that
work beside it, ``scribe`` the other process, in which ``sender`` sends, ``spool`` keeps what is not sent and
``book`` writes it into MLflow; ``store`` is what all agree on.
"""

from pipeline.tracking.tracker import Tracker, track

__all__ = ["Tracker", "track"]
