"""Pruning in periods: the loop, its schedule, and the notes on disk from which an interrupted run resumes.

In each period fresh adapters train while a ``Transfer`` drives out the redundant units. Then the adapters are merged,
the remaining units are scored, and the next ones are chosen. LoRAShear is a saliency and a transfer in this loop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import Field
from safetensors.torch import load_model, save_model

from secateur import progress
from secateur.graph import trace
from secateur.keeping import keep, take
from secateur.methods.base import Decision, PruningTask
from secateur.methods.saliency import Saliency
from secateur.methods.transfer import Transfer
from secateur.planning import by_period
from secateur.reading import read_json
from secateur.surgery import zero_units
from secateur.training import Schedule, attach_lora, merge_lora, train
from secateur.types import Cut, DependencyGraph, Removed, Scores, Settings
from secateur.whole import remove, write_whole


class PeriodSettings(Settings):
    """The schedule. Steps are optimiser steps. The text is that of the recipe's ``recovery`` section."""

    periods: int = Field(default=1, ge=1)
    """P: number of periods in which the units are removed."""
    period_steps: int = Field(default=80, ge=1)
    """T_p: steps in which the redundant units of one period shrink to zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """T_w: steps of plain LoRA training before the first period."""
    schedule: Schedule = "constant"
    """Learning-rate schedule within a period; recovery, which ends the training, has ``training.schedule``."""

    @property
    def steps(self) -> int:
        """Steps of all periods and the warm-up."""
        return self.warmup_steps + self.periods * self.period_steps


@dataclass(frozen=True)
class Period:
    """One stretch of training, with fresh adapters and a fresh optimiser."""

    number: int
    """From 1 on; 0 is the warm-up, in which nothing is removed."""
    steps: int
    redundant: Removed
    """Group name → units to remove in this period."""
    gone: Removed
    """Group name → units that earlier periods removed; nothing consumes them."""


@dataclass
class Periods:
    """One run. Changes the weights of ``task.model`` in place, not their shapes. At the end nothing consumes removed
    units.

    ``Periods(task, settings, Saliency({"magnitude": 1.0}), MyTransfer).run()`` is a whole method.

    Args:
        transfer: makes the ``Transfer`` of a period, from the graph of the model with its adapters on.
    """

    task: PruningTask
    settings: PeriodSettings
    saliency: Saliency
    transfer: Callable[[DependencyGraph, Period], Transfer]
    book: Book = field(init=False)

    def __post_init__(self) -> None:
        self.book = Book(self.task)

    def run(self) -> Decision:
        """Run all periods, or the remaining ones of an interrupted run."""
        settings = self.settings
        begun = self.book.restore()
        adapted: PeftModel | None = None
        if begun is None and settings.warmup_steps:
            adapted = self._train(Period(0, settings.warmup_steps, {}, {}))
        removed = begun.removed if begun else {}
        for number in range(begun.number if begun else 1, settings.periods + 1):
            if begun is None or number > begun.number:
                begun = self._begin(number, removed, adapted)
            redundant = {name: sorted(set(units) - set(removed.get(name, ()))) for name, units in begun.chosen.items()}
            adapted = self._train(Period(number, settings.period_steps, redundant, removed))
            removed = begun.chosen
        assert begun is not None
        assert adapted is not None
        _settle(self.task, adapted, removed)
        return Decision(removed=removed, scores=begun.scores, metrics={"training": self.book.log})

    def _begin(self, number: int, removed: Removed, adapted: PeftModel | None) -> _Begun:
        """Score the remaining units while the previous adapters are still on, merge these, and choose the next
        units."""
        task, seed = self.task, self.task.seed + number - 1
        found = {} if adapted is None else self.saliency.of_adapters(task, adapted, seed)
        _settle(task, adapted, removed)
        scores = self.saliency.scores(task, found, seed)
        share = by_period(number - 1, self.settings.periods)
        chosen = task.allocate(scores, removed, ratio=share * task.budget.ratio)
        begun = _Begun(number, removed, chosen, scores)
        self.book.keep(begun, weights_changed=adapted is not None)
        return begun

    def _train(self, period: Period) -> PeftModel:
        """Train fresh adapters under the period's transfer; they are still on the model that it returns."""
        task, number, settings = self.task, period.number, self.settings
        assert task.training_blocks is not None
        description = f"period {number}/{settings.periods}" if number else "warming up"
        adapted = attach_lora(task.model, task.lora, task.seed + number)
        transfer = self.transfer(trace(adapted), period)
        log = train(
            adapted,
            task.training_blocks.ids,
            task.training.model_copy(update={"schedule": settings.schedule}),
            steps=period.steps,
            # not the order of recovery, which trains with the seed itself
            seed=task.seed + (number or settings.periods + 1),
            description=description,
            callbacks=[transfer],
            penalty=transfer.penalty,
            checkpoints=self.book.checkpoints(number),
        )
        for entry in log:
            self.book.log.append({"stage": description, **entry})
            task.log(self.book.log[-1])
        return adapted


def _settle(task: PruningTask, adapted: PeftModel | None, removed: Removed) -> None:
    """End a period of training: merge the adapters, and zero the weights that consume removed units."""
    if adapted is not None:
        merge_lora(adapted)
        zero_units(task.model, task.graph, Cut.removing(task.graph, removed))


@dataclass(frozen=True)
class _Begun:
    """A period that has begun: its units are chosen, and its training is not finished."""

    number: int
    removed: Removed
    """Units that earlier periods removed."""
    chosen: Removed
    """These, and the units to remove in this period."""
    scores: Scores


class _Note(Settings):
    """The content of ``period.json``; the tensors are in files beside it."""

    number: int = Field(ge=1)
    removed: Removed
    chosen: Removed
    weights_changed: bool
    log: list[dict[str, Any]]


class Book:
    """Keeps the start of the current period on disk. Within the period, the Trainer writes checkpoints.

    Checkpoints of the last step are kept until the next period has begun, because scoring for it takes time.
    """

    def __init__(self, task: PruningTask) -> None:
        self.task = task
        self.folder = task.work
        self.log: list[dict[str, Any]] = []

    def checkpoints(self, period: int) -> Path | None:
        """Folder of the Trainer's checkpoints in this period."""
        return None if self.folder is None else self.folder / f"training-{period}"

    def keep(self, begun: _Begun, weights_changed: bool) -> None:
        """Write weights, then the note that names them: a kill in between leaves the older pair valid."""
        if self.folder is None:
            return
        number = begun.number
        if weights_changed:
            keep(self.folder / f"weights-{number}.safetensors", lambda file: save_model(self.task.model, str(file)))
        keep(self.folder / f"scores-{number}.safetensors", begun.scores.save)
        note = _Note(
            number=number, removed=begun.removed, chosen=begun.chosen, weights_changed=weights_changed, log=self.log
        )
        write_whole(self.folder / "period.json", json.dumps(note.model_dump()))
        for name in ("weights", "scores"):
            (self.folder / f"{name}-{number - 1}.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.folder / f"training-{number - 1}", ignore_errors=True)

    def restore(self) -> _Begun | None:
        """The period that had begun, with the task's model as it was then. None when there is none, or when its files
        are damaged: then all files of the earlier run are removed, and the method starts again."""
        if self.folder is None or not (self.folder / "period.json").exists():
            return None
        begun = take(self.folder / "period.json", self._read)
        if begun is None:
            remove(self.folder)
        else:
            progress.say(f"  resuming in period {begun.number}")
        return begun

    def _read(self, file: Path) -> _Begun:
        """The period that ``file`` and those beside it describe, with the task's model as it was then."""
        note = _Note.model_validate(read_json(file))
        scores = Scores.load(file.with_name(f"scores-{note.number}.safetensors"))
        if note.weights_changed:
            load_model(self.task.model, str(file.with_name(f"weights-{note.number}.safetensors")))
        self.log = note.log
        return _Begun(note.number, note.removed, note.chosen, scores)
