"""GISP (arXiv 2510.18030): many small cuts without training, with new scores before each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from secateur import progress
from secateur.keeping import keep_tensors, take_tensors
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.planning import Problem, by_period, extend, removed_before, solve
from secateur.surgery import masked
from secateur.types import Cut, Removed, Scores, Settings
from secateur.walk import Calibration, calibration_for

Tensors = dict[str, torch.Tensor]
"""Group name → one number a unit, ``[size]``."""


class GISPSettings(Settings):
    """The cuts, the criteria that rank units before each, and the text that a cut reads."""

    cuts: int = Field(default=24, ge=1)
    """Number of equal cuts. The paper has 112 for models of 7B and 8B, and 280 for 13B."""
    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria with their weights, as in lorashear. The paper's is ``taylor``."""
    windows: int | None = Field(default=8, ge=1)
    """Calibration windows that each cut reads: the next ones, and after the last the first again. null: all of them
    before every cut."""
    moving_average: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Weight of the scores of earlier cuts: scores = this · earlier ones + (1 − this) · new ones. 0: new ones only."""


class GISP(Method):
    """Removes a little, scores what is left, and removes again, until the ratio is reached.

    ::

        budget: {ratio: 0.2}
        method: {name: gisp, cuts: 24, saliency: {fisher: 1.0}, windows: 8}
    """

    name: ClassVar[str] = "gisp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.18030"
    summary: ClassVar[str] = "many small cuts without training, each by new scores; one run orders all smaller ratios"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = GISPSettings
    settings: GISPSettings

    @property
    def ranks(self) -> bool:
        """See ``Method.ranks``."""
        return True

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: new scores before each cut."""
        settings = self.settings
        once = Saliency(settings.saliency).reading
        if settings.windows is None:
            return TextRead(forward=settings.cuts * once.forward, gradient=settings.cuts * once.gradient)
        windows = settings.cuts * settings.windows
        return TextRead(forward_windows=int(windows * once.forward), gradient_windows=int(windows * once.gradient))

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``. The scores are an order of removal (``planning.order``)."""
        self.check(task)
        settings, text = self.settings, calibration_for(task.calibration, self.name)
        saliency, cuts = Saliency(settings.saliency), Cuts(task.work)
        for number in range(cuts.done, settings.cuts):
            progress.say(f"  cut {number + 1} of {settings.cuts}")
            removed = removed_before(cuts.order, number)
            cuts.average = self._scores(task, saliency, removed, text.turn(number, settings.windows), cuts.average)
            problem = Problem.of(task.restricted, Scores(cuts.average, of_loss=True), task.budget, removed)
            last = number == settings.cuts - 1
            chosen = solve(problem, None if last else by_period(number, settings.cuts) * task.budget.ratio)
            cuts.keep(number + 1, extend(cuts.order, problem, chosen, number))
        scores = Scores(cuts.order, on_one_scale=True, reach=task.budget.ratio)
        read = text.turn(0, settings.windows).ids.numel()
        facts = {"cuts": settings.cuts, "calibration_tokens": settings.cuts * read}
        return Decision(removed_before(cuts.order, settings.cuts), scores, metrics=facts)

    def _scores(
        self,
        task: PruningTask,
        saliency: Saliency,
        removed: Removed,
        text: Calibration,
        earlier: Mapping[str, torch.Tensor],
    ) -> Tensors:
        """Scores of the model without ``removed``, averaged with the ``earlier`` ones; 0 for removed units."""
        found = {}
        with masked(task.model, task.graph, Cut.removing(task.graph, removed)):
            for name, criterion in saliency.criteria.items():
                scores = criterion.score(task.model, task.restricted, text, task.seed)
                found[name] = Scores({group: _without(scores[group], removed.get(group)) for group in scores})
        new = saliency.scores(task, found, task.seed).values
        old = self.settings.moving_average if earlier else 0.0
        return {group: old * earlier.get(group, 0.0) + (1 - old) * scores for group, scores in new.items()}

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: the criteria can read every group, and read no adapters."""
        super().check(task)
        Saliency(self.settings.saliency).check_plain(task, self.name)


def _without(scores: torch.Tensor, units: list[int] | None) -> torch.Tensor:
    return scores if not units else scores.index_fill(0, torch.tensor(units), 0.0)


class Cuts:
    """The cuts that are done, kept on disk after each one when there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / "cuts.safetensors"
        self.done: int
        tensors, self.done = take_tensors(self.file) or ({}, 0)
        self.order = _part("order/", tensors)
        """See ``planning.extend``."""
        self.average = _part("average/", tensors)
        """The scores of the last cut."""
        if self.done:
            progress.say(f"  resuming after cut {self.done}")

    def keep(self, done: int, order: Tensors) -> None:
        """Note that ``done`` cuts are done, with the order that they give."""
        self.done, self.order = done, order
        parts = {"order/": order, "average/": self.average}
        tensors = {f"{part}{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        keep_tensors(self.file, tensors, done)


def _part(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
