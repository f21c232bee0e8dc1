"""A short rehearsal before the first minute of work. It finds every fault of budget, method, recovery and output."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from secateur.analysis import check_weights
from secateur.compensation import check_reconstructable, check_refittable
from secateur.config import Recipe
from secateur.data import Texts
from secateur.digest import digest
from secateur.errors import InputError, PlanError, SecateurError
from secateur.export import check_describable, rehearse_saving
from secateur.graph.twin import twin_of
from secateur.importance import Random
from secateur.methods import PruningTask, method_class
from secateur.stages.result import Result, plan_for
from secateur.stages.rounds import rehearse_rounds
from secateur.training import attach_lora
from secateur.types import DependencyGraph, PruningPlan, Removed, Scores


def rehearse(model: PreTrainedModel, graph: DependencyGraph, recipe: Recipe) -> PruningPlan:
    """Make a plan from random scores: about the sizes that the run ends with. Finds every fault of the budget.

    Method, baseline and adapters are checked as well, on a twin of the model without weights.
    """
    task = PruningTask(model, None, graph, recipe.budget, lora=recipe.lora, training=recipe.training, seed=recipe.seed)
    scores = Random().score(model, task.restricted, None, recipe.seed)
    if recipe.budget.protect_from is not None:
        check_weights(model, recipe.budget.protect_from)
    plan = plan_for(graph, recipe, _removed(task, scores, recipe))
    if recipe.recovery.repair and "repair" in recipe.recovery.model_fields_set:  # a default: ``with_possible_repair``
        check_refittable(model, graph, plan.kept, recipe.recovery.repair_target)
    if recipe.recovery.reconstruct:
        check_reconstructable(model, graph, plan.kept)
    if any(graph[name].on_request for name in plan.kept):
        check_describable(model, graph, plan.kept)
    method = recipe.method.built
    recovers = recipe.recovery.steps > 0
    if method.needs == "training" or (recovers and recipe.recovery.finetuning == "lora"):
        attach_lora(cast(PreTrainedModel, twin_of(model)), recipe.lora, recipe.seed)
    if method.compensates and not method.repairable and recipe.recovery.repair:
        raise InputError(
            f"Both {method.name} and recovery.repair compensate for removed units, and must not be combined. Set "
            "recovery.repair=false, or switch compensation off in the method (flap: method.compensate=false)."
        )
    method.check(task)
    windows = recipe.calibration.tokens // recipe.calibration.window
    if windows < method.fewest_windows:
        raise InputError(
            f"{method.name} needs at least {method.fewest_windows} windows of calibration text, and calibration.tokens="
            f"{recipe.calibration.tokens} are {windows} of {recipe.calibration.window} tokens. Raise "
            "calibration.tokens, or lower calibration.window."
        )
    if recipe.baseline:
        try:
            method_class(recipe.baseline)().check(task)
        except SecateurError as error:
            raise InputError(
                f"The baseline {recipe.baseline} cannot be measured (evaluation.baseline): {error}"
            ) from error
    return plan


def _removed(task: PruningTask, scores: Scores, recipe: Recipe) -> Removed:
    """The units that the run removes by these scores, or in several rounds by others of their kind."""
    if recipe.budget.rounds == 1:
        return task.allocate(scores)
    try:
        removed = rehearse_rounds(task.model, task.graph, recipe)
    except PlanError:
        task.allocate(scores)  # where one round cannot do it either, the error has the numbers of the recipe
        raise
    return removed or task.allocate(scores)


def rehearse_output(result: Result, output: Path) -> None:
    """Write everything but the weights once, by the plan of ``result``, and read it back.

    Also checks that the disk has space for the result and for the stages that are kept until it is finished. Raises
    the errors that saving would raise at the end.
    """
    recipe, plan = result.recipe, result.plan
    in_memory = sum(weight.nbytes for weight in result.model.parameters())
    stages = float(method_class(recipe.method.name).changes_weights)
    stages += 2.0 * recipe.recovery.reconstruct  # of each layer, and of all together
    stages += 2.0 * (recipe.budget.rounds > 1)  # after a round, and in the next one
    if recipe.recovery.steps > 0:
        stages += plan.parameters_after / plan.parameters_before
    consumers = {member.parameter for name in plan.kept for member in result.graph[name].members if member.role == "in"}
    refitted = sum(result.model.get_parameter(name).nbytes for name in consumers) if recipe.recovery.repair else 0
    rehearse_saving(
        result.model,
        result.tokenizer,
        output,
        graph=result.graph,
        kept=plan.kept,
        settings=recipe.export,
        beside=round(stages * in_memory)
        + refitted
        + recipe.recovery.disk_bytes(plan.parameters_after, recipe.training),
    )


def contents(model: PreTrainedModel, source: str, texts: Texts | None = None) -> dict[str, str]:
    """Digests of the inputs of a run, by the names that messages use: weights, and texts once they are read.

    The same recipe may name other contents later, and an unfinished run must not resume with those. ``source`` is
    that of classes of one's own (``plugins.source_digest``), empty where there are none.
    """
    read = {} if texts is None else vars(texts)
    blocks = {f"the text of {purpose}": "none" if found is None else found.digest for purpose, found in read.items()}
    own = {"the files of your own classes": source} if source else {}
    return {"the model's weights": digest(model), **own, **blocks}
