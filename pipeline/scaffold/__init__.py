"""``pipeline plugins new NAME``: a whole distribution with an optimizer, to be changed into one's own."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path

from pipeline.errors import UserError

FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "{module}.py": "module.py.txt",
    "test_{module}.py": "test_module.py.txt",
}


def write_plugin(name: str, into: Path) -> Path:
    """Writes the distribution ``name`` into a folder of that name below ``into``; the folder.

    Raises:
        UserError: a name that cannot be an optimizer's and a module's, one that is taken, or a folder that is
            there or cannot be written.
    """
    from pipeline.entry_points import installed

    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise UserError(
            f"'{name}' cannot name a plugin: use lower-case letters, digits and '-', such as my-method"
        )
    taken = [plugin for plugin in installed(["optimizer"]) if plugin.name == name]
    if taken:
        raise UserError(f"{taken[0]} is installed already; choose another name")
    shadowed = importlib.util.find_spec(module)
    if shadowed and shadowed.origin:  # without one it is a folder of that name
        raise UserError(f"'{name}' would hide the module {module} ({shadowed.origin}); choose another name")
    folder = into / name
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another name, or another folder with --into")
    if not into.is_dir():
        raise UserError(f"no folder {into}; make it first")
    words = {"name": name, "module": module, "title": "".join(word.title() for word in module.split("_"))}
    try:
        folder.mkdir()
        for file, template in FILES.items():
            (folder / file.format(**words)).write_text(_filled(template, words), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; choose another folder with --into"
        ) from None
    return folder


def _filled(template: str, words: dict[str, str]) -> str:
    text = resources.files(__name__).joinpath(template).read_text(encoding="utf-8")
    for key, word in words.items():
        text = text.replace(f"@{key}@", word)
    return text
