"""The one list of stages, and the one way of knowing which are done."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from secateur.data import Texts
from secateur.stages import making
from secateur.stages.result import Metrics, Result
from secateur.workspace import Workspace


def _always(result: Result, texts: Texts) -> bool:
    return True


def _numbers_alone(result: Result, work: Workspace) -> bool:
    """What a stage leaves that only measures: ``Result.measured`` has it already."""
    return True


@dataclass(frozen=True)
class Stage:
    """One step of a run. Its name in ``Result.done`` says that it is finished; nothing else does."""

    name: str
    title: str
    """What the user reads when it begins; ``{method}`` stands for the method's name."""
    make: Callable[[Result, Texts, Workspace], None]
    wanted: Callable[[Result, Texts], bool] = _always
    restore: Callable[[Result, Workspace], bool] | None = _numbers_alone
    """Takes over what the finished stage kept; False when it is damaged. None: the stage is made in every run, as it
    only changes what is in memory."""
    numbers: tuple[str, ...] = ()
    """The fields of ``Metrics`` that it fills."""
    files: tuple[str, ...] = ()
    """What it keeps in the workspace, checkpoints of an unfinished one among it."""
    scratch: str = ""
    """Which of ``files`` is no longer needed when the stage is finished."""


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
        lambda result, texts, work: making.keep_teacher(result),
        wanted=lambda result, texts: result.recipe.recovery.steps > 0 < result.recipe.recovery.teacher,
        restore=None,
    ),
    Stage(
        "baseline",
        "Pruning without LoRA, for comparison",
        lambda result, texts, work: making.measure_baseline(result, texts),
        wanted=lambda result, texts: texts.evaluation is not None and result.recipe.baseline is not None,
        numbers=("baseline",),
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
        "Refitting what consumes the kept units",
        lambda result, texts, work: making.mend(result, texts),
        wanted=lambda result, texts: result.recipe.recovery.repair,
        restore=None,
        numbers=("repair",),
    ),
    Stage("cut", "Cutting the others out", lambda result, texts, work: making.cut(result), restore=None),
    Stage(
        "pruned",
        "Measuring the pruned model",
        lambda result, texts, work: making.measure(result, texts, "pruned"),
        numbers=("pruned",),
    ),
    Stage(
        "recovery",
        "Growing the lost knowledge back",
        making.grow_back,
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
        "Saving, and opening the folder in a fresh process",
        lambda result, texts, work: making.save(result, result.output or ""),
        wanted=lambda result, texts: result.output is not None,
        restore=None,
    ),
)
"""Every stage of a run, in order. ``pipeline.prune`` makes them, and ``compare`` the same ones for every row."""


class _Finished(BaseModel):
    """What ``metrics.json`` of a workspace holds."""

    done: list[str]
    measured: Metrics


def take_up(result: Result, work: Workspace) -> None:
    """Go on from what an interrupted run kept: its finished stages, their numbers, and its events."""
    found = work.read_json("metrics.json", _Finished)
    if found is not None:
        result.done, result.measured = found.done, found.measured
    result.events = work.events


def make(
    result: Result,
    texts: Texts,
    work: Workspace,
    around: Callable[[Stage], AbstractContextManager[Any]],
) -> None:
    """Make every stage that is wanted and not finished, in order.

    Args:
        result: with the finished stages in ``done`` (``take_up``); it is filled on the way.
        around: a context for each stage that is made.
    """
    wanted = [stage for stage in STAGES if stage.wanted(result, texts)]
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


def _forget(result: Result, work: Workspace, stages: list[Stage]) -> None:
    """The first of ``stages`` is made now: nothing that followed from it before is true any longer."""
    for stage in stages:
        if stage.name in result.done:
            result.done.remove(stage.name)
    for stage in stages[1:]:
        for name in stage.numbers:
            setattr(result.measured, name, None)
        for name in stage.files:
            work.discard(name)
