"""Runs a comparison row by row. Each row is written when it is finished, therefore a comparison can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import stages
from secateur.compare.contents import same_file
from secateur.compare.folder import check_folder, check_rows, identity_of, open_folder, read_rows, write_row
from secateur.compare.report import write_report
from secateur.compare.rows import Leaderboard, Row
from secateur.config import Recipe, RecipeLike, parse_value, recipe_of, revise
from secateur.data import Texts, check_blocks, check_sources, load_whole, read_texts
from secateur.digest import digest
from secateur.errors import InputError, SecateurError, out_of_memory
from secateur.evaluation import machine
from secateur.evaluation.memory import PeakMemory
from secateur.evaluation.tasks import chance_levels, check_tasks, evaluate_tasks
from secateur.export import check_finite
from secateur.inputs import refuse_inputs
from secateur.keeping import take
from secateur.loading import load
from secateur.lock import alone
from secateur.methods import METHODS, method_class, method_source
from secateur.planning import decoder_ratio, versions
from secateur.progress import say
from secateur.reading import brief, read_json
from secateur.surgery import checked_trace
from secateur.types import DependencyGraph, Kind
from secateur.whole import place_of, write_whole
from secateur.workspace import Workspace

FLOOR = "random"
"""The method that is always included. A method that does not beat it under the same recovery is worth nothing."""
_OF_ROWS: dict[str, Any] = {"method": True, "budget": {"ratio"}, "recovery": {"patience"}, "evaluation": {"baseline"}}
"""Keys that differ between rows. Methods with their settings, and ratios, are in the rows."""


class Dense(BaseModel):
    """Facts of the dense model before the first row, as kept in ``dense.json``."""

    weights: str
    """``_identity_of`` the model."""
    measured: stages.Metrics
    chance: dict[str, Any] = Field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """Inputs that all rows share."""

    graphs: Mapping[tuple[Kind, ...], DependencyGraph]
    """``budget.kinds`` → the graph for rows with these kinds."""
    texts: Texts
    dense: Dense
    tasks: Sequence[str]


@alone("output")
def compare(
    recipe: RecipeLike,
    methods: Sequence[str],
    ratios: Sequence[float],
    output: Path,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    tasks: Sequence[str] = (),
    resume: bool = False,
) -> Leaderboard:
    """What ``secateur compare`` does: prune the recipe's model by each method at each ratio, recover, and measure.

    Every row starts from the same weights, may cut the same groups, counts its ratio of all parameters, reads the same
    calibration and recovery text, and trains for the same number of steps: the recipe's ``recovery.steps`` and as many
    as the longest of the progressive methods prunes for. A method with fewer pruning steps gets more recovery steps,
    and no recovery stops early. A method that cuts another kind of group (whole layers) has this kind in its row.
    ``random`` is always included.

    Args:
        recipe: the settings in its ``method`` apply to that method, if it is compared; ``budget.ratio``,
            ``recovery.patience`` and ``evaluation.baseline`` are not used. Files in ``evaluation.text`` that nothing is
            trained on are measured whole (their first ``evaluation.tokens`` tokens), sources by their held-out part.
        output: folder for ``results.json``, ``results.csv``, ``quality.png`` and ``report.html``. Finished rows are
            kept in it.
        settings: method → its own settings, where they are neither the recipe's nor the defaults.
        tasks: see ``evaluation.evaluate_tasks``.
        resume: add the rows that are missing in ``output``. Its finished rows are kept in the table, also for methods
            and ratios that are not named again.

    Raises InputError, before anything is measured or written, for unknown methods, ratios and tasks, for settings of a
    method that is not compared, and for a folder with another comparison. A row whose method fails (a ratio that it
    cannot reach, too little memory, a fault in one's own method) contains the message instead of numbers, and
    ``resume`` tries it again. When the budget check fails for every row, the first error is raised before anything is
    written.
    """
    if not methods:
        raise InputError(f"Name at least one method to compare with {FLOOR}. Known methods: {', '.join(METHODS)}.")
    recipe, output = revise(recipe_of(recipe), {"recovery.patience": 0}), place_of(output)
    if recipe.effort.given:
        raise InputError(
            "A comparison gives every method the same steps, and effort chooses them for one run. Set recovery.steps "
            "and calibration.tokens in place of effort."
        )
    if recipe.budget.rounds > 1:
        raise InputError(
            f"budget.rounds is {recipe.budget.rounds}, and a comparison prunes in one round by every method, so that "
            "all train for the same steps. Set budget.rounds=1."
        )
    refuse_inputs(output, recipe, tasks)
    names = [FLOOR, *(name for name in dict.fromkeys(methods) if name != FLOOR)]
    recipes = schedule_of(recipe, names, ratios, settings or {})
    identity = identity_of(recipes, tasks)
    check_folder(output, identity, resume)
    done = _of_this_code(read_rows(output))
    check_rows(output, done, recipes)
    for text in {purpose: text for planned in recipes for purpose, text in planned.texts.items()}.values():
        check_sources(text)
    check_tasks(tasks)
    result, graphs, recipes = _rehearse(recipe, recipes)
    texts = _read_texts(result.model, result.tokenizer, recipes, graphs)
    recipes = [stages.with_text(row, texts) for row in recipes]
    rows_folder = open_folder(output, identity)
    dense = _measure_dense(result, texts, tasks, rows_folder)
    comparison = _leaderboard(recipe, result.recipe, dense)
    shared = Shared(graphs, texts, dense, tasks)
    del result  # with its model: every row opens its own
    for planned in recipes:
        key = planned.method.name, planned.budget.ratio
        if key not in done or done[key].error is not None:
            done[key] = _run(planned, shared)
            write_row(output, done[key])
        comparison.rows = sorted(done.values(), key=_place)
        write_report(comparison, output)
    return comparison


def _of_this_code(rows: dict[tuple[str, float], Row]) -> dict[tuple[str, float], Row]:
    """Without the rows of methods of one's own whose file has changed since."""
    changed = {row.method for row in rows.values() if _has_changed(row)}
    for name in sorted(changed):
        say(f"The file that defines {name} has changed since its rows were made. These rows are left out.")
    return {key: row for key, row in rows.items() if row.method not in changed}


def _has_changed(row: Row) -> bool:
    if row.method not in METHODS and ":" not in row.method:
        return False
    try:
        return row.code != method_source(row.method, row.settings)
    except InputError:  # its module is not here; the row is kept, as rows of other methods that are not named again
        return False


def _place(row: Row) -> tuple[float, bool, int, str]:
    """Sort key of a row: ratio, then the floor, then the order of ``METHODS``, then other methods."""
    order = list(METHODS)
    return row.ratio, row.method != FLOOR, order.index(row.method) if row.method in METHODS else len(order), row.method


def schedule_of(
    recipe: Recipe, methods: Sequence[str], ratios: Sequence[float], settings: Mapping[str, Mapping[str, Any]]
) -> list[Recipe]:
    """The recipe of every row, in order. The sum of pruning and recovery steps is the same in all."""
    for name in [*methods, *settings]:
        method_class(name)  # InputError when there is none
    idle = [name for name in settings if name not in methods]
    if idle:
        raise InputError(f"{idle[0]} has settings and is not compared. Add it to --methods, or remove its settings.")
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        raise InputError(f"Ratios must be strictly between 0 and 1, such as 0.2,0.5; got {wrong or 'none'}.")
    chosen = {name: _with_method(recipe, name, settings.get(name, {})) for name in methods}
    longest = max(pruning_steps(planned) for planned in chosen.values())
    return [
        revise(row, {"budget.ratio": ratio, **_recovery_of(recipe, longest - pruning_steps(row))})
        for ratio in dict.fromkeys(ratios)
        for row in chosen.values()
    ]


def _recovery_of(recipe: Recipe, more: int) -> dict[str, Any]:
    """Changed keys of a row that recovers for ``more`` steps. Instructions get the same steps in all rows."""
    steps, share = recipe.recovery.steps, recipe.recovery.instruction_share
    if not recipe.recovery.instructions or more == 0:
        return {"recovery.steps": steps + more}
    if steps < 2:
        raise InputError(
            f"recovery.steps is {steps}, and recovery.instructions needs at least 2 in every row. Set recovery.steps "
            "to at least 2, or leave recovery.instructions empty."
        )
    return {
        "recovery.steps": steps + more,
        "recovery.instruction_share": max(1, int(steps * share + 1e-9)) / (steps + more),
    }


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Split ``--set`` texts into those for all rows and, by method, those that begin with its name
    (``lorashear.periods=4``).

    A class of one's own is named in full: ``package.module:Class.key=value``.
    """
    shared: list[str] = []
    own: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        module, colon, rest = key.strip().rpartition(":")
        method, _, name = rest.partition(".")
        method = module + colon + method
        if name and (method in METHODS or ":" in method):
            own.setdefault(method, {})[name] = parse_value(value, f"--set {brief(text)}")
        else:
            shared.append(text)
    return shared, own


def _with_method(recipe: Recipe, name: str, settings: Mapping[str, Any]) -> Recipe:
    given = recipe.method.settings.model_dump(mode="json") if recipe.method.name == name else {}
    own: dict[str, Any] = {"method": {"name": name, **given}, "evaluation.baseline": None}
    own |= {f"method.{key}": value for key, value in settings.items()}
    if method_class(name).kinds:
        own["budget.kinds"] = list(method_class(name).kinds)
    return revise(recipe, own)


def pruning_steps(recipe: Recipe) -> int:
    """Optimiser steps that the recipe's method trains for while it prunes. Raises InputError when they are not
    known."""
    name, method = recipe.method.name, recipe.method.built
    if method.training_steps == 0 and method.needs == "training":
        raise InputError(
            f"{name} trains, and does not define training_steps (optimiser steps before the cut). It would get more "
            "training than the others. Add that property, as in LoRAPrune."
        )
    return method.training_steps


def _rehearse(
    recipe: Recipe, recipes: Sequence[Recipe]
) -> tuple[stages.Result, dict[tuple[Kind, ...], DependencyGraph], list[Recipe]]:
    """The dense model with the first recipe whose budget can be met, its graphs, and the recipes as this model allows
    them. Raises when none can be met."""
    model, tokenizer = load(**recipe.model.model_dump())
    check_finite(model)
    graphs = {kinds: checked_trace(model, kinds) for kinds in dict.fromkeys(row.budget.kinds for row in recipes)}
    recipes = [stages.with_possible_repair(row, model, graphs[row.budget.kinds]) for row in recipes]
    failures: list[Exception] = []
    found: stages.Result | None = None
    for row in recipes:
        graph = graphs[row.budget.kinds]
        try:
            plan = stages.rehearse(model, graph, row)
        except Exception as error:  # the row will contain the message
            failures.append(error)
        else:
            found = found or stages.Result(model, tokenizer, plan, graph, row)
    if found is None:
        raise failures[0]
    groups = len({group.name for graph in graphs.values() for group in graph.prunable})
    say(f"Found {groups} node groups that can be pruned; {len(recipes)} rows to compute.")
    return found, graphs, recipes


def _measure_dense(result: stages.Result, texts: Texts, tasks: Sequence[str], folder: Path) -> Dense:
    """The numbers of the dense model, measured once. Raises InputError when the kept numbers are of another model."""
    kept, weights = folder / "dense.json", _identity_of(result.model)
    dense = take(kept, lambda file: Dense.model_validate(read_json(file)))
    if dense is None:
        chance = chance_levels(tasks) if tasks else {}  # first, because the data of the tasks may be missing
        say("Measuring the dense model")
        stages.measure_dense(result, texts)
        scores = _evaluate_tasks(result, tasks) if tasks else {}
        dense = Dense(weights=weights, measured=result.measured, chance=chance, tasks=scores)
        write_whole(kept, json.dumps(dense.model_dump()))  # pydantic's own would write null for an infinite number
    if dense.weights != weights:
        raise InputError(
            f"The weights or the config of {result.recipe.model.name} have changed since the dense model was measured "
            f"for {folder.parent}. Restore the old ones, or name another folder."
        )
    return dense


def _leaderboard(recipe: Recipe, row: Recipe, dense: Dense) -> Leaderboard:
    """The comparison without rows; ``row`` is the recipe of any of them."""
    measured = dense.measured
    assert measured.dense is not None
    return Leaderboard(
        model=recipe.model.name,
        seed=recipe.seed,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json", exclude=_OF_ROWS), sort_keys=False, allow_unicode=True),
        window=measured.window or 0,
        tokens=measured.tokens or {},
        steps=row.recovery.steps + pruning_steps(row),
        tokens_per_step=recipe.training.batch_size * recipe.recovery.window,
        dense=measured.dense.perplexity or {},
        dense_parameters=measured.dense.parameters,
        dense_tasks=dense.tasks,
        chance=dense.chance,
        machine=machine(),
        versions=versions(),
    )


def _identity_of(model: PreTrainedModel) -> str:
    """A digest of a model's weights (samples of each) and its config, as it was opened."""
    return f"{digest(model)} {hashlib.sha256(model.config.to_json_string().encode()).hexdigest()[:16]}"


def _read_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    recipes: Sequence[Recipe],
    graphs: Mapping[Any, DependencyGraph],
) -> Texts:
    """The text of all rows, read once. Evaluation files that are not used for anything else are read whole."""
    if tokenizer is None:
        raise InputError("The model has no tokenizer, therefore nothing can be measured. Add its files to the folder.")
    wanted: dict[Any, Any] = {}
    for recipe in recipes:
        wanted |= stages.texts_of(recipe, graphs[recipe.budget.kinds])
    evaluation = wanted.pop("evaluation")
    elsewhere = {name for text in wanted.values() for name in text.text}
    trained_on = [name for name in evaluation.text if any(same_file(name, other) for other in elsewhere)]
    whole = load_whole(evaluation, tokenizer, recipes[0].seed, evaluation.tokens, trained_on)
    check_blocks(whole, model, tokenizer)
    found = read_texts(model, tokenizer, wanted, recipes[0].seed, stages.spare_texts(recipes))
    return Texts(**{**vars(found), "evaluation": whole})


def _run(recipe: Recipe, shared: Shared) -> Row:
    """Make one row from the dense model. An error becomes the row's message, and the other rows continue."""
    name, ratio = recipe.method.name, recipe.budget.ratio
    settings = recipe.method.settings.model_dump(mode="json")
    say(f"{name} at {ratio:.0%}")
    row = Row(
        method=name,
        ratio=ratio,
        code=method_source(name, settings),
        settings=settings,
        kinds=list(recipe.budget.kinds),
        pruning_steps=pruning_steps(recipe),
        recovery_steps=recipe.recovery.steps,
    )
    try:
        _measure(row, recipe, shared)
    except Exception as error:  # also a fault of a method, or too little memory for this one
        kind = "not enough memory" if out_of_memory(error) else type(error).__name__
        row.error = str(error) if isinstance(error, SecateurError) else f"{kind}: {error}"
        say(f"  {row.error}")
    return row


def _measure(row: Row, recipe: Recipe, shared: Shared) -> None:
    model, tokenizer = load(**recipe.model.model_dump())
    if _identity_of(model) != shared.dense.weights:
        raise InputError(
            f"The weights or the config of {recipe.model.name} have changed since the dense model was measured, and "
            "this row would be of another model. Restore the old ones and add --resume."
        )
    graph = shared.graphs[recipe.budget.kinds]
    plan = stages.rehearse(model, graph, recipe)
    measured = shared.dense.measured.model_copy(deep=True)
    result = stages.Result(model, tokenizer, plan, graph, recipe, measured=measured, done=["dense"])
    memory = PeakMemory(model.device)
    stages.make(
        result,
        shared.texts,
        Workspace(None),
        around=lambda stage: memory if stage.name == "decide" else nullcontext(),
    )
    row.scoring_seconds = measured.seconds["decide"]
    row.scoring_peak_bytes, row.scoring_extra_bytes = memory.peak, memory.extra
    row.reached, row.decoder = (
        result.plan.ratio_reached,
        decoder_ratio(result.plan, graph),
    )  # includes biases that it adds
    assert measured.pruned is not None
    row.pruned, row.parameters = measured.pruned.perplexity or {}, measured.pruned.parameters
    if measured.recovered is not None:
        row.recovered = measured.recovered.perplexity or {}
    if shared.tasks:
        row.tasks = _evaluate_tasks(result, shared.tasks)
    if measured.speed is not None:
        row.speed = _speed(measured.speed)


def _evaluate_tasks(result: stages.Result, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    with torch.no_grad():
        return evaluate_tasks(result.model, result.tokenizer, tasks, batch_size=result.recipe.evaluation.batch_size)


def _speed(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """From ``compare_speed``: batch → the speed of the small model, and of the dense model beside it."""
    found = {}
    for batch, states in measured.items():
        if batch != "settings":
            small = next(values for state, values in states.items() if state != "dense")
            found[batch] = {**small, **{f"dense_{key}": value for key, value in states["dense"].items()}}
    return found
