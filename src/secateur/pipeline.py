"""The whole run on one page: discover, decide, cut, recover, measure, save, verify."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.config import Recipe, RecipeLike, dump, identity, load_recipe, recipe_of, revise, validate
from secateur.data import read_texts
from secateur.effort import Effort
from secateur.errors import InputError, PlanError
from secateur.export import (
    ARTEFACTS,
    FORMS,
    SUMS,
    Form,
    check_describes_itself,
    check_finite,
    check_output,
    check_sums,
    read_scores,
    written_dtype,
)
from secateur.inputs import refuse_inputs
from secateur.loading import load
from secateur.lock import alone, held
from secateur.methods import METHODS, method_class, method_source
from secateur.planning import restrict
from secateur.progress import say
from secateur.reading import path_of, read_json
from secateur.stages import (
    Result,
    Stage,
    contents,
    cut,
    effort_for,
    is_sized,
    make,
    refuse_what_cannot_work,
    rehearse,
    rehearse_output,
    save,
    sized,
    spare_texts,
    take_up,
    texts_of,
    with_more_time,
    with_possible_repair,
    with_text,
)
from secateur.surgery import checked_trace
from secateur.types import DependencyGraph, PruningPlan, Scores
from secateur.whole import place_of
from secateur.workspace import Workspace


@alone("output")
def run(recipe: Recipe, output: Path, *, resume: bool = False, dry_run: bool = False) -> Result:
    """What ``secateur prune`` does: open the model that the recipe names, and prune it into the folder ``output``."""
    check_output(output)
    refuse_inputs(output, recipe)
    model, tokenizer = load(**recipe.model.model_dump())
    return prune(model, tokenizer, recipe=recipe, output=output, resume=resume, dry_run=dry_run)


@alone("output")
def finished(recipe: Recipe, output: Path, runs: int = 1) -> dict[str, Any] | None:
    """The numbers of a finished run of this recipe in ``output``; None when there is none.

    ``runs``: how many share the time that a run has by default.

    Stages that a killed run left behind are removed. Raises InputError when a file was changed since the run.
    """
    folder = place_of(output)
    written, metrics = folder / ARTEFACTS / "recipe.yaml", folder / ARTEFACTS / "metrics.json"
    if not (written.is_file() and metrics.is_file() and (folder / "config.json").is_file()):
        return None
    try:
        same = is_sized(recipe, load_recipe(written), _limit(metrics), runs)
    except InputError:  # of another version, or edited since
        same = False
    if not same:
        return None
    check_sums(folder, folder / ARTEFACTS / SUMS)
    numbers: dict[str, Any] = read_json(metrics)
    Workspace.tidy(folder, identity(recipe))
    return numbers


@alone("output")
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ratio: float | None = None,
    method: str | None = None,
    recipe: RecipeLike = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Result:
    """Make ``model`` smaller, in place.

    Args:
        model: any causal language model of transformers.
        tokenizer: of that model. Without one there is no text: the method must need none, nothing is evaluated, and
            there is no recovery unless the recipe asks for it.
        ratio: fraction of all parameters to remove, between 0 and 1; default 0.2.
        method: a name from ``secateur methods``; default ``fisher``.
        recipe: every other setting: a ``Recipe``, the path of its file, or a mapping of its keys. ``ratio`` and
            ``method`` override it.
        output: folder to save to. Until the run is finished, its stages are kept beside it.
        resume: continue after the last finished stage of an interrupted run for ``output``, with the same recipe,
            weights and text.
        dry_run: discover, check the budget and the text, and stop. The result's plan is by random scores.

    On a device that is no CPU, a recipe that names neither a limit nor steps is limited to ``effort.ON_A_GPU``.

    Raises SecateurError for every fault that the caller can correct, as early as possible.
    """
    refuse_what_cannot_work(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise InputError(f"A {type(tokenizer).__name__} is no tokenizer. Give what secateur.load returns, or None.")
    recipe = _complete(None if recipe is None else recipe_of(recipe), ratio, method, model, tokenizer)
    result = _prune(model, tokenizer, recipe, output, resume=resume, dry_run=dry_run)
    # an interrupted recovery took longer than its last part
    more = None if dry_run or result.resumed else with_more_time(result)
    if more is not None:
        say(more)
    return result


def _prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    output: str | os.PathLike[str] | None,
    *,
    resume: bool,
    dry_run: bool = False,
    given: Scores | None = None,
    runs: int = 1,
) -> Result:
    """``prune`` by a whole recipe; by the scores ``given``, if any, instead of its method.

    ``runs``: how many share the time that a run has by default.
    """
    check_finite(model, written_dtype(model, recipe.export))
    if tokenizer is not None and "vocab" in recipe.budget.kinds:
        raise InputError(
            "Cutting the vocabulary renumbers the tokens, which a tokenizer cannot follow. Leave vocab out of "
            "budget.kinds, or prune without a tokenizer: secateur.prune(model, None, ...) with a method that needs no "
            "text. The folder's secateur/tokens.json then maps each new id to its old one."
        )
    check_describes_itself(model)
    source = method_source(recipe.method.name, recipe.method.settings.model_dump(mode="json"))
    source += method_source(recipe.baseline, {}) if recipe.baseline else ""
    key, folder = identity(recipe), None
    if output is not None:
        output = check_output(output)
        refuse_inputs(output, recipe)
        folder = Workspace.place(output, key, resume, contents(model, source))
    graph = checked_trace(model, recipe.budget.kinds)
    recipe, effort = _sized(with_possible_repair(recipe, model, graph), model, graph, folder, runs)
    texts = read_texts(model, tokenizer, texts_of(recipe, graph), recipe.seed, spare_texts([recipe]))
    recipe = with_text(recipe, texts)
    plan = rehearse(model, graph, recipe)
    before, after = plan.parameters_before / 1e6, plan.parameters_after / 1e6
    count = len(restrict(graph, recipe.budget).prunable)
    say(f"Found {count} node groups that can be cut; {before:.1f}M parameters will become {after:.1f}M.")
    result = Result(model, tokenizer, plan, graph, recipe, None if output is None else Path(output), given=given)
    if output is not None:
        rehearse_output(result, output)
    if dry_run:
        return result
    work = Workspace.open(output, key, resume, contents(model, source, texts))
    if effort.given:
        work.write_text("sized.yaml", dump(recipe))
    take_up(result, work)
    result.measured.effort = effort if effort.given else None

    @contextmanager
    def announced(stage: Stage) -> Iterator[None]:
        say(stage.title.format(method=recipe.method.name))
        yield

    make(result, texts, work, announced)
    if output is not None:
        work.remove()
    return result


@alone("output")
def prune_ratios(
    recipe: RecipeLike,
    ratios: Sequence[float],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    dry_run: bool = False,
) -> dict[float, dict[str, Any]]:
    """Prune the recipe's model to several ratios, with one run of the method, into folders ``output/ratio-R``.

    The method runs for the largest ratio. The units for the other ratios are chosen by its scores
    (``planning.allocate``). Everything after that is done for each ratio as in ``prune``, on the model opened anew.
    A limit in time or tokens, given or by default, is for all ratios together, and each has an equal part of it.

    Args:
        ratios: fractions of all parameters to remove. The recipe's own ratio is not used.
        resume: continue an interrupted run; finished folders stay as they are.
        dry_run: check everything for every ratio, and stop.

    Returns the numbers of each ratio, as in its ``metrics.json``; nothing for a dry run. Raises InputError for a method
    whose scores do not decide alone, and every error of ``prune``, before anything slow begins.
    """
    recipe, folder = recipe_of(recipe), place_of(output)
    runs = len(set(ratios)) or 1
    limit = recipe.effort.shared(runs)
    each = {"effort.within": limit.within, "effort.tokens": limit.tokens}
    recipes = {ratio: revise(recipe, {**each, "budget.ratio": ratio}) for ratio in sorted(set(ratios), reverse=True)}
    if not recipes:
        raise InputError("There is no ratio to prune to. Name at least one.")
    _require_ranking(recipe)
    places = {ratio: folder / f"ratio-{ratio}" for ratio in recipes}
    done = {ratio: finished(asked, places[ratio], runs) if resume else None for ratio, asked in recipes.items()}
    left = [ratio for ratio in recipes if done[ratio] is None]
    for ratio in left:
        check_output(places[ratio])
        refuse_inputs(places[ratio], recipe)
    _rehearse_ratios([recipes[ratio] for ratio in left])
    largest = max(recipes)
    if dry_run and largest in left:
        model, tokenizer = load(**recipe.model.model_dump())
        prune(model, tokenizer, recipe=recipes[largest], output=places[largest], resume=resume, dry_run=True)
    for ratio in () if dry_run else left:
        say(f"Ratio {ratio:g}: {places[ratio]}")
        given = None if ratio == largest else read_scores(places[largest])
        model, tokenizer = load(**recipe.model.model_dump())
        asked = _complete(recipes[ratio], None, None, model, tokenizer)
        refuse_what_cannot_work(model)
        with held(places[ratio]):
            _prune(model, tokenizer, asked, places[ratio], resume=resume, given=given, runs=runs)
        done[ratio] = read_json(places[ratio] / ARTEFACTS / "metrics.json")
    return {ratio: numbers for ratio, numbers in sorted(done.items()) if numbers is not None}


def _require_ranking(recipe: Recipe) -> None:
    """Raise InputError unless one run of the recipe's method answers several ratios."""
    if recipe.budget.rounds > 1:
        raise InputError(
            f"budget.rounds is {recipe.budget.rounds}: every round scores another model, and one run cannot answer "
            "several ratios. Prune to each ratio alone, or set budget.rounds=1."
        )
    method = recipe.method.built
    if method.ranks:
        return
    reason = "it chooses by more than its last scores"
    if method.changes_weights:
        reason = "it changes weights while it chooses"
    elif method.compensates:
        reason = "its new values of weights belong to one ratio"
    able = ", ".join(name for name, known in METHODS.items() if known().ranks)
    raise InputError(
        f"One run of {method.name} cannot answer several ratios: {reason}. Prune to each ratio alone, or choose "
        f"another method ({able})."
    )


def _rehearse_ratios(recipes: Sequence[Recipe]) -> None:
    """``rehearse`` recipes that differ in their ratio alone."""
    if recipes:
        model, _ = load(**recipes[0].model.model_dump())
        refuse_what_cannot_work(model)
        graph = checked_trace(model, recipes[0].budget.kinds)
        for recipe in recipes:
            rehearse(model, graph, recipe)


def apply_plan(
    plan: PruningPlan | str | os.PathLike[str] | Mapping[str, Any], model: PreTrainedModel
) -> PreTrainedModel:
    """Cut ``model`` by ``plan`` in place and return it. Its config describes the small model afterwards.

    The plan may be the path of a plan.json, or its content.

    A plan contains the units to remove, and no weights: weights that a progressive method or recovery trained are only
    in the folder of that run. Raises PlanError when the plan was made for another model, before anything changes.
    """
    return _apply(read_plan(plan), model, Recipe()).model


@alone("output")
def apply(plan: PruningPlan, recipe: Recipe, output: Path) -> Result:
    """What ``secateur apply`` does: cut the recipe's model by ``plan``, save it, and verify it."""
    check_output(output)
    refuse_inputs(output, recipe)
    model, tokenizer = load(**recipe.model.model_dump())
    result = _apply(plan, model, recipe, tokenizer, output)
    save(result, output)
    return result


def convert(recipe: Recipe, form: Form, output: Path) -> str:
    """What ``secateur export`` does: write the recipe's model in another form. Returns how it was checked.

    ``uniform``: layers of different sizes filled up with zeros, as a plain folder. ``gguf``: a file for llama.cpp.
    ``onnx``: a folder with a graph for ONNX Runtime. ``output`` is a new folder, or a new file for ``gguf``. Raises
    ModelError for a model that the form does not support, and VerificationError when the written one computes something
    else.
    """
    target = FORMS[form].check(output)
    refuse_inputs(target, recipe)
    with held(target):
        model, tokenizer = load(**recipe.model.model_dump())
        return FORMS[form].write(model, tokenizer, target, recipe.export)


def _limit(metrics: Path) -> Effort:
    """The limit by which a finished run chose its amounts. Raises InputError for a damaged file."""
    found = read_json(metrics)
    return validate(Effort, found.get("effort") or {}) if isinstance(found, dict) else Effort()


def _sized(
    recipe: Recipe, model: PreTrainedModel, graph: DependencyGraph, folder: Path | None, runs: int
) -> tuple[Recipe, Effort]:
    """The recipe with amounts for its effort, and that: amounts of an interrupted run in ``folder``, or by this
    machine's speed. ``runs`` share the time by default."""
    kept = None if folder is None else folder / "sized.yaml"
    if kept is not None and kept.is_file():  # by a default of another device than this one's, perhaps
        found, effort = load_recipe(kept), effort_for(recipe, on_cpu=False, runs=runs)
        if is_sized(recipe, found, effort, runs):
            return found, effort
    effort = effort_for(recipe, on_cpu=model.device.type == "cpu", runs=runs)
    if effort.given and not recipe.effort.given:
        say(
            f"On {model.device.type} a run takes about {effort.within} by default. --within and --tokens set another "
            "limit, and --set recovery.steps=N sets the steps."
        )
        recipe = revise(recipe, {"effort.within": effort.within})
    return sized(recipe, model, graph), effort


def _apply(
    plan: PruningPlan,
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: Path | None = None,
) -> Result:
    refuse_what_cannot_work(model)
    check_finite(model, written_dtype(model, recipe.export))
    check_describes_itself(model)
    graph = checked_trace(model)
    plan.check(graph)
    requested = {graph[name].kind for name in plan.kept if graph[name].on_request}
    if requested:  # kinds that are only tried when they are asked for
        graph = checked_trace(model, requested)
        plan.check(graph)
    result = Result(model, tokenizer, plan, graph, recipe, output)
    if output is not None:
        rehearse_output(result, output)
    cut(result)
    return result


def read_plan(given: Any) -> PruningPlan:
    """A ``PruningPlan`` from one, from the path of its file, or from its content; PlanError for anything else."""
    if isinstance(given, PruningPlan):
        return given
    if isinstance(given, str | os.PathLike):
        return PruningPlan.load(path_of(given, "The plan", PlanError))
    if isinstance(given, Mapping):
        try:
            return PruningPlan.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the top level"
            raise PlanError(f"This is not a pruning plan: {where}: {first['msg']}.") from error
    raise PlanError(f"A {type(given).__name__} is no plan. Give a PruningPlan, the path of a plan.json, or its dict.")


def _complete(
    recipe: Recipe | None,
    ratio: float | None,
    method: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Recipe:
    """The recipe with the arguments that override it. Raises InputError when it needs text and there is none."""
    # the model given, not the one that a recipe names
    flags: dict[str, Any] = {"budget.ratio": ratio, "method": method, "model.name": model.config._name_or_path or ""}
    if recipe is None and tokenizer is None:
        flags["recovery.steps"] = 0
    if tokenizer is None and (recipe is None or "repair" not in recipe.recovery.model_fields_set):
        flags["recovery.repair"] = False
    recipe = revise(recipe or Recipe(), {key: value for key, value in flags.items() if value is not None})
    if tokenizer is None:
        needs = method_class(recipe.method.name).needs
        if needs != "nothing" or recipe.recovery.steps > 0 or recipe.recovery.repair or recipe.recovery.reconstruct:
            what = f"the method {recipe.method.name} reads text" if needs != "nothing" else "recovery reads text"
            raise InputError(
                f"There is no tokenizer, and {what}. Give the tokenizer, or choose a method that needs no text "
                "(magnitude, random) and recovery.steps=0."
            )
    return recipe
