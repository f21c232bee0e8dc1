"""LoRAShear (arXiv 2310.18356): progressive structured pruning guided by LoRA, Algorithm 4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file, load_model, save_file, save_model

from secateur import progress
from secateur.graph import trace
from secateur.importance import CRITERIA
from secateur.methods.base import Decision, MethodNeeds, PruningTask, score
from secateur.methods.lhspg import LHSPGCallback, Projection
from secateur.planning import allocate, by_period
from secateur.surgery import zero_units
from secateur.training import Schedule, attach_lora, merge_lora, train
from secateur.types import Scores, Settings, removed_to_kept

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
    """ε of the half-space projection: bigger zeroes earlier; unused with ``decay``."""
    schedule: Schedule = "constant"
    """Learning-rate schedule inside a period; recovery, which ends the training, has ``training.schedule``."""
    saliency: dict[str, float] = Field(default={"fisher": 1.0}, min_length=1)
    """Criteria that rank the units anew in every period, with their weights."""

    @property
    def training_steps(self) -> int:
        """Optimiser steps before the cut."""
        return self.warmup_steps + self.periods * self.period_steps

    @field_validator("saliency")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        # the adapters start anew in every period, so that there is nothing in their gradients yet when it scores
        known = [name for name, criterion in CRITERIA.items() if criterion.needs != "adapters"]
        if not set(value) <= set(known) or min(value.values()) <= 0:
            raise ValueError(f"give positive weights to some of {', '.join(known)}")
        return value


class LoRAShear:
    """Train LoRA in periods; in each, score, choose the next units, and shrink them to zero while the rest learns."""

    name: ClassVar[str] = "lorashear"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.18356"
    summary: ClassVar[str] = "progressive: LoRA learns what redundant units did while LHSPG drives them to zero"
    needs: ClassVar[MethodNeeds] = "training"
    Settings: ClassVar[type[Settings]] = LoRAShearSettings

    def __init__(self, settings: LoRAShearSettings | None = None) -> None:
        self.settings = settings or LoRAShearSettings()

    def run(self, task: PruningTask) -> Decision:
        """Algorithm 4. Changes the weights of ``task.model`` in place, not their shapes; the units that go are zero."""
        settings = self.settings
        history = _History(task)
        removed, first, scores = history.restore()
        if first == 0 and settings.warmup_steps:
            history.log += self._train(task, {}, {}, settings.warmup_steps, seed=task.seed, description="warming up")
        for period in range(first, settings.periods):
            scores = _saliency(task, settings.saliency, seed=task.seed + period)
            share = by_period(period, settings.periods)
            chosen = allocate(task.graph, scores, task.budget, removed, ratio=share * task.budget.ratio)
            redundant = {name: sorted(set(units) - set(removed.get(name, ()))) for name, units in chosen.items()}
            description = f"period {period + 1}/{settings.periods}"
            seed = task.seed + 1 + period
            steps = settings.period_steps
            history.log += self._train(task, redundant, removed, steps, seed=seed, description=description)
            removed = chosen
            zero_units(task.model, task.graph, removed_to_kept(task.graph, removed))
            history.keep(removed, period + 1, scores)
        return Decision(removed=removed, scores=scores, metrics={"training": history.log})

    def _train(
        self, task: PruningTask, redundant: Removed, gone: Removed, steps: int, *, seed: int, description: str
    ) -> list[dict[str, Any]]:
        """One period: fresh adapters and optimiser, training under the projection, the merge, and the log of it."""
        assert task.training_blocks is not None
        adapted = attach_lora(task.model, task.lora, seed)
        projection = LHSPGCallback(
            trace(adapted),
            redundant,
            gone,
            steps=steps,
            mode=self.settings.projection,
            epsilon=self.settings.epsilon,
        )
        log = train(
            adapted,
            task.training_blocks.ids,
            task.training.model_copy(update={"schedule": self.settings.schedule}),
            steps=steps,
            seed=seed,
            description=description,
            callbacks=[projection],
        )
        merge_lora(adapted)
        entries = [{"stage": description, **entry} for entry in log]
        for entry in entries:
            task.log(entry)
        return entries


def _saliency(task: PruningTask, weights: Mapping[str, float], seed: int) -> Scores:
    """Weighted sum of criteria, each divided by its L2 norm over all groups so that none drowns the others (HESSO)."""
    total: dict[str, torch.Tensor] = {}
    of_loss = True
    for name, weight in weights.items():
        scores = score(task, CRITERIA[name], seed)
        of_loss &= scores.of_loss
        norm = torch.stack([scores[group].double().square().sum() for group in scores]).sum().sqrt()
        scale = weight / float(norm) if norm > 0 else weight
        for group in scores:
            total[group] = total.get(group, torch.zeros(())) + scale * scores[group]
    return Scores(total, of_loss)


class _History:
    """Keeps the state after every period on disk, so that an interrupted run goes on with the next one."""

    def __init__(self, task: PruningTask) -> None:
        self.task = task
        self.folder = task.work
        self.log: list[dict[str, Any]] = []

    def keep(self, removed: Removed, periods_done: int, scores: Scores) -> None:
        """Write weights, then the note that names them: a kill in between leaves the older pair valid."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = self.folder / f"period-{periods_done}.safetensors"
        save_model(self.task.model, str(weights))
        save_file(dict(scores.values), self.folder / f"scores-{periods_done}.safetensors")
        note = self.folder / "periods.json.tmp"
        note.write_text(json.dumps({"removed": removed, "periods": periods_done, "log": self.log}))
        note.rename(self.folder / "periods.json")
        for name in ("period", "scores"):
            (self.folder / f"{name}-{periods_done - 1}.safetensors").unlink(missing_ok=True)

    def restore(self) -> tuple[Removed, int, Scores | None]:
        """Load the last finished period into the task's model; ``({}, 0, None)`` when there is none."""
        if self.folder is None or not (self.folder / "periods.json").exists():
            return {}, 0, None
        note = json.loads((self.folder / "periods.json").read_text())
        self.log = note["log"]
        load_model(self.task.model, str(self.folder / f"period-{note['periods']}.safetensors"))
        progress.say(f"  resuming after period {note['periods']}")
        scores = Scores(load_file(self.folder / f"scores-{note['periods']}.safetensors"))
        return note["removed"], note["periods"], scores
