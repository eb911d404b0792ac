"""The boundaries: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _imports(folder: str) -> Iterator[tuple[Path, str]]:
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield file, node.module


def test_the_library_knows_neither_plugins_nor_stages() -> None:
    wrong = [(f, m) for f, m in _imports("pipeline") if m.split(".")[0] in ("plugins", "stages")]
    assert not wrong


def test_plugins_know_the_library_and_not_each_other() -> None:
    for file, module in _imports("plugins"):
        family = file.relative_to(ROOT / "plugins").parts[0].removesuffix(".py")
        assert module.split(".")[0] != "stages"
        if module.startswith("plugins"):
            assert module.split(".")[1] == family, (file, module)


def test_only_tracking_and_its_ui_know_mlflow() -> None:
    users = [file for file, module in _imports("pipeline") if module.split(".")[0] == "mlflow"]
    assert {str(file.relative_to(ROOT)) for file in users} == {"pipeline/tracking/book.py"}
