"""The recipe: every setting of a run in one frozen object, read from YAML, with errors that name the next step.

Only the composition is defined here. Each section is the ``Settings`` class of the room that it configures, and the
docstrings there are the documentation (``describe``, ``dump``, docs/recipes.md).
"""

from __future__ import annotations

import difflib
import hashlib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializationInfo,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)

from secateur.analysis import Analysis
from secateur.compensation import EVERY
from secateur.data import Purpose, TextSettings
from secateur.effort import Effort
from secateur.errors import InputError
from secateur.evaluation import EvaluationSettings
from secateur.export import ExportSettings
from secateur.loading import ModelSettings
from secateur.methods import METHODS, Method, method_class
from secateur.planning import Budget
from secateur.reading import DEEPEST, brief, check_characters, path_of, read_text, shortened
from secateur.recovery import RecoverySettings
from secateur.surgery import MASKABLE
from secateur.training import LoraSettings, TrainingSettings
from secateur.types import Settings
from secateur.walk import CalibrationSettings

SettingsT = TypeVar("SettingsT", bound=BaseModel)

DEFAULT_METHOD = "fisher"


class MethodChoice(Settings):
    """A method by name with its own settings; in YAML ``wanda`` or ``{name: lorashear, ...}``."""

    name: str = DEFAULT_METHOD
    """Which method chooses the units; ``secateur methods`` lists them."""
    settings: SerializeAsAny[Settings]
    """The method's own settings; in YAML they are written beside the name."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or isinstance(value.get("settings"), Settings):
            return value
        own = {key: item for key, item in value.items() if key != "name"}
        name = value.get("name", DEFAULT_METHOD)
        return {"name": name, "settings": validate(method_class(name).Settings, own, "method")}

    @property
    def built(self) -> Method:
        """The method with these settings."""
        return method_class(self.name)(self.settings)

    @model_serializer
    def _to_yaml(self, info: SerializationInfo) -> dict[str, Any]:
        return {"name": self.name, **self.settings.model_dump(mode="json", exclude_unset=bool(info.exclude_unset))}


class Recipe(Settings):
    """All settings that determine the result of a run. The same recipe on the same machine gives the same plan."""

    model: ModelSettings = ModelSettings()
    """The model to prune and how it is loaded."""
    budget: Budget = Budget()
    """How much to prune, and from which groups."""
    calibration: CalibrationSettings = CalibrationSettings()
    """The text for measuring importance, and how it is run through the model."""
    method: MethodChoice = Field(default_factory=lambda: MethodChoice.model_validate(DEFAULT_METHOD))
    """How the units to remove are chosen."""
    lora: LoraSettings = LoraSettings()
    """The adapters for pruning and recovery."""
    training: TrainingSettings = TrainingSettings()
    """How the adapters are trained, during pruning and during recovery."""
    recovery: RecoverySettings = RecoverySettings()
    """Recovery of the lost knowledge after the cut."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured before and after."""
    export: ExportSettings = ExportSettings()
    """How the result is written and checked."""
    effort: Effort = Effort()
    """How much the run may spend, in time or in tokens, instead of steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything random."""

    @model_validator(mode="after")
    def _baseline_is_one_shot(self) -> Recipe:
        """A baseline is measured on the dense model of the run. It must not change its weights."""
        name = self.evaluation.baseline
        if name is None:
            return self
        one_shot = [key for key, method in METHODS.items() if _leaves_the_model(method)]
        if name not in one_shot and not (":" in name and _leaves_the_model(method_class(name))):
            raise ValueError(
                f"evaluation.baseline is {name!r}; it must be a one-shot method that changes no weights "
                f"({', '.join(one_shot)}; or a class of your own as package.module:Class) or null"
            )
        validate(method_class(name).Settings, {}, "evaluation.baseline")
        return self

    @model_validator(mode="after")
    def _kinds_of_the_method(self) -> Recipe:
        """Set the kinds that the method requires, unless the budget names some. ``revise`` finds them unset again."""
        kinds = method_class(self.method.name).kinds
        if kinds and "kinds" not in self.budget.model_fields_set:
            budget = self.budget.model_copy(update={"kinds": kinds})
            budget.model_fields_set.discard("kinds")
            self.__dict__["budget"] = budget
        return self

    @model_validator(mode="after")
    def _hidden_states_stay(self) -> Recipe:
        """Hidden states are compared layer by layer and channel by channel."""
        lost = [kind for kind in ("hidden", "layer") if kind in self.budget.kinds]
        if self.recovery.hidden_weight > 0 and lost:
            raise ValueError(
                f"recovery.hidden_weight is {self.recovery.hidden_weight:g} and budget.kinds has {', '.join(lost)}; "
                "hidden states can only be compared when no layer and no hidden width is removed, so set "
                "recovery.hidden_weight=0"
            )
        return self

    @model_validator(mode="after")
    def _repair_of_the_method(self) -> Recipe:
        """Decide whether to repair, unless the recipe does. ``revise`` finds it unset again."""
        if self.recovery.repair is None:
            method = self.method.built
            alone = method.needs != "training" and not method.changes_weights and not method.compensates
            repair = alone and set(self.budget.kinds) <= set(MASKABLE)
            recovery = self.recovery.model_copy(update={"repair": repair})
            recovery.model_fields_set.discard("repair")
            self.__dict__["recovery"] = recovery
        return self

    @model_validator(mode="after")
    def _rounds_of_the_method(self) -> Recipe:
        """A round ends with a cut: the method must not train, and the groups must stay what they are."""
        rounds, recovery = self.budget.rounds, self.recovery
        if rounds == 1:
            return self
        lost = [kind for kind in self.budget.kinds if kind not in MASKABLE]
        if lost:
            raise ValueError(
                f"budget.rounds is {rounds} and budget.kinds has {', '.join(lost)}; only {', '.join(MASKABLE)} can be "
                "cut in several rounds, so set budget.rounds=1, or prune the result again in a second run"
            )
        if not _leaves_the_model(method_class(self.method.name)):
            able = ", ".join(name for name, method in METHODS.items() if _leaves_the_model(method))
            raise ValueError(
                f"budget.rounds is {rounds} and {self.method.name} trains while it prunes, which has its own periods; "
                f"set budget.rounds=1, or choose a method that does not train ({able})"
            )
        last = recovery.of_round(rounds, rounds)
        if last.links > max(1, last.steps) or (last.instructions and last.steps == 1):
            raise ValueError(
                f"recovery.between={recovery.between:g} leaves {last.steps} steps of recovery after the last of "
                f"{rounds} rounds, fewer than recovery.links or recovery.instructions need; set a smaller "
                "recovery.between, or more recovery.steps"
            )
        return self

    @property
    def baseline(self) -> str | None:
        """The one-shot method to compare with; None when the run is one-shot itself."""
        return self.evaluation.baseline if method_class(self.method.name).needs == "training" else None

    @property
    def names_steps(self) -> bool:
        """Whether it says how long the run trains: a limit, the steps of recovery, or those of the method."""
        own = self.method.settings.model_fields_set
        named = "steps" in self.recovery.model_fields_set or any(key.endswith("steps") for key in own)
        return named or self.effort.given

    @property
    def texts(self) -> dict[Purpose, TextSettings]:
        """The text settings of a run, by purpose. Those of repair need the model's widths too, unless the recipe has
        ``recovery.repair_tokens`` (``stages.texts_of``)."""
        method = method_class(self.method.name)
        used: dict[Purpose, TextSettings] = {"evaluation": self.evaluation}
        baseline = method_class(self.baseline) if self.baseline else method
        if (method.needs, baseline.needs) != ("nothing", "nothing"):
            used["calibration"] = self.calibration
        recovery = self.recovery
        compensations: dict[Purpose, tuple[bool | None, int]] = {
            "repair": (recovery.repair, recovery.repair_tokens or 0),
            "reconstruct": (recovery.reconstruct, recovery.reconstruct_tokens),
        }
        for purpose, (on, tokens) in compensations.items():
            if on:
                enough = max(tokens, EVERY * self.calibration.window)
                used[purpose] = self.calibration.model_copy(update={"tokens": enough})
        if method.needs == "training" or self.recovery.steps > 0:
            used["recovery"] = self.recovery
        if self.recovery.steps > 0:
            more: dict[Purpose, TextSettings | None] = {
                "instructions": self.recovery.instruction_text,
                "validation": self.recovery.validation_text,
            }
            used |= {purpose: text for purpose, text in more.items() if text is not None}
        return used


@dataclass(frozen=True)
class Key:
    """One key of the recipe, for the documentation."""

    name: str
    """Dotted, such as ``budget.ratio``."""
    type: str
    default: str
    """As YAML; empty when there is none."""
    meaning: str


def load_recipe(
    path: Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe. Missing keys get their defaults.

    ``flags`` maps dotted keys to values (command-line options). ``overrides`` are ``section.key=value`` texts with YAML
    values, and override everything else. Raises InputError for a file that cannot be read, an unknown key or a value
    that is not allowed, and names the allowed ones.
    """
    tree = _read(path) if path is not None else {}
    for key, value in (flags or {}).items():
        _put(tree, key, value)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"--set {brief(text)} is not of the form section.key=value, such as --set recovery.steps=0."
            )
        _put(tree, key.strip(), parse_value(value, f"--set {brief(text)}"))
    return validate(Recipe, tree)


def revise(recipe: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """The same recipe with the dotted keys in ``flags`` set to other values; raises InputError as ``load_recipe``."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in flags.items():
        _put(tree, key, value)
    return validate(Recipe, tree)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every key, and its meaning in a comment above it. ``load_recipe`` reads it back."""
    return "\n".join(["# A secateur recipe with every key: secateur prune --recipe FILE", *_lines(recipe, 0)]) + "\n"


def identity(recipe: Recipe) -> str:
    """The part of the recipe that determines what is computed. Timing and writing may change on resume.

    It contains a digest of the analysis in ``budget.protect_from``, because that file may change. Raises PlanError when
    it cannot be read.
    """
    evaluation = recipe.evaluation.model_copy(update={"speed": True})
    text = dump(recipe.model_copy(update={"evaluation": evaluation, "export": ExportSettings()}))
    file = recipe.budget.protect_from
    if file is None:
        return text
    digest = hashlib.sha256(Analysis.load(file).model_dump_json().encode()).hexdigest()[:16]
    return f"{text}# {file} holds {digest}\n"


def describe(settings: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Key]:
    """Every key below ``settings``, in order, with type, default and meaning; without the methods' own keys."""
    for name, field in settings.model_fields.items():
        nested = _model_in(field.annotation)
        if nested is not None and nested is not Settings:
            yield from describe(nested, f"{prefix}{name}.")
        elif nested is None:
            default = "" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            yield Key(prefix + name, _type_text(field.annotation), default, _one_line(field.description))


def validate(settings: type[SettingsT], tree: Mapping[str, Any], prefix: str = "") -> SettingsT:
    """Build ``settings`` from nested mappings; every fault becomes one line of an InputError."""
    try:
        return settings.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_explain(error, settings, prefix))) from error


def _leaves_the_model(method: type[Method]) -> bool:
    """Whether the method does not change the model."""
    return method.needs != "training" and not method.changes_weights


RecipeLike: TypeAlias = "Recipe | str | PathLike[str] | Mapping[str, Any] | None"
"""A recipe as callers in Python may give it (``recipe_of``)."""


def recipe_of(given: RecipeLike) -> Recipe:
    """The recipe from a ``Recipe``, the path of its file, a mapping of its keys, or None for the defaults.

    Raises InputError for anything else, and for a recipe that is not allowed.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str | PathLike):
        return load_recipe(path_of(given, "The recipe"))
    if given is None or isinstance(given, Mapping):
        return load_recipe(flags={str(key): value for key, value in (given or {}).items()})
    raise InputError(
        f"A {type(given).__name__} is no recipe. Give a Recipe (secateur.config.load_recipe), the path of a YAML file, "
        "or a mapping of sections to keys."
    )


# Reading: files and --set


def _read(path: Path) -> dict[str, Any]:
    file = path_of(path, "The recipe")
    if not file.is_file():
        reason = "it is no ordinary file" if file.exists() else "No such file"
        raise InputError(f"Cannot read the recipe {path}: {reason}. Give a YAML file.")
    tree = parse_value(read_text(file, advice="Give a YAML file as the recipe."), f"The recipe {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        sections = ", ".join(Recipe.model_fields)
        raise InputError(f"The recipe {path} must be a mapping of sections to keys; the sections are {sections}.")
    return {section: value for section, value in tree.items() if value is not None}


_MOST_VALUES = 100_000
"""Values in a recipe, with anchors followed. The largest real ones have some hundreds."""

_MOST_DIGITS = 1000


class _Loader(yaml.SafeLoader):
    """Refuses two things that YAML accepts: duplicate keys, of which YAML would take the last without a word, and
    content that grows without limit, by nesting or by anchors."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
            raise yaml.composer.ComposerError(None, None, "it contains a number of too many digits", node.start_mark)
        if node is not None and id(node) not in self._values:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            pairs = [one for item in inner for one in (item if isinstance(item, tuple) else (item,))]
            count = 1 + sum(self._values.get(id(one), _MOST_VALUES) for one in pairs)  # not yet there: it holds itself
            if count > _MOST_VALUES:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"with all anchors followed, it contains more than {_MOST_VALUES:,} values",
                    node.start_mark,
                )
            self._values[id(node)] = count
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_value(text: str, where: str) -> Any:
    """Parse a YAML value. ``where`` names its place in the InputError for invalid YAML."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        # beside its own errors: dates that do not exist, words tagged as numbers, numbers of too many digits
        reason = shortened(" ".join(str(error).split()), 300)
        raise InputError(f"{where} is not YAML that can be read: {reason}") from error
    check_characters(value, text, where)
    return value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts. Naming another method drops the previous method's keys."""
    if isinstance(tree.get("method"), str):
        tree["method"] = {"name": tree["method"]}
    if key == "method" and isinstance(value, str):
        key = "method.name"
    chosen = tree.setdefault("method", {}) if key == "method.name" else None
    if isinstance(chosen, dict) and chosen.get("name", DEFAULT_METHOD) != value:
        chosen.clear()
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise InputError(f"{key} cannot be set: {part} is {brief(tree)}, which has no keys below it.")
    tree[last] = value


# Faults, in the user's words


def _explain(error: ValidationError, settings: type[BaseModel], prefix: str) -> list[str]:
    """One line per fault, with the given and the allowed value. A value that several types refuse is named once."""
    faults: dict[str, list[str]] = {}
    for fault in error.errors():
        keys, parent, unknown = _walk(settings, fault["loc"])
        key = ".".join([prefix, *keys] if prefix else keys)
        if unknown:
            faults[_unknown(key, parent)] = []
            continue
        reason = shortened(str(fault["msg"]).removeprefix("Value error, ").rstrip("."), 400)
        if fault["type"] == "model_type":
            reason = f"It has keys of its own: {', '.join(_keys_of(key, parent))}"
        # a rule between keys fails for the whole section; printing that would say little
        given = key if isinstance(fault["input"], Mapping) else f"{key} = {brief(fault['input'])} is not allowed"
        faults.setdefault(given, []).append(reason[:1].lower() + reason[1:])
    return [f"{given}: {', or '.join(dict.fromkeys(why))}." if why else given for given, why in faults.items()]


def _walk(settings: type[BaseModel], path: Sequence[int | str]) -> tuple[list[str], type[BaseModel], bool]:
    """Follow a fault's path to the innermost settings: the keys on the way (pydantic adds names of types after them),
    those settings, and whether the last key is one that they do not have."""
    keys: list[str] = []
    here = settings
    for part in path:
        keys.append(str(part))
        field = here.model_fields.get(str(part))
        if field is None:
            return keys, here, True
        below = _model_in(field.annotation)
        if below is None:
            break
        here = below
    return keys, here, False


def _unknown(key: str, parent: type[BaseModel]) -> str:
    """The line for a key that does not exist: the nearest known key, and all keys allowed there."""
    section, _, last = key.rpartition(".")
    allowed = _keys_of(section, parent)
    # the right key in the wrong section, such as --set ratio=0.3, is nearer than a similar word
    elsewhere = [item.name for item in describe() if item.name.rpartition(".")[2] == last]
    key, last = shortened(key), shortened(last)
    near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, allowed, 1)]
    guess = " or ".join(elsewhere[:2] or near)
    where = f"Keys of {section}" if section else "The sections"
    return f"Unknown key {key}{f' (did you mean {guess}?)' if guess else ''}. {where}: {', '.join(allowed)}."


def _keys_of(section: str, settings: type[BaseModel]) -> list[str]:
    """The keys that a user may write in a section; a method's own keys are written beside its name."""
    keys = [name for name in settings.model_fields if name != "settings"]
    return ["name", *keys] if section == "method" and "name" not in keys else keys


# Writing: YAML with a line of meaning above each key


def _lines(settings: Settings, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(settings, MethodChoice) and isinstance(value, Settings):
            yield from _lines(value, depth)
            continue
        yield from textwrap.wrap(
            _one_line(field.description), 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(value, Settings):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
        else:
            plain = settings.model_dump(mode="json", include={name})[name]
            yield f"{indent}{name}: {_yaml(plain)}"


def _yaml(value: Any) -> str:
    """A value on one line, as YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`")


# Types


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as ``RecoverySettings`` or ``RecoverySettings | None``."""
    for item in (annotation, *typing.get_args(annotation)):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Path: "path",
    Any: "value",
}


def _type_text(annotation: Any) -> str:
    """An annotation in a reader's words: ``number``, ``list of text``, ``global or layer``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(str(item) for item in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(item) for item in arguments)
    if origin in (list, tuple, set, frozenset, Sequence):
        return f"list of {_type_text(arguments[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))
