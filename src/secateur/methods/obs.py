"""Optimal brain surgery on whole units: ZipLM's and SlimGPT's removal, sequential, with exact compensation."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from secateur.compensation import EVERY, Target, check_removable, remove_and_compensate
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.types import Settings


class OBSSettings(Settings):
    """The criteria that divide the budget among the groups, and the target of the refit."""

    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria with their weights, as in lorashear. They determine how many units each group loses, not which ones."""
    target: Target = "dense"
    """See ``recovery.repair_target``."""
    swaps: int = Field(default=0, ge=0)
    """Most tries in each group to exchange removed units for others after the removal, as in OSSCAR, which has 20."""


class OBS(Method):
    """Removes the units for which the others can compensate best, and keeps the compensated weights.

    ::

        budget: {ratio: 0.2}
        method: {name: obs, saliency: {fisher: 1.0}}
        calibration: {tokens: 65536}
    """

    name: ClassVar[str] = "obs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.04089"
    summary: ClassVar[str] = "one shot: units for which other weights can compensate, layer by layer (ZipLM, SlimGPT)"
    needs: ClassVar[MethodNeeds] = "text"
    fewest_windows: ClassVar[int] = EVERY
    Settings: ClassVar[type[Settings]] = OBSSettings
    settings: OBSSettings

    @property
    def compensates(self) -> bool:
        """See ``Method.compensates``."""
        return True

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: scores, and ``remove_and_compensate``, whose passes depend on how many groups lose
        units."""
        start = Saliency(self.settings.saliency).reading
        return replace(start, forward=start.forward + (2.5 if self.settings.target == "own" else 4.5))

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        scores = Saliency(self.settings.saliency).scores(task, {}, task.seed)
        counts = {name: len(units) for name, units in task.allocate(scores).items()}
        target, swaps = self.settings.target, self.settings.swaps
        removed, found = remove_and_compensate(task.model, task.restricted, counts, task.calibration, target, swaps)
        return Decision(removed, scores, found.updates, found.facts)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: one linear consumes every group, layers run in order, no criterion needs adapters."""
        super().check(task)
        Saliency(self.settings.saliency).check_plain(task, self.name)
        names = [group.name for group in task.prunable]
        check_removable(task.model, task.restricted, names, target=self.settings.target)
