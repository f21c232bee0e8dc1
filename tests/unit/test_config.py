"""The recipe: composed from the rooms' settings, every key reachable, every mistake answered with the way out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from secateur.compare.run import schedule_of
from secateur.config import Key, Recipe, describe, dump, load_recipe, recipe_of, revise
from secateur.errors import InputError
from secateur.methods import METHODS

SECTIONS = "model budget calibration method lora training recovery evaluation export effort seed".split()


def test_the_sections_are_these() -> None:
    assert list(Recipe.model_fields) == SECTIONS


@pytest.mark.parametrize("key", list(describe()), ids=lambda key: key.name)
def test_every_key_has_a_type_a_default_and_a_meaning(key: Key) -> None:
    assert key.type, key
    assert key.default, key
    assert len(key.meaning) > 10, key


@pytest.mark.parametrize("name", list(METHODS))
def test_every_key_of_a_method_has_a_meaning_and_a_default(name: str) -> None:
    assert all(len(key.meaning) > 10 and key.default for key in describe(METHODS[name].Settings))


@pytest.mark.parametrize("key", list(describe()), ids=lambda key: key.name)
def test_set_reaches_every_key(key: Key) -> None:
    default = load_recipe()
    override = f"{key.name}={key.default}"
    assert load_recipe(None, [override]) == default


@pytest.mark.parametrize("name", list(METHODS))
def test_dump_and_load_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"method={name}", "budget.ratio=0.35", "calibration.text=[news,wikipedia]", "seed=7"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load_recipe(path) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_dump_has_every_key_with_its_meaning() -> None:
    text = dump(load_recipe())
    tree = yaml.safe_load(text)
    for key in describe():
        section, _, rest = key.name.partition(".")
        assert section in tree
        assert not rest or rest in tree[section]
        assert key.meaning[:40] in text
    comments = [line for line in text.splitlines() if line.strip().startswith("#")]
    assert all(len(line) <= 120 for line in comments)


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\nbudget:\n")
    assert load_recipe(path) == load_recipe()


def test_set_wins_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("budget: {ratio: 0.1, floor: 0.25}\nseed: 3\n")
    recipe = load_recipe(path, ["budget.ratio=0.4"], {"budget.ratio": 0.3, "seed": 4})
    assert (recipe.budget.ratio, recipe.budget.floor, recipe.seed) == (0.4, 0.25, 4)


def test_values_are_yaml_and_one_value_is_a_list_of_one() -> None:
    recipe = load_recipe(None, ["calibration.text=news", "training.learning_rate=1e-4", "budget.round_to={ffn: 64}"])
    assert recipe.calibration.text == ["news"]
    assert recipe.training.learning_rate == 1e-4
    assert recipe.budget.round_to == {"ffn": 64}


def test_a_model_name_that_looks_like_yaml_stays_text() -> None:
    assert load_recipe(None, [], {"model.name": "1.5"}).model.name == "1.5"
    assert load_recipe(None, [], {"model.name": "a: b"}).model.name == "a: b"


def test_naming_the_same_method_keeps_its_settings_and_another_drops_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: {name: lorashear, periods: 3}\n")
    assert load_recipe(path, [], {"method": "lorashear"}).method.model_dump()["periods"] == 3
    assert load_recipe(path, [], {"method": "wanda"}).method.name == "wanda"
    assert load_recipe(path, ["method.periods=4"]).method.model_dump()["periods"] == 4


def test_a_method_may_be_a_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: random\n")
    assert load_recipe(path).method.name == "random"


@pytest.mark.parametrize(
    ("override", "answers"),
    [
        ("budget.ration=0.3", ["Unknown key budget.ration", "did you mean budget.ratio?", "floor"]),
        ("ratio=0.3", ["Unknown key ratio", "did you mean budget.ratio?", "The sections: model, budget"]),
        ("budgte.ratio=0.3", ["Unknown key budgte", "did you mean budget?"]),
        ("budget.ratio=1.5", ["budget.ratio = 1.5", "between 0 and 1"]),
        ("budget.ratio=0", ["budget.ratio = 0", "between 0 and 1"]),
        ("budget.ratio=1", ["budget.ratio = 1", "between 0 and 1"]),
        ("budget.ratio=.nan", ["budget.ratio = nan", "between 0 and 1"]),
        ("budget.ratio=word", ["budget.ratio = 'word'", "between 0 and 1"]),
        ("method=wnada", ["Unknown method wnada", "did you mean wanda?", "lorashear, "]),
        ("method={name: lorashear, perods: 3}", ["Unknown key method.perods", "did you mean method.periods?", "name"]),
        ("method={name: wanda, periods: 3}", ["Unknown key method.periods"]),
        ("training.precision=fp7", ["training.precision = 'fp7'", "'bf16'", "'fp32'"]),
        ("seed=x", ["seed = 'x'", "integer"]),
        ("model=foo", ["model = 'foo'", "keys of its own", "trust_remote_code"]),
        ("seed.x=1", ["seed"]),
        ("lora.rank.x=3", ["lora.rank"]),
        ("recovery.steps", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("training.schedule=[", ["training.schedule=[", "not YAML"]),
    ],
)
def test_a_mistake_is_answered_with_the_way_out(override: str, answers: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, [override])
    message = str(caught.value)
    assert all(answer in message for answer in answers), message
    assert "\n" not in message


def test_a_method_that_is_bound_to_kinds_has_them_as_the_default() -> None:
    """In prune and compare alike; kinds that a recipe names are the user's, and stay when the method changes."""
    default = load_recipe().budget.kinds
    bound = load_recipe(None, ["method=shortgpt"])
    assert bound.budget.kinds == ("layer",)
    assert load_recipe(None, [], yaml.safe_load(dump(bound))).budget.kinds == ("layer",)
    assert revise(load_recipe(), {"method": "shortgpt"}).budget.kinds == ("layer",)
    assert revise(revise(bound, {"budget.ratio": 0.3}), {"method": "wanda"}).budget.kinds == default
    assert load_recipe(None, ["method=shortgpt", "budget.kinds=[ffn]"]).budget.kinds == ("ffn",)
    named = load_recipe(None, ["budget.kinds=[ffn]"])
    assert revise(named, {"method": "wanda"}).budget.kinds == ("ffn",)
    rows = schedule_of(bound, ["shortgpt", "wanda"], [0.2], {})
    assert [row.budget.kinds for row in rows] == [("layer",), default]
    assert [row.budget.kinds for row in schedule_of(named, ["shortgpt", "wanda"], [0.2], {})] == [("layer",), ("ffn",)]


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, ["budget.ratio=2", "lora.rnk=3"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words\n", "budget: [\n"])
def test_a_file_that_is_no_recipe_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read the recipe .*missing\.yaml: No such file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="Cannot read the recipe"):
        load_recipe(tmp_path)


def test_recipes_are_frozen_and_hold_only_what_yaml_can_say() -> None:
    recipe = load_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1
    assert yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe.model_dump(mode="json")


def test_a_key_that_stands_twice_is_refused_instead_of_the_last_one_taken(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("budget: {ratio: 0.1}\nseed: 1\nbudget: {ratio: 0.9}\n")
    with pytest.raises(InputError, match="duplicate key budget"):
        load_recipe(path)
    path.write_text("budget: &b {ratio: 0.1}\n")
    assert load_recipe(path).budget.ratio == 0.1


WRONG = (
    *("null", "[]", "{}", "[[1]]", "{a: 1}", "{1: 2}", "true", "-1", "1e400", ".nan", "{ffn: .inf}", "9" * 30, "'x'"),
    *("2024-01-01", "!!binary aGVsbG8=", "!!set {a, b}", "[a, 1, null, {b: c}]", '"\\uD800"', "&a {b: *a}", "[.nan]"),
)
METHOD_KEYS = [(name, f"method.{key.name}") for name, method in METHODS.items() for key in describe(method.Settings)]
SECTION_KEYS = [("lorashear", name) for name in (*SECTIONS, "method.name", "method.settings")]


@pytest.mark.parametrize(
    ("method", "key"), [("lorashear", key.name) for key in describe()] + METHOD_KEYS + SECTION_KEYS, ids=str
)
def test_a_value_of_any_type_is_taken_or_refused_by_its_key(method: str, key: str) -> None:
    for value in WRONG:
        said, recipe = "", None
        try:
            recipe = load_recipe(None, [f"method={method}", f"{key}={value}"])
        except InputError as error:
            said = str(error)
        if recipe is None:
            assert key.partition(".")[0] in said
            assert len(said) < 2000
        else:
            assert not {"nan", "inf"} & set(re.findall(r"\w+", str(recipe.model_dump())))


LAUGH = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("seed: " + "[" * 20_000 + "]" * 20_000, id="deep"),
        pytest.param("{a: " * 500 + "1" + "}" * 500, id="deep mapping"),
        pytest.param("seed: " + "9" * 10_000, id="digits"),
        pytest.param("seed: 0x" + "F" * 10_000, id="hexadecimal digits"),
        pytest.param(LAUGH + "budget: {ratio: *i}\n", id="anchors"),
        pytest.param(LAUGH.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace(": [*", ": {<<: [*"), id="merged"),
        pytest.param("budget: &a [*a]", id="itself"),
        pytest.param("seed: &a {<<: *a}", id="merged with itself"),
        *(f"seed: {value}" for value in ("2024-13-45", "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x")),
        "? [a]\n: b",
        "1: 2",
        "method: [wanda]",
        "seed: 1\n---\nseed: 2",
        "\0",
    ],
)
def test_yaml_that_grows_or_means_nothing_is_one_short_message(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for overrides in ([], ["method.name=wanda"], ["method.periods=3"]):
        with pytest.raises(InputError) as caught:
            load_recipe(path, overrides)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["/dev/zero", ".", "pipe", "x" * 300, "~nobody-here/a.yaml", "\0"])
def test_what_is_no_file_is_no_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="recipe"):
        load_recipe(Path(name))


def test_a_recipe_in_python_is_one_or_the_path_of_one_or_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 7")
    recipe = load_recipe(path)
    assert recipe_of(recipe) is recipe
    assert recipe_of(path) == recipe_of(str(path)) == recipe_of({"seed": 7}) == recipe
    assert recipe_of(None) == load_recipe()
    for given in (5, [path], recipe.seed):
        with pytest.raises(InputError, match="is no recipe"):
            recipe_of(given)
    with pytest.raises(InputError, match="Unknown key sed"):
        recipe_of({"sed": 7})
