"""The one exception that means "the user can mend this": one line, exit status 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import sys
import warnings
from collections.abc import Callable, Iterable


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""


class Unsuitable(UserError):
    """A method that is right as it is written, but not for this budget, this memory or these weights."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'spsa'?`` for a misspelt ``word``, or ``""`` when nothing is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def unknown(kind: str, word: str, choices: Iterable[str]) -> UserError:
    """The error for a ``word`` that is not among ``choices``: the nearest one, or all of a short list."""
    choices = sorted(choices)
    hint = nearest(word, choices)
    if not hint and len(choices) <= 20:
        hint = f"; choose one of {', '.join(choices)}"
    return UserError(f"unknown {kind} '{word}'{hint}")


def out_of_space(error: BaseException) -> bool:
    """Whether ``error`` comes of a full disk, in Python or in safetensors' own code."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return f"(os error {errno.ENOSPC})" in str(error)


def guarded(action: Callable[[], object]) -> None:
    """Runs ``action``; what a user can mend becomes one line and exit status 2, Ctrl-C status 130.

    A warning is one line too.
    """
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        print(f"interrupted{stopped}", file=sys.stderr)
        raise SystemExit(130) from None
