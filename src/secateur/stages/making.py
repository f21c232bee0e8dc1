"""What each stage does, callable alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.compensation import compensate, reconstruct
from secateur.config import Recipe, dump
from secateur.data import Texts, TokenBlocks
from secateur.errors import InputError, ModelError
from secateur.evaluation import (
    TextLoss,
    Windows,
    as_written,
    compare_speed,
    losses_by_source,
    machine,
    parameter_count,
)
from secateur.export import (
    Architecture,
    Story,
    Verification,
    adopt_config,
    licence_of,
    save_folder,
    write_artefacts,
    written_bytes,
    written_dtype,
)
from secateur.lock import alone
from secateur.methods import Decision, Method, PruningTask, method_class
from secateur.planning import SmallRatioError, allocate, countable, describe_plan
from secateur.precision import autocast_dtype
from secateur.progress import say
from secateur.reading import brief, is_json
from secateur.recovery import RecoveryTask, keep_predictions, recover, source_losses
from secateur.stages.result import Baseline, Measured, Result, State, plan_for
from secateur.surgery import apply_updates, check_updates, masked, slice_model, updated
from secateur.types import Cut, PruningPlan, Scores, Settings
from secateur.workspace import Workspace


def measure(result: Result, texts: Texts, state: State) -> None:
    """Perplexity by source, parameters and bytes of the model as it is now."""
    numbers, perplexity = size(result.model, result.recipe), None
    if texts.evaluation is not None:
        found = losses(result.model, result.recipe, texts.evaluation)
        perplexity = {source: loss.perplexity for source, loss in found.items()}
        result.measured.window = texts.evaluation.window
        result.measured.windows = asdict(Windows.of(texts.evaluation, result.tokenizer))
        result.measured.tokens = {source: loss.tokens for source, loss in found.items()}
    setattr(result.measured, state, Measured(**numbers, perplexity=perplexity))


def measure_dense(result: Result, texts: Texts) -> None:
    """The dense model's numbers, with its loss on the text that recovery watches."""
    measure(result, texts, "dense")
    if texts.validation is not None:
        result.measured.reference = source_losses(result.model, texts.validation, result.recipe.training)


def keep_teacher(result: Result, texts: Texts, work: Workspace) -> None:
    """Keep a copy of the dense model for recovery, or its predictions on disk (``recovery.teacher_cache``)."""
    recipe = result.recipe
    if recipe.recovery.teacher_cache == 0:
        result.teacher = copy.deepcopy(result.model)
        return
    assert texts.recovery is not None
    result.teacher = keep_predictions(
        result.model,
        RecoveryTask(text=texts.recovery, instructions=texts.instructions),
        recipe.recovery,
        training=recipe.training,
        seed=recipe.seed,
        folder=work.path("teacher"),
    )


def measure_baseline(result: Result, texts: Texts) -> None:
    """Measure a one-shot method without training at the same ratio. The model is masked, and then restored."""
    name = result.recipe.baseline
    assert name is not None
    assert texts.evaluation is not None
    decision = _run(method_class(name)(), _task(result, texts, Workspace(None)))
    kept = Cut.removing(result.graph, decision.removed)
    with updated(result.model, decision.updates), masked(result.model, result.graph, kept):
        found = losses(result.model, result.recipe, texts.evaluation)
    perplexity = {source: loss.perplexity for source, loss in found.items()}
    result.measured.baseline = Baseline(name=f"{name} without LoRA", perplexity=perplexity)


class _Kept(Settings):
    """Which tensors are kept of a decision beside its plan."""

    scores: bool
    updates: bool
    weights: bool


def decide(result: Result, texts: Texts, work: Workspace) -> None:
    """Let the method, or the scores given, choose the units to remove. Keeps the plan, changed weights, and new values
    of parameters."""
    recipe = result.recipe
    method = recipe.method.built
    if result.given is None:
        decision = _decision(method, _task(result, texts, work), recipe.budget.rounds)
    else:
        decision = Decision(allocate(result.graph, result.given, recipe.budget), result.given)
    result.plan = plan_for(result.graph, recipe, result.here.removed(decision.removed))
    # scores of a round are of the units that were left
    result.scores = decision.scores if recipe.budget.rounds == 1 else None
    result.updates = decision.updates
    result.measured.method = decision.metrics
    if result.scores is not None:
        work.write_scores("scores.safetensors", result.scores)
    if result.updates:
        work.write_tensors("updates.safetensors", result.updates)
    if method.changes_weights:
        work.write_weights("decided.safetensors", result.model)
    kept = _Kept(scores=result.scores is not None, updates=bool(result.updates), weights=method.changes_weights)
    work.write_json("decided.json", kept.model_dump())
    work.write_json("plan.json", result.plan.model_dump())
    say(describe_plan(result.plan, result.graph))


def take_decision(result: Result, work: Workspace) -> bool:
    """Take over everything that ``decide`` kept; False when a part is missing or damaged."""
    plan, kept = work.read_json("plan.json", PruningPlan), work.read_json("decided.json", _Kept)
    if plan is None or kept is None:
        return False
    scores = work.read_scores("scores.safetensors") if kept.scores else None
    updates = work.read_tensors("updates.safetensors") if kept.updates else {}
    if (scores is not None) != kept.scores or updates is None:
        return False
    if kept.weights and not work.read_weights("decided.safetensors", result.model):
        return False
    plan.check(result.graph)
    result.plan, result.scores, result.updates = plan, scores, updates
    return True


def _decision(method: Method, task: PruningTask, rounds: int) -> Decision:
    """The method's decision; of several rounds, one may have nothing to remove."""
    if rounds == 1:
        return _run(method, task)
    with suppress(SmallRatioError):
        return _run(method, task) if task.budget.ratio > 0 else Decision({})
    return Decision({})


def _run(method: Method, task: PruningTask) -> Decision:
    """Run the method.

    Raises ModelError when its answer is no whole ``Decision``, or has updates that it did not declare or that do not
    fit, and PlanError for units that the model does not have.
    """
    decision = method.run(task)
    _check_form(method, decision)
    if decision.updates and not method.compensates:
        raise ModelError(
            f"{method.name} returns new values for parameters. Declare them in its class (compensates = True)."
        )
    check_updates(task.model, task.graph, Cut.removing(task.graph, decision.removed), decision.updates)
    return decision


def _check_form(method: Method, decision: Any) -> None:
    """Raise ModelError for an answer that cannot be kept as a ``Decision``: a class of one's own may return
    anything."""
    wrong = None
    if not isinstance(decision, Decision):
        wrong = f"{brief(decision)}, and not with a Decision"
    elif not isinstance(decision.removed, Mapping):
        wrong = f"removed = {brief(decision.removed)}, which is no mapping of groups to units"
    elif not isinstance(decision.scores, Scores | None):
        wrong = f"scores = {brief(decision.scores)}, which are neither Scores nor None"
    elif not is_json(decision.metrics):
        wrong = f"metrics = {brief(decision.metrics)}, which JSON does not support (text as keys; no tensors or sets)"
    if wrong is not None:
        raise ModelError(f"The method {method.name} answers with {wrong}. Correct its run.")


def repair_weights(result: Result, texts: Texts, work: Workspace) -> None:
    """Refit the weights that consume the kept units. ``cut`` writes their new values. Keeps these."""
    recipe = result.recipe
    found = compensate(
        result.model,
        result.here.graph,
        result.here.here(result.plan.kept),
        recipe.calibration.of(texts.repair),
        recipe.recovery.repair_target,
        start=result.updates,
    )
    _keep_updates("repaired.safetensors", found.updates, result, work)
    result.measured.repair = found.facts


def reconstruct_weights(result: Result, texts: Texts, work: Workspace) -> None:
    """Train each block towards the dense model's. ``cut`` writes the new values of its weights.

    Keeps each finished layer, and the new values.
    """
    recipe = result.recipe
    found = reconstruct(
        result.model,
        result.here.graph,
        result.here.here(result.plan.kept),
        recipe.calibration.of(texts.reconstruct),
        recipe.recovery.reconstruction,
        start=result.updates,
        seed=recipe.seed,
        checkpoints=work.path("reconstruct"),
    )
    _keep_updates("reconstructed.safetensors", found.updates, result, work)
    result.measured.reconstruct = found.facts


def _keep_updates(file: str, updates: dict[str, torch.Tensor], result: Result, work: Workspace) -> None:
    """Take over the new values of a stage, and keep them for ``take_updates``."""
    work.write_tensors(file, updates)
    result.updates |= updates


def take_updates(file: str, result: Result, work: Workspace) -> bool:
    """Take over the new values that a stage kept in ``file``; False when they are missing or damaged."""
    updates = work.read_tensors(file)
    if updates is None:
        return False
    result.updates |= updates
    return True


def cut(result: Result) -> None:
    """Apply the plan: from here on the model and its config have the small shapes.

    The plan's parameter counts are corrected to those of the model: a plan may have been edited, and a method may add
    biases.
    Raises ModelError when the result is to be saved and no config describes it.
    """
    before = countable(result.graph).parameter_count()
    result.dense = Architecture(type(result.model), result.model.config)
    remove_units(result)
    after = parameter_count(result.model)
    counts = {"parameters_before": before, "parameters_after": after, "ratio_reached": 1 - after / before}
    result.plan = result.plan.model_copy(update=counts)
    try:
        adopt_config(result.model, result.graph, result.plan.kept)
    except ModelError as error:  # the model still works; only a folder needs a config
        result.unsavable = str(error)
        if result.output is not None:
            raise


def remove_units(result: Result) -> None:
    """Write the new values, and slice the model by the plan. Its config does not change."""
    apply_updates(result.model, result.updates)
    result.updates = {}
    slice_model(result.model, result.here.graph, result.here.here(result.plan.kept))


def recover_weights(result: Result, texts: Texts, work: Workspace) -> None:
    """Recover by fine-tuning, with the steps of this round. A teacher is released afterwards."""
    recipe, done, rounds = result.recipe, result.here.done, result.recipe.budget.rounds
    settings = recipe.recovery.of_round(done + 1, rounds)
    assert texts.recovery is not None
    task = RecoveryTask(
        text=texts.recovery,
        instructions=texts.instructions if settings.instructions else None,
        validation=texts.validation,
        reference=result.measured.reference or {},
        teacher=result.teacher,
        checkpoints=work.path("recovery"),
        begin=None if rounds == 1 else done * recipe.recovery.steps_between(rounds),
    )
    found = recover(result.model, task, settings, lora=recipe.lora, training=recipe.training, seed=recipe.seed)
    result.measured.recovery = {"log": found.log, "rounds": found.rounds}
    result.teacher = None
    work.write_weights("recovered.safetensors", result.model)


def take_recovered(result: Result, work: Workspace) -> bool:
    """Take over the weights that ``recover_weights`` kept; False when they are missing or damaged. Releases the
    teacher."""
    found = work.read_weights("recovered.safetensors", result.model)
    if found:
        result.teacher = None
    return found


def time_both(result: Result) -> None:
    """Prefill and decode speed of a dense twin (same config, random weights) and of the result, in turns.

    Both are timed as copies, in the type that is written. The model in memory is not changed.
    """
    dtype, device = written_dtype(result.model, result.recipe.export), result.model.device
    dense = result.dense or Architecture(type(result.model), result.model.config)
    twin = as_written(dense.build(), dtype, device)
    small = as_written(copy.deepcopy(result.model), dtype, device)
    speed = compare_speed({"dense": twin, result.measured.last: small})
    result.measured.speed = speed
    states: tuple[State, ...] = ("dense", result.measured.last)
    for state in states:
        before = result.measured.of(state)
        if before is not None:
            setattr(result.measured, state, before.model_copy(update=speed["batch 1"][state]))


@alone("folder")
def save(result: Result, folder: str | Path) -> None:
    """Write the model with its card, report and artefacts to ``folder``, and verify it in a fresh process.

    The write is atomic. Raises VerificationError when the folder computes something else than the model in memory.
    Raises InputError when the folder is not empty, or when the model was changed since ``result`` was made.
    """
    if not isinstance(result, Result):
        raise InputError(f"A {type(result).__name__} is no result. Give what secateur.prune returns.")
    if parameter_count(result.model) != result.plan.parameters_after:
        raise InputError(
            f"The model has {parameter_count(result.model):,} parameters, and this result describes one with "
            f"{result.plan.parameters_after:,}: it was pruned again, or merged with something. Save the latest result."
        )
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
    """Write every file beside the model."""
    result.measured.machine = machine()
    story = Story(
        plan=result.plan,
        graph=result.graph,
        verification=verification,
        recipe=dump(result.recipe),
        metrics=result.metrics,
        licence=licence_of(result.plan.base_model),
    )
    write_artefacts(folder, story, result.scores, result.events)


def size(model: PreTrainedModel, recipe: Recipe) -> dict[str, int]:
    """Parameters, and bytes in the types that are written."""
    return {"parameters": parameter_count(model), "bytes": written_bytes(model, recipe.export)}


def losses(model: PreTrainedModel, recipe: Recipe, blocks: TokenBlocks) -> dict[str, TextLoss]:
    """Loss by source, as the recipe measures it."""
    settings = recipe.evaluation
    dtype = autocast_dtype(settings.precision, model.device)
    return losses_by_source(model, blocks, batch_size=settings.batch_size, autocast=dtype)


def _task(result: Result, texts: Texts, work: Workspace) -> PruningTask:
    recipe = result.recipe
    return PruningTask(
        model=result.model,
        tokenizer=result.tokenizer,
        graph=result.here.graph,
        budget=result.here.budget(recipe.budget),
        calibration=recipe.calibration.of(texts.calibration),
        training_blocks=texts.recovery,
        lora=recipe.lora,
        training=recipe.training,
        seed=recipe.seed,
        work=work.path("method"),
        log=work.log,
    )
