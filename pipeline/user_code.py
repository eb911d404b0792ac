"""Code that a user names by its file, ``./reward.py:score``: a plugin without a distribution.

The file is run when it is loaded, as any Python file that is imported; nothing else of its folder is.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UserError, nearest

# The marks of sums and options cannot be part of the path.
_REFERENCE = re.compile(r"(?P<path>[^+*,:\s][^+*,:]*\.py):(?P<name>\w+)")
_WITHIN = re.compile(r"(?P<before>(?:^|[+*])\s*)" + _REFERENCE.pattern)


@dataclass(frozen=True)
class Reference:
    """``PATH.py:NAME``, a name in a file."""

    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """The reference that the whole of ``text`` is; None where it is none."""
        found = _REFERENCE.fullmatch(text)
        return cls(Path(found["path"]).expanduser(), found["name"]) if found else None


def check_named(kind: str, text: str) -> None:
    """Raises UserError where ``text`` is a Python file and no name in it."""
    if text.endswith(".py"):
        raise UserError(f"{kind} '{text}' is a file: write the name in it after a colon, {text}:NAME")


def references(text: str) -> list[Reference]:
    """Those in ``text``, which may be a sum of objectives with options."""
    return [Reference(Path(each["path"]).expanduser(), each["name"]) for each in _WITHIN.finditer(text)]


def absolute(text: str) -> str:
    """``text`` with the paths of its references as seen from the working directory: runs lie elsewhere."""
    return _WITHIN.sub(
        lambda found: f"{found['before']}{Path(found['path']).expanduser().resolve()}:{found['name']}",
        text,
    )


def digests(*texts: str) -> dict[str, str]:
    """The sha256 of each file that ``texts`` name, by its path: what a run was made with.

    Raises:
        UserError: a file cannot be read.
    """
    paths = sorted({reference.path for text in texts for reference in references(text)})
    return {str(path): hashlib.sha256(_content(path)).hexdigest() for path in paths}


def load(kind: str, reference: Reference) -> Any:
    """What ``reference`` names.

    Raises:
        UserError: no such file or name, or the file fails when it is run.
    """
    module = _module(reference.path)
    if not hasattr(module, reference.name):
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = nearest(reference.name, own) or f"; it has {', '.join(own) or 'nothing that can be called'}"
        raise UserError(f"{reference.path} has no {kind} '{reference.name}'{hint}")
    found = getattr(module, reference.name)
    if not callable(found):
        raise UserError(f"{reference} is a {type(found).__name__}, which cannot be called")
    return found


@contextmanager
def watched(reference: Reference | None, doing: str) -> Iterator[None]:
    """While it is entered the code of ``reference`` is at work; ``doing`` says at what. None is ours.

    Raises:
        UserError: where anything goes wrong in a user's file: one line that says where.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reference is None:
            raise
        raise UserError(f"{place(error, reference.path)} ({reference.name} {doing})") from error


@contextmanager
def blamed(*texts: str) -> Iterator[None]:
    """While it is entered, what goes wrong in a file that ``texts`` name is told as its own, however deep.

    Raises:
        UserError: in place of an error that came through such a file: one line that says where.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        passed = {Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)}
        for reference in (each for text in texts for each in references(text)):
            if reference.path.resolve() in passed:
                raise UserError(place(error, reference.path)) from error
        raise


def place(error: BaseException, path: Path) -> str:
    """``reward.py, line 7: ValueError: …``: what went wrong, and where in the user's file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.resolve()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    where = f"{path}, line {line}" if line else str(path)
    return f"{where}: {type(error).__name__}: {said}"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _module(path: Path) -> ModuleType:
    """The file as a module: run once, and again when it was changed."""
    content = _content(path)
    name = "pipeline_user_" + hashlib.sha256(str(path).encode() + content).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)  # dataclasses look for it there
    module.__file__ = str(path.resolve())
    try:
        # the bytes that `digests` notes: an import might run what the file was earlier in the same second
        exec(compile(content, module.__file__, "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(place(error, path)) from error
    return module
