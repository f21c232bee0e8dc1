"""The documentation says what is true: links lead somewhere, examples run, the map is the house."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import runpy
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from secateur.cli import app
from secateur.config import load_recipe
from secateur.methods import METHODS
from secateur.methods.one_shot import OneShot
from secateur.testing.tiny import build

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
METHODS_FILE = ROOT / "src" / "secateur" / "methods" / "__init__.py"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced code blocks of a page that are marked with ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    help_text = CliRunner().invoke(app, ["--help"]).stdout
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page.read_text()):
        for line in block.splitlines():
            words = line.split()
            if words[:1] == ["secateur"] and len(words) > 1 and words[1].isalpha():
                assert re.search(rf"^  {words[1]} ", help_text, re.MULTILINE), f"{name(page)}: {line}"
                usage = CliRunner().invoke(app, [words[1], "--help"]).stdout
                for option in re.findall(r"--[a-z-]+", line.partition("#")[0]):
                    assert option in usage, f"{name(page)}: {line}"
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_in_the_pages_exist(page: Path) -> None:
    """The settings of a line are read together; ``method.`` is the page's own method."""
    own = {"method": page.stem} if page.stem in METHODS else {}
    for line in page.read_text().splitlines():
        alone: list[str] = []
        for override in re.findall(r"--set ([a-z_]+\.[a-z_]+=(?:\[[^]]*\]|\{[^}]*\}|[^\s`)]+))", line):
            method, _, rest = override.partition(".")  # compare gives single methods their own settings
            if method in METHODS:
                load_recipe(None, [f"method.{rest}"], {"method": method})
            elif not override.startswith("section.key"):
                alone.append(override)
        load_recipe(None, alone, own)


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama-gqa").save_pretrained(tmp_path / "tiny")
    [example] = blocks((ROOT / "README.md").read_text(), "python")
    assert '"smollm2-135m"' in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example.replace('"smollm2-135m"', '"tiny"'), names)
    assert names["result"].plan.ratio_reached == pytest.approx(0.2, abs=0.05)  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "small" / "config.json").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=name)
def test_examples_run(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(path.parent)  # as when it is run by its name
    build("llama-gqa").save_pretrained(tmp_path / "tiny")
    runpy.run_path(str(path))["main"](str(tmp_path / "tiny"))
    assert "parameters" in capsys.readouterr().out


def test_the_map_of_the_readme_is_the_house() -> None:
    text = (ROOT / "README.md").read_text()
    house = {path.name for path in (ROOT / "src" / "secateur").iterdir() if not path.name.startswith("__")}
    house -= {"py.typed"}
    drawn = set(re.findall(r"[├└]── (\w+(?:\.py)?)", text))
    assert {item.removesuffix("/") for item in drawn} - {"__init__.py"} == house


def test_every_room_offers_what_the_architecture_says() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    offers = re.findall(r"^\| `(\w+)` \| (`.+`) \| .+ \|$", text, re.MULTILINE)
    assert len(offers) >= 20
    for room, names in offers:
        module = importlib.import_module(f"secateur.{room}")
        for offered in re.findall(r"`(\w+)`", names):
            submodule = importlib.util.find_spec(f"secateur.{room}.{offered}") if hasattr(module, "__path__") else None
            assert hasattr(module, offered) or submodule is not None, f"{room} has no {offered}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_parse_and_say_what_they_are_for(path: Path) -> None:
    load_recipe(path)
    assert path.read_text().startswith("# ")
    assert f"recipes/{path.name}" in (ROOT / "docs" / "recipes.md").read_text()


def test_recipes_in_the_pages_parse(tmp_path: Path) -> None:
    for page in PAGES:
        for index, block in enumerate(blocks(page.read_text(), "yaml")):
            path = tmp_path / f"{index}.yaml"
            path.write_text(block)
            if yaml.safe_load(block):
                load_recipe(path)


def test_the_lists_in_the_pages_are_up_to_date() -> None:
    write_lists = runpy.run_path(str(ROOT / "docs" / "write_lists.py"))
    for path, text in write_lists["pages"]().items():
        assert path.read_text() == text, f"{name(path)} is old; run: python docs/write_lists.py"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_five_places_and_no_sixth(method: str) -> None:
    """Its code, its line in ``METHODS``, a test that inherits the contract, a recipe and a page; lists are written."""
    row = METHODS[method]
    code = Path(inspect.getfile(row.criterion if issubclass(row, OneShot) else row))
    tests = [
        path
        for path in (ROOT / "tests" / "unit" / "methods").glob("*.py")
        if re.search(rf"    method = (METHODS\[\"{method}\"\]|{row.__name__})$", path.read_text(), re.MULTILINE)
    ]
    recipes = [path for path in RECIPES if load_recipe(path).method.name == method]
    assert tests, "no test inherits MethodContract"
    assert recipes, "no recipe"
    assert (ROOT / "docs" / "methods" / f"{method}.md").is_file(), "no page"
    if method not in ("lorashear", "wanda", "fisher", "taylor", "random", "magnitude"):  # which are defaults somewhere
        places = {path for path in (ROOT / "src").rglob("*.py") if f'"{method}"' in path.read_text()}
        assert {path for path in places if path.parent.name != "importance"} <= {METHODS_FILE, code}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [
        name(page)
        for page in PAGES
        if page.is_relative_to(ROOT / "docs") and page.relative_to(ROOT / "docs").as_posix() not in navigation
    ]
    assert not missing
