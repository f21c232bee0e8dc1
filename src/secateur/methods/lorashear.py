"""LoRAShear (arXiv 2310.18356): progressive structured pruning guided by LoRA, Algorithm 4."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from peft import PeftModel
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import PreTrainedModel

from secateur import progress
from secateur.errors import InputError, out_of_memory
from secateur.graph import trace
from secateur.graph.twin import twin_of
from secateur.importance import CRITERIA
from secateur.importance.base import Checked
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, adapted_graph, score
from secateur.methods.lhspg import LHSPGCallback, Projection, check_norms, still_heard
from secateur.planning import by_period
from secateur.precision import autocast
from secateur.reading import read_json
from secateur.surgery import zero_units
from secateur.surgery.mask import require_maskable
from secateur.training import Schedule, attach_lora, merge_lora, train
from secateur.types import Scores, Settings, removed_to_kept
from secateur.whole import remove, whole, write_whole

Removed = dict[str, list[int]]


class LoRAShearSettings(Settings):
    """The progressive schedule. Steps are optimiser steps; the text is that of the recipe's ``recovery`` section."""

    periods: int = Field(default=1, ge=1)
    """P: in how many instalments the units go."""
    period_steps: int = Field(default=40, ge=1)
    """T_p: steps in which the redundant units of one period shrink to zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """T_w: steps of plain LoRA training before the first period."""
    projection: Projection = "decay"
    """How redundant units reach zero: ``decay`` (released optimiser) or ``half-space`` (paper)."""
    epsilon: float = Field(default=0.0, ge=0.0, lt=1.0)
    """ε of the half-space projection: bigger zeroes earlier. Above 0 only with ``half-space``."""
    schedule: Schedule = "constant"
    """Learning-rate schedule inside a period; recovery, which ends the training, has ``training.schedule``."""
    saliency: dict[str, float] = Field(default={"fisher": 1.0}, min_length=1)
    """Criteria that rank the units anew in every period, with their weights."""

    @field_validator("saliency")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        if not set(value) <= set(CRITERIA) or not all(weight > 0 for weight in value.values()):
            raise ValueError(f"give positive weights to some of {', '.join(CRITERIA)}")
        if not math.isfinite(sum(value.values())):
            raise ValueError(f"weights must be finite, and their sum as well; got {value}")
        return value

    @model_validator(mode="after")
    def _epsilon_is_used(self) -> Self:
        if self.epsilon and self.projection == "decay":
            raise ValueError("epsilon belongs to projection=half-space; with decay it must be 0")
        return self

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        readers = [name for name in self.saliency if CRITERIA[name].needs == "adapters"]
        if readers and self.warmup_steps == 0:
            raise ValueError(
                f"saliency by {', '.join(readers)} reads adapters, and there are none before the first period: "
                "set warmup_steps above 0"
            )
        return self


class LoRAShear(Method):
    """Train LoRA in periods; in each, score, choose the next units, and shrink them to zero while the rest learns."""

    name: ClassVar[str] = "lorashear"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.18356"
    summary: ClassVar[str] = "progressive: LoRA learns what redundant units did while LHSPG drives them to zero"
    needs: ClassVar[MethodNeeds] = "training"
    changes_weights: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = LoRAShearSettings
    settings: LoRAShearSettings

    @property
    def training_steps(self) -> int:
        """See ``Method.training_steps``."""
        return self.settings.warmup_steps + self.settings.periods * self.settings.period_steps

    def run(self, task: PruningTask) -> Decision:
        """Algorithm 4. Changes the weights of ``task.model`` in place, not their shapes; the units that go are zero."""
        settings = self.settings
        book = _Book(task)
        begun = book.restore()
        adapted: PeftModel | None = None
        if begun is None and settings.warmup_steps:
            adapted = self._train(task, book, 0, {}, {}, settings.warmup_steps)
        removed = begun.removed if begun else {}
        for period in range(begun.number if begun else 1, settings.periods + 1):
            if begun is None or period > begun.number:
                begun = self._begin(task, book, period, removed, adapted)
            redundant = {name: sorted(set(units) - set(removed.get(name, ()))) for name, units in begun.chosen.items()}
            adapted = self._train(task, book, period, redundant, removed, settings.period_steps)
            removed = begun.chosen
        assert begun is not None
        assert adapted is not None
        _settle(task, adapted, removed)
        return Decision(removed=removed, scores=begun.scores, metrics={"training": book.log})

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: zeroing must be removing, norms must be able to follow, and a saliency that reads
        adapters must find them in every group; tried on a twin."""
        super().check(task)
        require_maskable(task.prunable)
        heard = still_heard(task.model, task.restricted)
        adapted = attach_lora(cast(PreTrainedModel, twin_of(task.model, weights=True)), task.lora, task.seed)
        graph = adapted_graph(adapted, task)
        check_norms(adapted, graph, heard)
        for criterion in map(CRITERIA.__getitem__, self.settings.saliency):
            if isinstance(criterion, Checked):
                criterion.check(adapted, graph)

    def _begin(
        self, task: PruningTask, book: _Book, period: int, removed: Removed, adapted: PeftModel | None
    ) -> _Period:
        """Score what is there, with the adapters of the training before it still on; merge them; choose what goes."""
        scores = _saliency(task, self.settings.saliency, adapted, removed, seed=task.seed + period - 1)
        share = by_period(period - 1, self.settings.periods)
        chosen = task.allocate(scores, removed, ratio=share * task.budget.ratio)
        begun = _Period(period, removed, chosen, scores)
        book.keep(begun, weights_changed=adapted is not None)
        return begun

    def _train(
        self, task: PruningTask, book: _Book, period: int, redundant: Removed, gone: Removed, steps: int
    ) -> PeftModel:
        """Train fresh adapters with a fresh optimiser under the projection; they are still on the model it returns."""
        assert task.training_blocks is not None
        heard = still_heard(task.model, task.restricted) if redundant or gone else ()
        description = f"period {period}/{self.settings.periods}" if period else "warming up"
        adapted = attach_lora(task.model, task.lora, task.seed + period)
        projection = LHSPGCallback(
            trace(adapted),
            redundant,
            gone,
            steps=steps,
            mode=self.settings.projection,
            epsilon=self.settings.epsilon,
            heard=heard,
        )
        log = train(
            adapted,
            task.training_blocks.ids,
            task.training.model_copy(update={"schedule": self.settings.schedule}),
            steps=steps,
            # not the order of recovery, which trains with the seed itself
            seed=task.seed + (period or self.settings.periods + 1),
            description=description,
            callbacks=[projection],
            checkpoints=book.checkpoints(period),
        )
        for entry in log:
            book.log.append({"stage": description, **entry})
            task.log(book.log[-1])
        return adapted


def _settle(task: PruningTask, adapted: PeftModel | None, removed: Removed) -> None:
    """End a stretch of training: merge the adapters, and let nothing consume what is gone."""
    if adapted is not None:
        merge_lora(adapted)
        zero_units(task.model, task.graph, removed_to_kept(task.graph, removed))


def _saliency(
    task: PruningTask, weights: Mapping[str, float], adapted: PeftModel | None, removed: Removed, seed: int
) -> Scores:
    """Weighted sum of criteria, each divided by its L2 norm over all groups so that none drowns the others (HESSO).

    Adapters that are on the model are read first, by criteria that need them, and then merged.
    """
    readers = [name for name in weights if CRITERIA[name].needs == "adapters"]
    found: dict[str, Scores] = {}
    if readers:
        assert adapted is not None
        graph = adapted_graph(adapted, task)
        with autocast(task.training.precision, task.model.device):
            found = {name: CRITERIA[name].score(adapted, graph, task.calibration, seed) for name in readers}
    _settle(task, adapted, removed)
    found |= {name: score(task, CRITERIA[name], seed) for name in weights if name not in found}
    return combine({name: found[name] for name in weights}, weights)


def combine(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """``Σ weight · score / ‖score‖`` over criteria, with norms over the units of all groups."""
    total: dict[str, torch.Tensor] = {}
    for name, scores in found.items():
        norm = torch.stack([scores[group].double().square().sum() for group in scores]).sum().sqrt()
        scale = weights[name] / float(norm) if norm > 0 else weights[name]
        for group in scores:
            total[group] = total.get(group, torch.zeros(())) + scale * scores[group]
    return Scores(total, all(scores.of_loss for scores in found.values()))


@dataclass(frozen=True)
class _Period:
    """A period that has begun: what is decided, and still to be trained."""

    number: int
    """From 1 on; 0 is the warm-up, about which nothing is decided."""
    removed: Removed
    """Units that earlier periods drove to zero."""
    chosen: Removed
    """These, and the units that go in this one."""
    scores: Scores


class _Book:
    """Keeps the beginning of the current period on disk; within it, the Trainer's checkpoints say how far it came.

    Those of its last step are there until the next period has begun, as scoring for that one takes time.
    """

    def __init__(self, task: PruningTask) -> None:
        self.task = task
        self.folder = task.work
        self.log: list[dict[str, Any]] = []

    def checkpoints(self, period: int) -> Path | None:
        """Folder of the Trainer's checkpoints in this period."""
        return None if self.folder is None else self.folder / f"training-{period}"

    def keep(self, begun: _Period, weights_changed: bool) -> None:
        """Write weights, then the note that names them: a kill in between leaves the older pair valid."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = begun.number
        if weights_changed:
            with whole(self.folder / f"weights-{number}.safetensors") as scratch:
                save_model(self.task.model, str(scratch))
        with whole(self.folder / f"scores-{number}.safetensors") as scratch:
            save_file(dict(begun.scores.values), scratch)
        facts = {"number": number, "removed": begun.removed, "chosen": begun.chosen, "of_loss": begun.scores.of_loss}
        note = json.dumps({**facts, "weights_changed": weights_changed, "log": self.log})
        write_whole(self.folder / "period.json", note)
        for name in ("weights", "scores"):
            (self.folder / f"{name}-{number - 1}.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.folder / f"training-{number - 1}", ignore_errors=True)

    def restore(self) -> _Period | None:
        """The period that had begun, with the task's model as it was then; None when there is none, or when what was
        kept of it is damaged: then nothing of the earlier run stays, and the method begins anew."""
        if self.folder is None or not (self.folder / "period.json").exists():
            return None
        try:
            note = read_json(self.folder / "period.json")
            number = note["number"]
            scores = Scores(load_file(self.folder / f"scores-{number}.safetensors"), note["of_loss"])
            if note["weights_changed"]:
                load_model(self.task.model, str(self.folder / f"weights-{number}.safetensors"))
        except (InputError, SafetensorError, OSError, KeyError, TypeError) as error:
            if out_of_memory(error):
                raise
            progress.say(f"  What an earlier run kept in {self.folder} is damaged: the method begins anew.")
            remove(self.folder)
            return None
        self.log = note["log"]
        progress.say(f"  resuming in period {number}")
        return _Period(number, note["removed"], note["chosen"], scores)
