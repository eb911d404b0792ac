"""Models that come in another form: made into plain directories once, and kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.data.fetch import into_place
from pipeline.errors import UserError
from pipeline.layout import cache_dir


def made_once(name: str, files: Sequence[Path], doing: str, make: Callable[[Path], None]) -> Path:
    """The directory that ``make`` fills from ``files``, on first use; a line says what it is ``doing``.

    Its own name holds the hash of the files' content, and it appears by one rename, as a package does.

    Raises:
        UserError: the cache cannot be written.
    """
    kept = cache_dir() / "models"
    folder = kept / f"{name}-{_digest([file.resolve() for file in files])[:16]}"
    if folder.is_dir():
        return folder
    print(f"{doing}, once, into {folder}", file=sys.stderr)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix=".unpack-") as scratch:
            unpacked = Path(scratch) / "unpacked"
            make(unpacked)
            into_place(unpacked, folder)
    except OSError as error:
        raise UserError(f"cannot keep {name} in {kept}: {error}; set PIPELINE_CACHE to a folder") from error
    return folder


def _digest(files: Sequence[Path]) -> str:
    """Of one file's content; of several, of their digests in a row."""
    found = [_of_content(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


@functools.cache
def _of_content(file: Path, size: int, modified: int) -> str:
    """``size`` and ``modified`` (ns) say when it is another."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
