"""Evaluates, analyses and verifies a model without changing it, and plans cuts of it from stored scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.analysis import Analysis, Trial
from secateur.config import RecipeLike, dump, load_recipe, recipe_of, revise, validate
from secateur.data import check_blocks, check_sources, check_window, load_whole, read_texts
from secateur.digest import digest
from secateur.errors import InputError, PlanError
from secateur.evaluation import Windows, as_written, compare_speed, machine
from secateur.evaluation.tasks import check_tasks, evaluate_tasks
from secateur.export import (
    ARTEFACTS,
    SUMS,
    Verification,
    check_finite,
    check_output,
    check_sums,
    holds_only_our_code,
    needs_trust,
    read_scores,
    verify_saved,
    write_analysis,
    written_dtype,
)
from secateur.importance import CRITERIA, Criterion, criterion_class
from secateur.importance.knowledge import cuts, measure_cuts
from secateur.inputs import refuse_inputs
from secateur.loading import is_adapter_folder, load, outline
from secateur.lock import alone
from secateur.planning import allocate, describe_plan, versions
from secateur.plugins import source_digest
from secateur.progress import say
from secateur.reading import path_of
from secateur.stages import contents, losses, plan_for, refuse_what_cannot_work, size
from secateur.surgery import checked_trace
from secateur.types import PruningPlan
from secateur.whole import place_of, write_whole
from secateur.workspace import Workspace


def evaluate(recipe: RecipeLike, tasks: Sequence[str] = (), *, max_tokens: int | None = None) -> dict[str, Any]:
    """What ``secateur evaluate`` does: scores on ``tasks`` (see ``evaluation.tasks``), perplexity by source,
    parameters, bytes and speed of the recipe's model, under ``model``; beside it window, windows (``Windows``),
    tokens and machine.

    Files are measured whole, or up to their first ``max_tokens`` tokens. Sources are measured on their evaluation split
    (``load_whole``).
    """
    recipe = recipe_of(recipe)
    check_sources(recipe.evaluation)
    check_tasks(tasks)
    model, tokenizer = load(**recipe.model.model_dump())
    check_finite(model)
    check_window(recipe.evaluation, model, "evaluation")
    blocks = load_whole(recipe.evaluation, tokenizer, recipe.seed, max_tokens)
    assert tokenizer is not None  # there would be no blocks
    check_blocks(blocks, model, tokenizer)
    numbers: dict[str, Any] = {}
    if tasks:  # after the text: a missing text would lose hours of tasks; but before the slow measurements
        numbers["tasks"] = evaluate_tasks(model, tokenizer, tasks, batch_size=recipe.evaluation.batch_size)
    measured = losses(model, recipe, blocks)
    numbers |= size(model, recipe)
    numbers["perplexity"] = {source: loss.perplexity for source, loss in measured.items()}
    if recipe.evaluation.speed:
        small = as_written(model, written_dtype(model, recipe.export), model.device)
        numbers |= compare_speed({"model": small}, batch_sizes=(1,))["batch 1"]["model"]
    return {
        "model": numbers,
        "window": blocks.window,
        "windows": asdict(Windows.of(blocks, tokenizer)),
        "tokens": {source: loss.tokens for source, loss in measured.items()},
        "machine": machine(),
    }


@alone("output")
def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    ratios: Sequence[float] = (0.25, 0.5),
    criterion: str = "taylor",
    recipe: RecipeLike = None,
    output: Path | None = None,
    resume: bool = False,
) -> Analysis:
    """What ``secateur analyze`` does: cut every node group alone, at each ratio, and measure the change of the
    predictions.

    LoRAShear's knowledge distribution analysis (Algorithm 3). The model is restored bit by bit.

    Args:
        ratios: fractions of a group's units to remove, each strictly between 0 and 1. Order and repeats are ignored.
        criterion: chooses the units within the group; a name from ``importance.CRITERIA``, or ``package.module:Class``.
        recipe: its sections ``calibration`` (the text, batch size and precision) and ``seed`` are used,
            ``budget.kinds`` for which groups, and ``budget.protect_by`` and ``protect_share`` for what the
            picture marks.
        output: new folder for ``analysis.json`` (which ``budget.protect_from`` takes), ``analysis.csv`` and
            ``heatmap.png``. Until it is finished, what was measured is kept beside it.
        resume: continue an interrupted call for ``output`` with the same settings, weights and text. If a call with the
            same settings and weights is finished, its analysis is returned.
    """
    recipe = revise(recipe_of(recipe), {"model.name": model.config._name_or_path or ""})
    chooser = _one_shot_criterion(criterion)
    source = source_digest([type(chooser)])
    refuse_what_cannot_work(model)
    check_finite(model)
    settings = recipe.calibration
    ratios = sorted(set(ratios))
    started_as = f"{dump(recipe)}# criterion: {criterion}\n# ratios: {ratios}\n"
    if output is not None:
        refuse_inputs(output, recipe)
        if resume and (found := _finished(output, started_as, model)) is not None:
            say(f"This analysis is finished; its folder is {output}. Nothing is done again.")
            Workspace.tidy(output, started_as)
            return found
        output = check_output(output)
        Workspace.place(output, started_as, resume, contents(model, source))
    graph = checked_trace(model).opened(recipe.budget.kinds)
    texts = read_texts(model, tokenizer, {"calibration": settings}, recipe.seed)
    blocks = texts.calibration
    work = Workspace.open(output, started_as, resume, contents(model, source, texts))
    calibration = settings.of(blocks)
    with work.tidied():
        chosen = cuts(graph, chooser.score(model, graph, calibration, recipe.seed), ratios)
        dense_loss, trials = measure_cuts(
            model,
            graph,
            calibration,
            chosen,
            done=work.read_json("trials.json", list[Trial]) or (),
            keep=lambda trials: work.write_json("trials.json", [trial.model_dump() for trial in trials]),
        )
    assert blocks is not None
    analysis = Analysis(
        base_model=recipe.model.name,
        revision=recipe.model.revision,
        fingerprint=graph.fingerprint,
        weights=digest(model),
        recipe=started_as,
        criterion=criterion,
        text=settings.text,
        tokens=blocks.ids.numel(),
        window=blocks.window,
        seed=recipe.seed,
        dense_loss=dense_loss,
        trials=trials,
        versions=versions(),
    )
    if output is not None:
        write_analysis(analysis, output, by=recipe.budget.protect_by, share=recipe.budget.protect_share)
        work.remove()
    return analysis


def _finished(output: Path, started_as: str, model: PreTrainedModel) -> Analysis | None:
    """The finished analysis with the same settings in ``output``, or None. Raises InputError for other weights, and for
    files that were changed since."""
    file = place_of(output) / "analysis.json"
    found = Analysis.load(file) if file.is_file() else None
    if found is None or found.recipe != started_as:
        return None
    check_sums(file.parent, file.parent / SUMS)
    if found.weights != digest(model):
        raise InputError(
            f"The analysis in {output} is finished, and the model's weights are not those that it analysed. Name "
            "another folder for an analysis of these, or delete that one."
        )
    return found


def _one_shot_criterion(name: str) -> Criterion:
    """The criterion ``name``. Raises InputError for one that needs adapters, or has options without a default."""
    criterion = criterion_class(name)
    if criterion.needs == "adapters":
        known = [key for key, one in CRITERIA.items() if one.needs != "adapters"]
        raise InputError(f"The criterion {name!r} reads adapters, and an analysis has none. Known: {', '.join(known)}.")
    return validate(criterion, {}, "criterion")


def verify(recipe: RecipeLike) -> Verification:
    """What ``secateur verify`` does: open the recipe's folder again in a fresh process, without secateur.

    Raises VerificationError unless that process computes and generates the same as this one. Raises InputError for a
    name that is no folder, for a folder with an adapter, and for a folder with foreign code that the recipe does not
    trust.
    """
    recipe = recipe_of(recipe)
    folder = path_of(recipe.model.name, "The folder")
    if not folder.is_dir():
        raise InputError(f"{recipe.model.name} is not a folder. Give one that a model was saved to.")
    if is_adapter_folder(folder):
        raise InputError(
            f"{folder} holds an adapter, not a model that opens alone. Merge it first (secateur.load opens it merged, "
            "save_pretrained writes it), and verify that folder."
        )
    model, _ = load(**recipe.model.model_dump())
    trusted = recipe.model.trust_remote_code
    if needs_trust(folder) and not (trusted or holds_only_our_code(folder)):
        raise InputError(
            f"{folder} contains modelling code, which the fresh process would run. Add --trust-remote-code if you "
            "trust it."
        )
    return verify_saved(model, folder, trusted)


@alone("output")
def plans(
    run: str | os.PathLike[str],
    ratios: Sequence[float],
    output: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> dict[float, PruningPlan]:
    """What ``secateur plan`` does: plans for other ratios from the scores of a finished run, without its weights.

    Each is written to the folder ``output`` as ``ratio-R.json``, and returned by its ratio.

    Args:
        run: folder of a run whose method scored units.
        overrides: changes of the run's recipe as texts ``section.key=value``, such as another place of the model.
        trust_remote_code: whether code of the model's folder may run. The recipe in ``run`` does not decide this.

    Raises InputError when the folder lacks a file of a run, or one is damaged. Raises PlanError when the scores do not
    give the run's own plan: then its method chose by more than them. Raises PlanError for a ratio that the scores do
    not answer, as a whole: nothing is written.
    """
    folder = path_of(run, "The run")
    scores = read_scores(folder)
    own = PruningPlan.load(folder / ARTEFACTS / "plan.json")
    recipe = load_recipe(folder / ARTEFACTS / "recipe.yaml", overrides)
    recipe = revise(recipe, {"model.trust_remote_code": trust_remote_code})
    place = check_output(output)
    refuse_inputs(place, recipe)
    network = outline(**recipe.model.model_dump(exclude={"device", "dtype"}))
    graph = checked_trace(network, recipe.budget.kinds)
    own.check(graph)

    def plan_at(ratio: float) -> PruningPlan:
        asked = revise(recipe, {"budget.ratio": ratio})
        return plan_for(graph, asked, allocate(graph, scores, asked.budget))

    if plan_at(own.ratio_asked).kept != own.kept:
        raise PlanError(
            f"The scores in {folder} do not give the plan beside them: {own.method} chose by more than its last "
            "scores, or the plan or the recipe was changed. Run `secateur prune` for other ratios."
        )
    made = {ratio: plan_at(ratio) for ratio in ratios}
    place.mkdir(parents=True, exist_ok=True)
    for ratio, plan in made.items():
        write_whole(place / f"ratio-{ratio}.json", plan.to_text())
        say(describe_plan(plan, graph))
    return made
