"""The one list of stages, and the one way of knowing which are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel

from secateur.data import Texts
from secateur.stages import making, rounds
from secateur.stages.result import Metrics, Result
from secateur.workspace import Workspace


def _always(result: Result, texts: Texts) -> bool:
    return True


def _numbers_alone(result: Result, work: Workspace) -> bool:
    """For a stage that only measures: ``Result.measured`` already contains its numbers."""
    return True


@dataclass(frozen=True)
class Stage:
    """One step of a run. A stage is finished if, and only if, ``Result.done`` contains its name."""

    name: str
    title: str
    """The message when it begins; ``{method}`` is replaced by the method's name."""
    make: Callable[[Result, Texts, Workspace], None]
    wanted: Callable[[Result, Texts], bool] = _always
    restore: Callable[[Result, Workspace], bool] | None = _numbers_alone
    """Restores the kept outcome of the finished stage; False when it is damaged. None: the stage is run every time,
    because it only changes the model in memory."""
    numbers: tuple[str, ...] = ()
    """The fields of ``Metrics`` that it fills."""
    files: tuple[str, ...] = ()
    """Its files in the workspace, checkpoints of an unfinished stage included."""
    scratch: str = ""
    """The one of ``files`` that is not needed when the stage is finished."""


STAGES: tuple[Stage, ...] = (
    Stage(
        "dense",
        "Measuring the dense model",
        lambda result, texts, work: making.measure_dense(result, texts),
        numbers=("dense", "reference"),
    ),
    Stage(
        "teacher",
        "Keeping the dense model as the teacher",
        making.keep_teacher,
        wanted=lambda result, texts: result.recipe.recovery.steps > 0 < result.recipe.recovery.teacher,
        restore=None,
        files=("teacher",),
    ),
    Stage(
        "baseline",
        "Pruning without LoRA, for comparison",
        lambda result, texts, work: making.measure_baseline(result, texts),
        wanted=lambda result, texts: texts.evaluation is not None and result.recipe.baseline is not None,
        numbers=("baseline",),
    ),
    Stage(
        "rounds",
        "Pruning in rounds",
        lambda result, texts, work: rounds.prune_in_rounds(result, texts, work, _make_round),
        wanted=lambda result, texts: result.recipe.budget.rounds > 1,
        restore=rounds.take_rounds,
        numbers=("rounds",),
        files=("rounds",),
    ),
    Stage(
        "decide",
        "Choosing the units to remove: {method}",
        making.decide,
        restore=making.take_decision,
        numbers=("method",),
        files=("plan.json", "decided.json", "method"),
        scratch="method",
    ),
    Stage(
        "repair",
        "Refitting the weights that consume the kept units",
        making.repair_weights,
        wanted=lambda result, texts: bool(result.recipe.recovery.repair),
        restore=partial(making.take_updates, "repaired.safetensors"),
        numbers=("repair",),
        files=("repaired.safetensors",),
    ),
    Stage(
        "reconstruct",
        "Training each block towards the output of the dense one",
        making.reconstruct_weights,
        wanted=lambda result, texts: result.recipe.recovery.reconstruct,
        restore=partial(making.take_updates, "reconstructed.safetensors"),
        numbers=("reconstruct",),
        files=("reconstructed.safetensors", "reconstruct"),
        scratch="reconstruct",
    ),
    Stage("cut", "Removing the chosen units", lambda result, texts, work: making.cut(result), restore=None),
    Stage(
        "pruned",
        "Measuring the pruned model",
        lambda result, texts, work: making.measure(result, texts, "pruned"),
        numbers=("pruned",),
    ),
    Stage(
        "recovery",
        "Recovering the lost knowledge",
        making.recover_weights,
        wanted=lambda result, texts: result.recipe.recovery.steps > 0,
        restore=making.take_recovered,
        numbers=("recovery",),
        files=("recovered.safetensors", "recovery"),
        scratch="recovery",
    ),
    Stage(
        "recovered",
        "Measuring the recovered model",
        lambda result, texts, work: making.measure(result, texts, "recovered"),
        wanted=lambda result, texts: result.recipe.recovery.steps > 0,
        numbers=("recovered",),
    ),
    Stage(
        "speed",
        "Timing dense and pruned",
        lambda result, texts, work: making.time_both(result),
        wanted=lambda result, texts: texts.evaluation is not None and result.recipe.evaluation.speed,
        numbers=("speed",),
    ),
    Stage(
        "save",
        "Saving, and verifying the folder in a fresh process",
        lambda result, texts, work: making.save(result, result.output or ""),
        wanted=lambda result, texts: result.output is not None,
        restore=None,
    ),
)
"""Every stage of a run, in order. ``pipeline.prune`` runs them, and ``compare`` runs the same ones for every row."""


class _Finished(BaseModel):
    """The content of ``metrics.json`` in a workspace."""

    done: list[str]
    measured: Metrics


def take_up(result: Result, work: Workspace) -> None:
    """Resume an interrupted run: take over its finished stages, their numbers, and its events."""
    found = work.read_json("metrics.json", _Finished)
    if found is not None:
        result.done, result.measured = found.done, found.measured
        result.resumed = bool(found.done)
    result.events = work.events


def make(
    result: Result,
    texts: Texts,
    work: Workspace,
    around: Callable[[Stage], AbstractContextManager[Any]],
    stages: Sequence[Stage] | None = None,
) -> None:
    """Run every stage that is wanted and not finished, in order.

    Args:
        result: contains the finished stages in ``done`` (``take_up``); the stages fill it.
        around: returns a context in which each stage runs.
        stages: ``STAGES`` by default.
    """
    wanted = [stage for stage in (STAGES if stages is None else stages) if stage.wanted(result, texts)]
    for index, stage in enumerate(wanted):
        if stage.restore is not None:
            if stage.name in result.done and stage.restore(result, work):
                continue
            _forget(result, work, wanted[index:])
        started = time.monotonic()
        with work.tidied(), around(stage):
            stage.make(result, texts, work)
        seconds = round(time.monotonic() - started, 1)
        result.measured.seconds[stage.name] = seconds
        if stage.restore is not None:
            result.done.append(stage.name)
        finished = _Finished(done=result.done, measured=result.measured)
        work.write_json("metrics.json", finished.model_dump())
        work.log({"stage": stage.name, "seconds": seconds})
        if stage.scratch:
            work.discard(stage.scratch)


def _make_round(
    result: Result, texts: Texts, work: Workspace, around: Callable[[Stage], AbstractContextManager[Any]]
) -> None:
    """Run the stages of a round that is not the last one. What it measures is for the record alone."""
    by_name = {stage.name: stage for stage in STAGES}
    recovers = result.recipe.recovery.steps_between(result.recipe.budget.rounds) > 0
    own = [
        by_name["decide"],
        by_name["repair"],
        by_name["reconstruct"],
        replace(by_name["cut"], make=lambda result, texts, work: making.remove_units(result)),
        *([by_name["recovery"]] if recovers else []),
    ]
    take_up(result, work)
    make(result, texts, work, around, own)


def _forget(result: Result, work: Workspace, stages: list[Stage]) -> None:
    """Discard the kept outcome of ``stages``, because the first of them runs again."""
    for stage in stages:
        if stage.name in result.done:
            result.done.remove(stage.name)
    for stage in stages[1:]:
        for name in stage.numbers:
            setattr(result.measured, name, None)
        for name in stage.files:
            work.discard(name)
