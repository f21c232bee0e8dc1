"""The whole run on one page: discover, decide, cut, grow back, measure, save, verify. Each stage is callable alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.config import Recipe, dump, identity, revise
from secateur.data import Texts, TokenBlocks, check_sources, check_window, load_whole, read_texts
from secateur.errors import InputError, ModelError
from secateur.evaluation import TextLoss, as_written, compare_speed, losses_by_source, machine, parameter_count
from secateur.evaluation.tasks import evaluate_tasks
from secateur.export import (
    Architecture,
    Story,
    Verification,
    adopt_config,
    check_describable,
    check_describes_itself,
    check_output,
    licence_of,
    needs_trust,
    verify_saved,
    write_analysis,
    write_artefacts,
    written_dtype,
)
from secateur.export import save as save_folder
from secateur.importance import CRITERIA, Criterion
from secateur.importance.analysis import Analysis, Trial
from secateur.importance.knowledge import cuts, measure_cuts
from secateur.loading import load
from secateur.methods import METHODS, PruningTask
from secateur.planning import allocate, describe, make_plan, restrict, versions
from secateur.precision import autocast, autocast_dtype
from secateur.progress import say
from secateur.recovery import RecoveryTask, check_repairable, recover, repair, source_losses
from secateur.surgery import add_biases, masked, slice_model, trace
from secateur.types import DependencyGraph, PruningPlan, Scores, removed_to_kept
from secateur.workspace import Workspace


@dataclass
class Result:
    """What a run ends with; ``secateur.save`` writes it to a folder."""

    model: PreTrainedModel
    """The smaller model: the one that was given, changed in place."""
    tokenizer: PreTrainedTokenizerBase | None
    plan: PruningPlan
    graph: DependencyGraph
    """Of the model before the cut."""
    recipe: Recipe
    dense: Architecture | None = None
    """Class and config from before the cut; the model itself has those of the small one now."""
    scores: Scores | None = None
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the method adds to the biases of linears when the units are cut."""
    teacher: PreTrainedModel | None = None
    """The dense model while recovery still needs it (``recovery.teacher``)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """JSON-able numbers: ``dense``, ``baseline``, ``pruned``, ``recovered``, ``speed``, ``seconds`` …"""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened when, as in ``run.jsonl``."""


def run(recipe: Recipe, output: Path, *, resume: bool = False, dry_run: bool = False) -> Result:
    """What ``secateur prune`` does: open the model that the recipe names, and prune it into the folder ``output``."""
    check_output(output)
    model, tokenizer = load(**recipe.model.model_dump())
    return prune(model, tokenizer, recipe=recipe, output=output, resume=resume, dry_run=dry_run)


def evaluate(recipe: Recipe, tasks: Sequence[str] = (), *, max_tokens: int | None = None) -> dict[str, Any]:
    """What ``secateur evaluate`` does: scores on ``tasks`` (names or folders, see ``evaluation.tasks``), perplexity by
    source, parameters, bytes and speed of the recipe's model, under ``model``; window, tokens and machine beside it.

    Files are measured whole, or their first ``max_tokens`` tokens; sources by their evaluation split (``load_whole``).
    """
    check_sources(recipe.evaluation)
    model, tokenizer = load(**recipe.model.model_dump())
    check_window(recipe.evaluation, model, "evaluation")
    blocks = load_whole(recipe.evaluation, tokenizer, recipe.seed, max_tokens)
    numbers: dict[str, Any] = {}
    if tasks:  # after the text, whose lack would lose hours of tasks; before what a misspelt task should not cost
        numbers["tasks"] = evaluate_tasks(model, tokenizer, tasks, batch_size=recipe.evaluation.batch_size)
    losses = _losses(model, recipe, blocks)
    numbers |= _size(model, recipe)
    numbers["perplexity"] = {source: loss.perplexity for source, loss in losses.items()}
    if recipe.evaluation.speed:
        small = as_written(model, written_dtype(model, recipe.export), model.device)
        numbers |= compare_speed({"model": small}, batch_sizes=(1,))["batch 1"]["model"]
    return {
        "model": numbers,
        "window": blocks.window,
        "tokens": {source: loss.tokens for source, loss in losses.items()},
        "machine": machine(),
    }


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    ratios: Sequence[float] = (0.25, 0.5),
    criterion: str = "taylor",
    recipe: Recipe | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> Analysis:
    """What ``secateur analyze`` does: cut every node group alone, at each ratio, and measure how far predictions move.

    LoRAShear's knowledge distribution analysis (Algorithm 3). The model is given back bit by bit as it was.

    Args:
        ratios: fractions of a group's units to take away, each strictly between 0 and 1.
        criterion: what chooses them within the group; a name from ``importance.CRITERIA``.
        recipe: its sections ``calibration`` (the text), ``evaluation`` (batch size and precision) and ``seed`` are
            used, and ``budget.protect_by`` and ``protect_share`` for what the picture marks.
        output: new folder for ``analysis.json`` (which ``budget.protect_from`` takes), ``analysis.csv`` and
            ``heatmap.png``. Until it is finished, what was measured is kept beside it.
        resume: go on with what an interrupted call measured for ``output``.
    """
    recipe = revise(recipe or Recipe(), {"model.name": model.config._name_or_path or ""})
    chooser = _one_shot_criterion(criterion)
    _refuse_what_cannot_work(model)
    settings = recipe.calibration
    started_as = f"{dump(recipe)}# criterion: {criterion}\n# ratios: {list(ratios)}\n"
    if output is not None:
        output = check_output(output)
        Workspace.place(output, started_as, resume)
    graph = trace(model)
    blocks = read_texts(model, tokenizer, {"calibration": settings}, recipe.seed).calibration
    work = Workspace.open(output, started_as, resume)
    dtype = autocast_dtype(recipe.evaluation.precision, model.device)
    with autocast(recipe.evaluation.precision, model.device):
        chosen = cuts(graph, chooser.score(model, graph, blocks, recipe.seed), ratios)
    done = [Trial.model_validate(trial) for trial in work.read_json("trials.json")] if work.has("trials.json") else []
    dense_loss, trials = measure_cuts(
        model,
        graph,
        blocks,
        chosen,
        batch_size=recipe.evaluation.batch_size,
        autocast=dtype,
        done=done,
        keep=lambda trials: work.write_json("trials.json", [trial.model_dump() for trial in trials]),
    )
    assert blocks is not None
    analysis = Analysis(
        base_model=recipe.model.name,
        revision=recipe.model.revision,
        fingerprint=graph.fingerprint,
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


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ratio: float | None = None,
    method: str | None = None,
    recipe: Recipe | None = None,
    output: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Result:
    """Make ``model`` smaller, in place.

    Args:
        model: any causal language model of transformers.
        tokenizer: of that model. Without one there is no text: the method must need none, and nothing is evaluated
            or, unless the recipe insists, recovered.
        ratio: fraction of all parameters to remove, between 0 and 1; default 0.2.
        method: a name from ``secateur methods``; default ``lorashear``.
        recipe: every other setting. ``ratio`` and ``method`` win over what it says.
        output: folder to save to; until it is finished, the stages are kept beside it.
        resume: go on after the last finished stage of an interrupted run for ``output``.
        dry_run: discover, check the budget and the text, and stop. The result's plan is by random scores.

    Raises SecateurError for anything that is the caller's to mend, as early as it can be known.
    """
    recipe = _complete(recipe, ratio, method, model, tokenizer)
    _refuse_what_cannot_work(model)
    if tokenizer is not None and "vocab" in recipe.budget.kinds:
        raise InputError(
            "Cutting the vocabulary numbers the tokens anew, which a tokenizer cannot follow. Leave vocab out of "
            "budget.kinds, or prune without a tokenizer: secateur.prune(model, None, ...) with a method that needs no "
            "text; the folder's secateur/tokens.json then says which token each new id was."
        )
    check_describes_itself(model)
    if output is not None:
        output = check_output(output)
        Workspace.place(output, identity(recipe), resume)
    graph = trace(model, recipe.budget.kinds)
    texts = read_texts(model, tokenizer, recipe.texts, recipe.seed)
    result = Result(model, tokenizer, rehearse(model, graph, recipe), graph, recipe)
    if dry_run:
        return result
    work = Workspace.open(output, identity(recipe), resume)
    result.metrics, result.events = work.metrics(), work.events

    with work.stage("dense", "Measuring the dense model", result.metrics):
        measure(result, texts, "dense")
        look_ahead(result, texts)
    if texts.evaluation is not None and recipe.baseline is not None:
        with work.stage("baseline", "Pruning without LoRA, for comparison", result.metrics):
            measure_baseline(result, texts)
    with work.stage("decide", f"Choosing what goes: {recipe.method.name}", result.metrics):
        decide(result, texts, work)
    with work.stage("pruned", "Cutting it out", result.metrics):
        if recipe.recovery.repair:
            mend(result, texts)
        cut(result)
        if output is not None:
            _refuse_unsavable(result)
        measure(result, texts, "pruned")
    if recipe.recovery.steps > 0:
        with work.stage("recovered", "Growing the lost knowledge back", result.metrics):
            grow_back(result, texts, work)
            measure(result, texts, "recovered")
    if texts.evaluation is not None and recipe.evaluation.speed:
        with work.stage("speed", "Timing dense and pruned", result.metrics):
            time_both(result)
    if output is not None:
        with work.stage("save", "Saving, and opening the folder in a fresh process", result.metrics):
            save(result, output)
        work.remove()
    return result


def apply_plan(plan: PruningPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Cut ``model`` as ``plan`` says, in place, and return it; its config describes the small model afterwards.

    A plan says what goes, not what was learned: weights that a progressive method or recovery trained are in the folder
    that they were saved to. Raises PlanError when the plan was made for another model, before anything changes.
    """
    return _apply(plan, model, Recipe()).model


def apply(plan: PruningPlan, recipe: Recipe, output: Path) -> Result:
    """What ``secateur apply`` does: cut the model that the recipe names as ``plan`` says, and save it, verified."""
    check_output(output)
    model, tokenizer = load(**recipe.model.model_dump())
    result = _apply(plan, model, recipe, tokenizer)
    _refuse_unsavable(result)
    save(result, output)
    return result


def _apply(
    plan: PruningPlan, model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None
) -> Result:
    _refuse_what_cannot_work(model)
    check_describes_itself(model)
    graph = trace(model)
    plan.check(graph)
    result = Result(model, tokenizer, plan, graph, recipe)
    cut(result)
    return result


def rehearse(model: PreTrainedModel, graph: DependencyGraph, recipe: Recipe) -> PruningPlan:
    """A plan by random scores: about the sizes that a run ends with, and every fault of the budget, in a moment."""
    scores = CRITERIA["random"].score(model, restrict(graph, recipe.budget), None, recipe.seed)
    plan = _plan(graph, recipe, allocate(graph, scores, recipe.budget))
    if recipe.recovery.repair:
        check_repairable(model, graph, plan.kept)
    if any(graph[name].on_request for name in plan.kept):
        check_describable(model, graph, plan.kept)
    before, after = plan.parameters_before / 1e6, plan.parameters_after / 1e6
    say(f"Found {len(graph.prunable)} node groups that can be cut; {before:.1f}M parameters will become {after:.1f}M.")
    return plan


def decide(result: Result, texts: Texts, work: Workspace) -> None:
    """Let the method choose the units that go, and write the plan. Methods that train change weights, never shapes."""
    recipe = result.recipe
    method = METHODS[recipe.method.name](recipe.method.settings)
    if work.has("plan.json"):
        result.plan = PruningPlan.model_validate(work.read_json("plan.json"))
        result.plan.check(result.graph)
        result.scores = Scores(work.read_tensors("scores.safetensors")) if work.has("scores.safetensors") else None
        result.biases = work.read_tensors("biases.safetensors") if work.has("biases.safetensors") else {}
        if method.needs == "training":
            work.read_weights("decided.safetensors", result.model)
        return
    decision = method.run(_task(result, texts, work))
    result.plan = _plan(result.graph, recipe, decision.removed)
    result.scores, result.biases = decision.scores, decision.biases
    result.metrics["method"] = decision.metrics
    if result.scores is not None:
        work.write_tensors("scores.safetensors", dict(result.scores.values))
    if result.biases:
        work.write_tensors("biases.safetensors", result.biases)
    if method.needs == "training":
        work.write_weights("decided.safetensors", result.model)
    work.write_json("plan.json", result.plan.model_dump())  # last: it marks the stage as finished
    say(describe(result.plan, result.graph))


def cut(result: Result) -> None:
    """Apply the plan: from here on the shapes, and the model's own config, are the small ones."""
    result.dense = Architecture(type(result.model), result.model.config)
    slice_model(result.model, result.graph, result.plan.kept)
    add_biases(result.model, result.biases)
    try:
        adopt_config(result.model, result.graph, result.plan.kept)
    except ModelError as error:  # it computes all the same; only a folder needs a config
        result.metrics["cannot_be_saved"] = str(error)


def mend(result: Result, texts: Texts) -> None:
    """Refit what consumes the units that stay, before the others are cut out."""
    recipe = result.recipe
    if result.biases:
        raise InputError(
            f"Both {recipe.method.name} and repair make up for what goes, and together they would do it twice. "
            "Set recovery.repair=false, or switch it off in the method."
        )
    dtype = autocast_dtype(recipe.evaluation.precision, result.model.device)
    refits = repair(
        result.model,
        result.graph,
        result.plan.kept,
        texts.calibration,
        ridge=recipe.recovery.repair_ridge,
        batch_size=recipe.evaluation.batch_size,
        autocast=dtype,
    )
    result.metrics["repair"] = {name: {"before": refit.before, "after": refit.after} for name, refit in refits.items()}


def grow_back(result: Result, texts: Texts, work: Workspace) -> None:
    """Recover by LoRA fine-tuning, merged at the end. The teacher, if there is one, is let go."""
    recipe = result.recipe
    assert texts.recovery is not None
    if work.has("recovered.safetensors"):
        work.read_weights("recovered.safetensors", result.model)
        return
    task = RecoveryTask(
        text=texts.recovery,
        instructions=texts.instructions,
        validation=texts.validation,
        reference=result.metrics.get("reference", {}),
        teacher=result.teacher,
        checkpoints=work.path("recovery"),
    )
    done = recover(result.model, task, recipe.recovery, lora=recipe.lora, training=recipe.training, seed=recipe.seed)
    result.metrics["recovery"] = {"log": done.log, "rounds": done.rounds}
    result.teacher = None
    work.write_weights("recovered.safetensors", result.model)


def measure(result: Result, texts: Texts, state: str) -> None:
    """Perplexity by source, parameters and bytes of the model as it is now, under ``metrics[state]``."""
    if state in result.metrics:
        return
    numbers: dict[str, Any] = _size(result.model, result.recipe)
    if texts.evaluation is not None:
        losses = _losses(result.model, result.recipe, texts.evaluation)
        numbers["perplexity"] = {source: loss.perplexity for source, loss in losses.items()}
        result.metrics["window"] = texts.evaluation.window
        result.metrics["tokens"] = {source: loss.tokens for source, loss in losses.items()}
    result.metrics[state] = numbers


def look_ahead(result: Result, texts: Texts) -> None:
    """What recovery needs of the dense model: its loss on the text that is watched, and itself as the teacher."""
    settings = result.recipe.recovery
    if texts.validation is not None and "reference" not in result.metrics:
        result.metrics["reference"] = source_losses(result.model, texts.validation, result.recipe.training)
    if settings.teacher > 0 and settings.steps > 0:
        result.teacher = copy.deepcopy(result.model)


def measure_baseline(result: Result, texts: Texts) -> None:
    """What one shot without any training would have cost at the same ratio: masks on the dense model, then off."""
    name = result.recipe.baseline
    if "baseline" in result.metrics:
        return
    assert name is not None
    assert texts.evaluation is not None
    decision = METHODS[name]().run(_task(result, texts, Workspace(None)))
    with masked(result.model, result.graph, removed_to_kept(result.graph, decision.removed)):
        losses = _losses(result.model, result.recipe, texts.evaluation)
    perplexity = {source: loss.perplexity for source, loss in losses.items()}
    result.metrics["baseline"] = {"name": f"{name} without LoRA", "perplexity": perplexity}


def time_both(result: Result) -> None:
    """Prefill and decode speed of a dense twin (same config, random weights) and of the result, in turns.

    Both are timed in the type that is written, as copies, so that the model in memory stays as it is.
    """
    if "speed" in result.metrics:
        return
    dtype, device = written_dtype(result.model, result.recipe.export), result.model.device
    dense = result.dense or Architecture(type(result.model), result.model.config)
    twin = as_written(dense.build(), dtype, device)
    small = as_written(copy.deepcopy(result.model), dtype, device)
    result.metrics["speed"] = compare_speed({"dense": twin, _last(result): small})
    for state, speed in result.metrics["speed"]["batch 1"].items():
        result.metrics[state] |= speed


def verify(recipe: Recipe) -> Verification:
    """What ``secateur verify`` does: open the recipe's folder again in a fresh process, without secateur.

    Raises VerificationError unless that process computes and generates what this one does, and InputError for a name
    that is no folder, or for one with code of its own that the recipe does not trust.
    """
    folder = Path(recipe.model.name).expanduser()
    if not folder.is_dir():
        raise InputError(f"{recipe.model.name} is not a folder. Give one that a model was saved to.")
    model, _ = load(**recipe.model.model_dump())
    if needs_trust(folder) and not recipe.model.trust_remote_code:
        raise InputError(
            f"{folder} brings modelling code, which the fresh process would run. Add --trust-remote-code if you trust "
            "it."
        )
    return verify_saved(model, folder)


def save(result: Result, folder: str | Path) -> None:
    """Write the model and everything that explains it to ``folder``, proved in a fresh process.

    The folder appears whole or not at all. Raises VerificationError when it does not compute what the model in memory
    does, and InputError when it exists and is not empty.
    """
    save_folder(
        result.model,
        result.tokenizer,
        folder,
        graph=result.graph,
        kept=result.plan.kept,
        settings=result.recipe.export,
        complete=partial(_complete_folder, result),
    )


def _complete_folder(result: Result, folder: Path, verification: Verification) -> None:
    """Everything beside the model."""
    result.metrics["machine"] = machine()
    story = Story(
        plan=result.plan,
        graph=result.graph,
        verification=verification,
        recipe=dump(result.recipe),
        metrics=result.metrics,
        licence=licence_of(result.plan.base_model),
    )
    write_artefacts(folder, story, result.scores, result.events)


def _one_shot_criterion(name: str) -> Criterion:
    """The criterion ``name``, which must not need adapters: there are none."""
    known = [key for key, criterion in CRITERIA.items() if criterion.needs != "adapters"]
    if name not in known:
        raise InputError(f"Unknown criterion {name!r} for an analysis. Known: {', '.join(known)}.")
    return CRITERIA[name]


def _last(result: Result) -> str:
    return "recovered" if "recovered" in result.metrics else "pruned"


def _size(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    count = parameter_count(model)
    return {"parameters": count, "bytes": count * written_dtype(model, recipe.export).itemsize}


def _losses(model: PreTrainedModel, recipe: Recipe, blocks: TokenBlocks) -> dict[str, TextLoss]:
    settings = recipe.evaluation
    dtype = autocast_dtype(settings.precision, model.device)
    return losses_by_source(model, blocks, batch_size=settings.batch_size, autocast=dtype)


def _plan(graph: DependencyGraph, recipe: Recipe, removed: dict[str, list[int]]) -> PruningPlan:
    return make_plan(
        graph,
        removed,
        recipe.budget,
        method=recipe.method.name,
        seed=recipe.seed,
        base_model=recipe.model.name,
        revision=recipe.model.revision,
    )


def _complete(
    recipe: Recipe | None,
    ratio: float | None,
    method: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Recipe:
    """The recipe with the arguments that win over it, refused when it needs text and there can be none."""
    # the model that is here, not the one that a recipe would open
    flags: dict[str, Any] = {"budget.ratio": ratio, "method": method, "model.name": model.config._name_or_path or ""}
    if recipe is None and tokenizer is None:
        flags["recovery.steps"] = 0
    recipe = revise(recipe or Recipe(), {key: value for key, value in flags.items() if value is not None})
    if tokenizer is None:
        needs = METHODS[recipe.method.name].needs
        if needs != "nothing" or recipe.recovery.steps > 0 or recipe.recovery.repair:
            what = f"the method {recipe.method.name} reads text" if needs != "nothing" else "recovery reads text"
            raise InputError(
                f"There is no tokenizer, and {what}. Give the tokenizer, or choose a method that needs no text "
                "(magnitude, random) and recovery.steps=0."
            )
    return recipe


def _task(result: Result, texts: Texts, work: Workspace) -> PruningTask:
    recipe = result.recipe
    return PruningTask(
        model=result.model,
        tokenizer=result.tokenizer,
        graph=result.graph,
        budget=recipe.budget,
        calibration=texts.calibration,
        training_blocks=texts.recovery,
        lora=recipe.lora,
        training=recipe.training,
        seed=recipe.seed,
        work=work.path("method"),
        log=work.log,
    )


def _refuse_unsavable(result: Result) -> None:
    if "cannot_be_saved" in result.metrics:
        raise ModelError(result.metrics["cannot_be_saved"])


def _refuse_what_cannot_work(model: PreTrainedModel) -> None:
    if isinstance(model, PeftModel):
        raise InputError("This model carries adapters. Merge them first: model = model.merge_and_unload().")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Pruning runs in one process so far. Start it without torchrun or accelerate launch.")
    if model.device.type == "cuda" and model.device.index:
        raise InputError(
            f"Training happens on the first visible GPU, and the model is on {model.device}. "
            f"Set CUDA_VISIBLE_DEVICES={model.device.index} and use --device cuda."
        )
