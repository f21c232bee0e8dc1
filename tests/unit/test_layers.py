"""The house rules that a machine can check: imports go downhill, small files, no pickle, no device calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "secateur"
FILES = sorted(SOURCE.rglob("*.py"))


def rows() -> dict[str, int]:
    """Room → row, read from the table in docs/architecture.md, so that the picture cannot drift from the house."""
    table = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    return {room: int(row) for row, rooms in table for room in re.findall(r"`(\w+)`", rooms)}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> Iterator[str]:
    """Every room that the file imports, at module level or inside a function."""
    package = ("secateur", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"secateur.{alias.name}" for alias in node.names] if module == "secateur" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "secateur":
                room = parts[1] if len(parts) > 1 else "__init__"
                yield room if (SOURCE / room).is_dir() or (SOURCE / f"{room}.py").exists() else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downhill(path: Path) -> None:
    row, here = rows(), room_of(path)
    assert here in row, f"{here} is in no row of the table in docs/architecture.md"
    for room in imported_rooms(path):
        assert room == here or row[room] < row[here], f"{here} (row {row[here]}) imports {room} (row {row[room]})"


def test_every_room_of_the_table_exists() -> None:
    assert {room for room in rows() if not (SOURCE / room).is_dir() and not (SOURCE / f"{room}.py").exists()} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_pickled_and_no_device_is_assumed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save", "eval", "exec"}
    assert not {name for name in called if name.endswith(".cuda")}, "use .to(device): the device comes from the model"


def test_public_names_are_unique() -> None:
    """Whoever looks a name up finds one thing; a command of the command line is named as the function that it calls."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    twice = {name: paths for name, paths in homes.items() if len(set(paths) - {"cli.py"}) > 1 and name != "main"}
    assert not twice
