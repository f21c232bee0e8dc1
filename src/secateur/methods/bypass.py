"""Bypass back-propagation (arXiv 2406.10576): the probability to keep each unit, learnt from losses of random masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from secateur import progress
from secateur.evaluation import Divergence
from secateur.keeping import keep_tensors, take_tensors
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.planning import Problem, ranking
from secateur.surgery import InputGates
from secateur.types import Scores, Settings
from secateur.walk import borrowed, calibration_for

_SHARPNESS = 12.0
"""Slope of the first probabilities over the rank of a unit (0 to 1)."""
_FADING = 0.8
"""Weight of earlier losses in the baseline."""
_EPSILON = 1e-7
_KEEP_EVERY = 10
"""Steps between two files of the state."""


class BypassSettings(Settings):
    """The criteria of the first probabilities, and the steps of the policy gradient."""

    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria with their weights, as in lorashear. Their ranking gives the first probabilities."""
    steps: int = Field(default=300, ge=1)
    """Number of steps, each with two masks. The paper has 15,000."""
    windows: int = Field(default=1, ge=1)
    """Calibration windows that both masks of a step read: the next ones, and after the last the first again. The paper
    has 8 of 128 tokens."""
    learning_rate: float = Field(default=0.02, gt=0)
    """It falls to 0 as a cosine. The paper has 0.002 for 15,000 steps."""


class Bypass(Method):
    """Learns the probability to keep each unit by policy gradient: forward passes of random masks, no gradients.

    ::

        budget: {ratio: 0.2}
        method: {name: bypass, steps: 300}
    """

    name: ClassVar[str] = "bypass"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10576"
    summary: ClassVar[str] = "probabilities to keep units, learnt from the KL of random masks by forward passes alone"
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = BypassSettings
    settings: BypassSettings

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: scores for the start, the dense model once, and two masks in each step."""
        settings, start = self.settings, Saliency(self.settings.saliency).reading
        return replace(start, forward=start.forward + 1, forward_windows=2 * settings.steps * settings.windows)

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``. The scores are the probabilities."""
        self.check(task)
        settings, text = self.settings, calibration_for(task.calibration, self.name)
        policy = Policy(task.work)
        ranks = _ranks(task, Saliency(settings.saliency).first_scores(task))
        units = _Units(task)
        if policy.s is None:
            policy.s = units.meeting(_SHARPNESS * ranks, torch.sigmoid)
        divergence = Divergence(text)
        with borrowed(task.model), InputGates(task.model, task.restricted, units.names) as gates:
            for step in progress.track(range(policy.done, settings.steps), "searching", settings.steps - policy.done):
                rows = text.turn_rows(step, settings.windows)
                gates.set(None)
                divergence.read(task.model, rows)
                masks, losses = antithetic(policy.s, task.seed, step), []
                for mask in masks:
                    gates.set(units.split(mask.to(task.model.device)))
                    losses.append(divergence.of(task.model, rows))
                rate = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
                gradient = policy.gradient(masks, losses)
                policy.s = units.meeting(policy.s - rate * gradient, lambda s: s.clamp(0, 1))
                policy.keep(step + 1, last=settings.steps)
        scores = Scores(units.split((policy.s + 1e-3 * ranks).float()), on_one_scale=True)
        tokens = 2 * settings.steps * len(text.turn_rows(0, settings.windows)) * text.ids.shape[1]
        return Decision(task.allocate(scores), scores, metrics={"steps": settings.steps, "search_tokens": tokens})

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: linears consume every group, and no criterion needs adapters."""
        super().check(task)
        Saliency(self.settings.saliency).check_plain(task, self.name)
        with InputGates(task.model, task.restricted, [group.name for group in task.prunable]):
            pass


def _ranks(task: PruningTask, scores: Scores) -> torch.Tensor:
    """``[units of all groups]``: the place of each unit in the ranking of all, from 0 to 1."""
    places = torch.cat(list(ranking(Problem.of(task.restricted, scores, task.budget)).values()))
    return torch.linspace(0, 1, len(places), dtype=torch.float64)[places]


def antithetic(s: torch.Tensor, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks of zeros and ones, each Bernoulli(s), from mirrored uniform numbers; float32."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(len(s), dtype=torch.float64, generator=draw)
    return (uniform < s).float(), (1 - uniform < s).float()


class _Units:
    """All units in a row, with the parameters of each."""

    def __init__(self, task: PruningTask) -> None:
        graph = task.restricted
        groups = task.prunable
        self.names = [group.name for group in groups]
        self._sizes = [group.size for group in groups]
        cost = [graph.unit_cost(group) for group in groups]
        self._cost = torch.repeat_interleave(torch.tensor(cost, dtype=torch.float64), torch.tensor(self._sizes))
        self._kept = float(self._cost.sum()) - task.budget.ratio * graph.parameter_count()

    def split(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[units of all groups]`` by group."""
        return dict(zip(self.names, values.split(self._sizes), strict=True))

    def meeting(self, values: torch.Tensor, squash: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``squash(values − v)``, with the v with which the expected number of parameters meets the budget.

        With a clamp to [0, 1] it is the projection in the norm that weights each unit by its parameters.
        """
        low, high = float(values.min()) - 50, float(values.max()) + 50
        for _ in range(80):
            middle = (low + high) / 2
            too_many = float((self._cost * squash(values - middle)).sum()) > self._kept
            low, high = (middle, high) if too_many else (low, middle)
        return squash(values - high)


class Policy:
    """The probabilities and the baseline, kept on disk every few steps when there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / "policy.safetensors"
        tensors, facts = take_tensors(self.file) or ({}, {"done": 0, "baseline": None})
        self.s = tensors.get("s")
        """``[units of all groups]``, float64: the probability to keep each unit."""
        self.baseline: float | None = facts["baseline"]
        self.done: int = facts["done"]
        if self.done:
            progress.say(f"  resuming after step {self.done}")

    def gradient(self, masks: Sequence[torch.Tensor], losses: Sequence[float]) -> torch.Tensor:
        """``Σ (L − b) (m − s) / √((s + ε)(1 − s + ε))`` over both masks; 0 when a loss is not finite.

        The baseline b is the fading mean of the losses, these included.
        """
        assert self.s is not None
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            return torch.zeros_like(self.s)
        self.baseline = mean if self.baseline is None else _FADING * self.baseline + (1 - _FADING) * mean
        scale = ((self.s + _EPSILON) * (1 - self.s + _EPSILON)).sqrt()
        total = torch.zeros_like(self.s)
        for mask, loss in zip(masks, losses, strict=True):
            total += (loss - self.baseline) * (mask - self.s) / scale
        return total / (len(masks) - 1)

    def keep(self, done: int, last: int) -> None:
        """Note that ``done`` of ``last`` steps are done; the state goes to disk every few steps."""
        self.done = done
        if done % _KEEP_EVERY == 0 or done == last:
            assert self.s is not None
            keep_tensors(self.file, {"s": self.s}, {"done": done, "baseline": self.baseline})
