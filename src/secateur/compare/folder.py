"""The folder of a comparison: the settings that all rows share, and the finished rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.compare.contents import digests
from secateur.compare.rows import Row
from secateur.config import Recipe
from secateur.errors import InputError
from secateur.planning import versions
from secateur.progress import say
from secateur.reading import read_json
from secateur.whole import write_whole


def identity_of(recipes: Sequence[Recipe], tasks: Sequence[str]) -> dict[str, Any]:
    """Everything that determines the numbers of all rows: settings, contents of local files, this program's version.

    Ratios and methods belong to single rows.
    """
    shared = recipes[0].model_dump(mode="json", exclude={"method": True, "budget": {"ratio"}})
    return {
        **shared,
        "tasks": list(tasks),
        "content": digests(recipes[0], tasks),
        "version": versions()["secateur"],
    }


def check_folder(output: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Raise InputError for a folder in use. Rows may be added to a comparison; their shared settings may not change."""
    folder = output / "rows"
    written = folder / "comparison.json"
    if written.exists() and not any(path.suffix == ".json" and path != written for path in folder.iterdir()):
        return  # it failed before anything was measured
    if written.exists() and not resume:
        raise InputError(f"{output} contains a comparison. Add --resume to continue it, or name another folder.")
    advice = f"The settings of the comparison in {output} are not known. Delete that folder, or name another one."
    known = read_json(written, advice=advice) if written.exists() else {}
    if not isinstance(known, dict):
        raise InputError(f"{written} is damaged. {advice}")
    before = _leaves(known)
    now = _leaves(identity)
    if written.exists() and before != now:
        other = [
            f"{key} {before.get(key)} there, {now.get(key)} here"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        raise InputError(
            f"{output} contains a comparison with other settings ({'; '.join(other[:3])}). Repeat its settings, or "
            "name another folder. All rows train for the same number of steps, therefore the longest method must be "
            "named again."
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file. Name a new folder.")
    if not written.exists() and any(path != folder and not _is_scratch(path, folder) for path in output.rglob("*")):
        raise InputError(f"{output} is not empty. Name a new folder.")


def _is_scratch(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a temporary file that a killed run may have left in ``folder``."""
    return path.parent == folder and path.name.endswith(".saving")


def _leaves(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return leaves


def open_folder(output: Path, identity: Mapping[str, Any]) -> Path:
    """The folder of the finished rows; it is made if it does not exist."""
    folder, new = output / "rows", not output.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "comparison.json", json.dumps(identity, indent=1))
    except OSError as error:
        if new:  # or the next attempt would find a folder in use
            shutil.rmtree(output, ignore_errors=True)
        raise InputError(f"{output} cannot be written: {error.strerror}. Name another folder.") from error
    return folder


def read_rows(output: Path) -> dict[tuple[str, float], Row]:
    """The rows in the folder by method and ratio, failed ones included. An incomplete row is made again. Raises
    InputError for a file that is no row."""
    found = {}
    for path in sorted((output / "rows").glob("*-*.json")):
        try:
            content = read_json(path)
        except InputError:
            say(f"{path} is damaged. It is treated as missing.")
            continue
        try:
            row = Row.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{path} is no row of a comparison. Delete that file, or name another folder.") from error
        found[row.method, row.ratio] = row
    return found


def write_row(output: Path, row: Row) -> None:
    """Write a row to its own file. Two ratios never share one, however close they are."""
    write_whole(_row_path(output, row.method, row.ratio), row.model_dump_json(indent=1))


def check_rows(output: Path, rows: Mapping[tuple[str, float], Row], recipes: Iterable[Recipe]) -> None:
    """Raise InputError when a finished row's method had other settings than its recipe gives it now."""
    for recipe in recipes:
        name, ratio = recipe.method.name, recipe.budget.ratio
        row = rows.get((name, ratio))
        if row and row.error is None and row.settings != recipe.method.settings.model_dump(mode="json"):
            raise InputError(
                f"{_row_path(output, name, ratio)} was made with other settings of {name}. Repeat those, delete that "
                "file, or name another folder."
            )


def _row_path(output: Path, method: str, ratio: float) -> Path:
    return output / "rows" / f"{method}-{ratio!r}.json"
