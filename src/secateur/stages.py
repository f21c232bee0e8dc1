"""The stages of a run, each callable alone: what ``pipeline.prune`` puts one after the other."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.analysis import check_weights
from secateur.config import Recipe, dump
from secateur.data import Texts, TokenBlocks
from secateur.digest import digest
from secateur.errors import InputError, ModelError, SecateurError
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
    check_describable,
    licence_of,
    rehearse_saving,
    write_artefacts,
    written_bytes,
    written_dtype,
)
from secateur.export import save as save_folder
from secateur.graph.twin import twin_of
from secateur.importance import Random
from secateur.lock import alone
from secateur.methods import Decision, Method, PruningTask, method_class
from secateur.planning import describe_plan, make_plan
from secateur.precision import autocast_dtype
from secateur.progress import say
from secateur.recovery import RecoveryTask, check_repairable, recover, repair, source_losses
from secateur.surgery import apply_updates, check_updates, masked, slice_model, updated
from secateur.training import attach_lora
from secateur.types import Cut, DependencyGraph, PruningPlan, Scores, Settings
from secateur.workspace import Workspace

_QUANTISED = ("Int8Params", "Params4bit")
"""What bitsandbytes calls parameters in 8 and 4 bits; by name, as it need not be installed."""
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""What holds a model in its attribute ``module``."""


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
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    """New values that the method has for parameters (``Decision.updates``); written, and let go, by ``cut``."""
    teacher: PreTrainedModel | None = None
    """The dense model while recovery still needs it (``recovery.teacher``)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """JSON-able numbers: ``dense``, ``baseline``, ``pruned``, ``recovered``, ``speed``, ``seconds`` …"""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened when, as in ``run.jsonl``."""


def rehearse(model: PreTrainedModel, graph: DependencyGraph, recipe: Recipe) -> PruningPlan:
    """A plan by random scores: about the sizes that a run ends with, and every fault of the budget, in a moment.

    Also what method and baseline cannot do, and adapters that find no place, on a weightless twin of the model.
    """
    task = PruningTask(model, None, graph, recipe.budget, lora=recipe.lora, training=recipe.training, seed=recipe.seed)
    scores = Random().score(model, task.restricted, None, recipe.seed)
    if recipe.budget.protect_from is not None:
        check_weights(model, recipe.budget.protect_from)
    plan = _plan(graph, recipe, task.allocate(scores))
    if recipe.recovery.repair:
        check_repairable(model, graph, plan.kept)
    if any(graph[name].on_request for name in plan.kept):
        check_describable(model, graph, plan.kept)
    method = method_class(recipe.method.name)(recipe.method.settings)
    if method.needs == "training" or recipe.recovery.steps > 0:
        attach_lora(cast(PreTrainedModel, twin_of(model)), recipe.lora, recipe.seed)
    if method.compensates and recipe.recovery.repair:
        raise InputError(
            f"Both {method.name} and recovery.repair make up for what goes, and together they would do it twice. Set "
            "recovery.repair=false, or switch it off in the method (flap: method.compensate=false)."
        )
    method.check(task)
    if recipe.baseline:
        try:
            method_class(recipe.baseline)().check(task)
        except SecateurError as error:
            raise InputError(
                f"The baseline {recipe.baseline} cannot be measured (evaluation.baseline): {error}"
            ) from error
    return plan


def rehearse_output(result: Result, output: Path) -> None:
    """Write everything but the weights once, by the plan that ``result`` has, and read it back; see whether the disk
    holds the result and the stages that are kept until it is finished. Raises what saving would raise at the end.
    """
    recipe, plan = result.recipe, result.plan
    in_memory = sum(weight.numel() * weight.element_size() for weight in result.model.parameters())
    stages = float(method_class(recipe.method.name).changes_weights)
    if recipe.recovery.steps > 0:
        stages += plan.parameters_after / plan.parameters_before
    rehearse_saving(
        result.model,
        result.tokenizer,
        output,
        graph=result.graph,
        kept=plan.kept,
        settings=recipe.export,
        beside=round(stages * in_memory),
    )


def measure(result: Result, texts: Texts, state: str) -> None:
    """Perplexity by source, parameters and bytes of the model as it is now, under ``metrics[state]``."""
    if state in result.metrics:
        return
    numbers: dict[str, Any] = size(result.model, result.recipe)
    if texts.evaluation is not None:
        measured = losses(result.model, result.recipe, texts.evaluation)
        numbers["perplexity"] = {source: loss.perplexity for source, loss in measured.items()}
        result.metrics["window"] = texts.evaluation.window
        result.metrics["windows"] = asdict(Windows.of(texts.evaluation, result.tokenizer))
        result.metrics["tokens"] = {source: loss.tokens for source, loss in measured.items()}
    result.metrics[state] = numbers


def look_ahead(result: Result, texts: Texts) -> None:
    """What recovery needs of the dense model: its loss on the text that is watched, and itself as the teacher."""
    settings = result.recipe.recovery
    if texts.validation is not None and "reference" not in result.metrics:
        result.metrics["reference"] = source_losses(result.model, texts.validation, result.recipe.training)
    if settings.teacher > 0 and settings.steps > 0:
        result.teacher = copy.deepcopy(result.model)


def measure_baseline(result: Result, texts: Texts) -> None:
    """What one shot without any training would have cost at the same ratio: masked and updated, then as before."""
    name = result.recipe.baseline
    if "baseline" in result.metrics:
        return
    assert name is not None
    assert texts.evaluation is not None
    decision = _run(method_class(name)(), _task(result, texts, Workspace(None)))
    kept = Cut.removing(result.graph, decision.removed)
    with updated(result.model, decision.updates), masked(result.model, result.graph, kept):
        measured = losses(result.model, result.recipe, texts.evaluation)
    perplexity = {source: loss.perplexity for source, loss in measured.items()}
    result.metrics["baseline"] = {"name": f"{name} without LoRA", "perplexity": perplexity}


class _Kept(Settings):
    """What the files say that are kept of a decision: which tensors there are beside the plan."""

    scores: bool
    updates: bool
    weights: bool


def decide(result: Result, texts: Texts, work: Workspace) -> None:
    """Let the method choose the units that go, and write the plan. What it changed, or wants to, is kept with it."""
    recipe = result.recipe
    method = method_class(recipe.method.name)(recipe.method.settings)
    if _decided(result, work):
        return
    decision = _run(method, _task(result, texts, work))
    result.plan = _plan(result.graph, recipe, decision.removed)
    result.scores, result.updates = decision.scores, decision.updates
    result.metrics["method"] = decision.metrics
    if result.scores is not None:
        work.write_scores("scores.safetensors", result.scores)
    if result.updates:
        work.write_tensors("updates.safetensors", _on_cpu(result.updates))
    if method.changes_weights:
        work.write_weights("decided.safetensors", result.model)
    kept = _Kept(scores=result.scores is not None, updates=bool(result.updates), weights=method.changes_weights)
    work.write_json("decided.json", kept.model_dump())
    work.write_json("metrics.json", result.metrics)
    work.write_json("plan.json", result.plan.model_dump())  # last: it marks the stage as finished
    work.discard("method")
    say(describe_plan(result.plan, result.graph))


def _decided(result: Result, work: Workspace) -> bool:
    """Take over what an earlier run decided, all of it; when there is none, or a part is damaged, nothing that follows
    from it stays either."""
    plan, kept = work.read_json("plan.json", PruningPlan), work.read_json("decided.json", _Kept)
    if plan is not None and kept is not None and "method" in result.metrics:
        scores = work.read_scores("scores.safetensors") if kept.scores else None
        updates = work.read_tensors("updates.safetensors") if kept.updates else {}
        tensors_are_there = (scores is not None) == kept.scores and updates is not None
        if tensors_are_there and (not kept.weights or work.read_weights("decided.safetensors", result.model)):
            plan.check(result.graph)
            result.plan = plan
            result.scores, result.updates = scores, updates or {}
            return True
    for name in ("plan.json", "recovery", "recovered.safetensors"):
        work.discard(name)
    for state in ("method", "pruned", "repair", "recovery", "recovered", "speed"):
        result.metrics.pop(state, None)
    return False


def _run(method: Method, task: PruningTask) -> Decision:
    """What the method decides; ModelError when it answers with updates that it did not declare, or that do not fit."""
    decision = method.run(task)
    if decision.updates and not method.compensates:
        raise ModelError(f"{method.name} has new values for parameters; its class must say so (compensates = True).")
    check_updates(task.model, task.graph, Cut.removing(task.graph, decision.removed), decision.updates)
    return decision


def mend(result: Result, texts: Texts) -> None:
    """Refit what consumes the units that stay, before the others are cut out."""
    recipe = result.recipe
    calibration = recipe.calibration.of(texts.calibration)
    refits = repair(result.model, result.graph, result.plan.kept, calibration, ridge=recipe.recovery.repair_ridge)
    result.metrics["repair"] = {name: {"before": refit.before, "after": refit.after} for name, refit in refits.items()}


def cut(result: Result) -> None:
    """Apply the plan: from here on the shapes, and the model's own config, are the small ones.

    The plan's counts become those of the model: a plan may have been edited, and a method may bring new biases.
    """
    before = parameter_count(result.model)
    result.dense = Architecture(type(result.model), result.model.config)
    apply_updates(result.model, result.updates)
    result.updates = {}
    slice_model(result.model, result.graph, result.plan.kept)
    after = parameter_count(result.model)
    counts = {"parameters_before": before, "parameters_after": after, "ratio_reached": 1 - after / before}
    result.plan = result.plan.model_copy(update=counts)
    try:
        adopt_config(result.model, result.graph, result.plan.kept)
    except ModelError as error:  # it computes all the same; only a folder needs a config
        result.metrics["cannot_be_saved"] = str(error)


def refuse_unsavable(result: Result) -> None:
    """Raise the ModelError that ``cut`` noted when no config describes the model."""
    if "cannot_be_saved" in result.metrics:
        raise ModelError(result.metrics["cannot_be_saved"])


def grow_back(result: Result, texts: Texts, work: Workspace) -> None:
    """Recover by LoRA fine-tuning, merged at the end. The teacher, if there is one, is let go."""
    recipe = result.recipe
    assert texts.recovery is not None
    if "recovery" in result.metrics and work.read_weights("recovered.safetensors", result.model):
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
    work.write_json("metrics.json", result.metrics)
    work.write_weights("recovered.safetensors", result.model)
    work.discard("recovery")


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


@alone("folder")
def save(result: Result, folder: str | Path) -> None:
    """Write the model and everything that explains it to ``folder``, proved in a fresh process.

    The folder appears whole or not at all. Raises VerificationError when it does not compute what the model in memory
    does, and InputError when it exists and is not empty, or when the model was changed since ``result`` was made.
    """
    if not isinstance(result, Result):
        raise InputError(f"A {type(result).__name__} is no result. Give what secateur.prune returns.")
    if parameter_count(result.model) != result.plan.parameters_after:
        raise InputError(
            f"The model has {parameter_count(result.model):,} parameters and this result is about one with "
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


def refuse_what_cannot_work(model: PreTrainedModel) -> None:
    """Raise InputError for what is no model, adapters, weights that are elsewhere or in 8 or 4 bits, models wrapped by
    something else, several processes, and a GPU that the Trainer would not use."""
    _refuse_wrapped(model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"A {type(model).__name__} is not a model of transformers. Give what secateur.load or "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    if getattr(model.config, "return_dict", None) is False:
        raise InputError("This model answers with tuples. Set model.config.return_dict = True.")
    if isinstance(model, PeftModel):
        raise InputError("This model carries adapters. Merge them first: model = model.merge_and_unload().")
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if wrapped:
        raise InputError(
            f"{len(wrapped)} modules of this model carry adapters (the first is {wrapped[0]}), as after training that "
            "was interrupted, or because a PeftModel holds it. Load the model again, or merge that PeftModel "
            "(merge_and_unload) and give what it returns."
        )
    quantised = [name for name, weight in model.named_parameters() if type(weight).__name__ in _QUANTISED]
    if quantised:
        raise InputError(
            f"{len(quantised)} weights of this model are quantised by bitsandbytes (the first is {quantised[0]}); rows "
            "and columns cannot be cut out of those. Load it in float32, bfloat16 or float16, and quantise the result."
        )
    _refuse_elsewhere(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Pruning runs in one process so far. Start it without torchrun or accelerate launch.")
    if model.device.type == "cuda" and model.device.index:
        raise InputError(
            f"Training happens on the first visible GPU, and the model is on {model.device}. "
            f"Set CUDA_VISIBLE_DEVICES={model.device.index} and use --device cuda."
        )


def _refuse_wrapped(model: object) -> None:
    """Raise InputError for a model inside something that calls it in a way of its own."""
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise InputError(
            "This model is wrapped by torch.compile, which keeps what it compiled for the old shapes. Give the model "
            "inside (model._orig_mod), and compile what secateur returns."
        )
    if kind in _WRAPPERS:
        raise InputError(f"This model is wrapped by {kind}. Give the model inside (model.module).")
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if type(module).__name__ in (*_WRAPPERS, "OptimizedModule") or type(module).__name__.startswith("FSDP"):
            raise InputError(f"{name or 'The model'} is wrapped ({type(module).__name__}). Load the model plainly.")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{name or 'The model'} was compiled in place (compile), for the old shapes. Load the model again, and "
                "compile what secateur returns."
            )


def _refuse_elsewhere(model: PreTrainedModel) -> None:
    """Raise InputError when numbers are not in the memory of this process's device."""
    for name, weight in model.named_parameters():
        if type(weight.data).__name__ == "DTensor":
            raise InputError(f"{name} is spread over several devices (DTensor). Load the model without device_mesh.")
        if not weight.is_meta:
            continue
        places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
        if places:
            raise InputError(
                f"{name} was offloaded by device_map (to {', '.join(places)}) and comes to a device only while it "
                "computes, so it cannot be cut. Load the model without device_map, on one device that holds it."
            )
        raise InputError(
            f"{name} is on the meta device: it has a shape and no numbers. Load the model with its weights; "
            "secateur.trace looks at one without."
        )


def contents(model: PreTrainedModel, texts: Texts | None = None) -> dict[str, str]:
    """Digests of what a run computes from, by the names that a message uses: weights, and texts once they are read.

    The same recipe may name other contents tomorrow, and an unfinished run must not go on with those.
    """
    read = {} if texts is None else vars(texts)
    blocks = {f"the text of {purpose}": "none" if found is None else found.digest for purpose, found in read.items()}
    return {"the model's weights": digest(model), **blocks}


def _last(result: Result) -> str:
    return "recovered" if "recovered" in result.metrics else "pruned"


def size(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Parameters, and bytes in the types that are written."""
    return {"parameters": parameter_count(model), "bytes": written_bytes(model, recipe.export)}


def losses(model: PreTrainedModel, recipe: Recipe, blocks: TokenBlocks) -> dict[str, TextLoss]:
    """Loss by source, as the recipe measures it."""
    settings = recipe.evaluation
    dtype = autocast_dtype(settings.precision, model.device)
    return losses_by_source(model, blocks, batch_size=settings.batch_size, autocast=dtype)


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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


def _task(result: Result, texts: Texts, work: Workspace) -> PruningTask:
    recipe = result.recipe
    return PruningTask(
        model=result.model,
        tokenizer=result.tokenizer,
        graph=result.graph,
        budget=recipe.budget,
        calibration=recipe.calibration.of(texts.calibration),
        training_blocks=texts.recovery,
        lora=recipe.lora,
        training=recipe.training,
        seed=recipe.seed,
        work=work.path("method"),
        log=work.log,
    )
