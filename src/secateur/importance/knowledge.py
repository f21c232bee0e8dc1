"""Knowledge distribution analysis (LoRAShear, arXiv 2310.18356, Algorithm 3): the sensitivity of each node group.

Each node group is cut alone, at each of a few ratios, by masking. The change of the predictions is its sensitivity. A
cut in layer l does not change anything before l. The hidden states at the input of l are therefore kept, a trial runs
layer l under its mask, and all trials of a layer run through the rest of the model as one batch (``LayerStack``). Only
the states of one layer are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.analysis import Trial
from secateur.errors import InputError, ModelError
from secateur.progress import Bar, say
from secateur.surgery import masked
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.walk import Calibration, LayerStack, Walker, borrowed, calibration_for

_POSITIONS_PER_CHUNK = 512  # fp32 logits of so many positions at a time


@dataclass(frozen=True)
class TrialCut:
    """A trial to run: the kept units of one group."""

    group: NodeGroup
    ratio: float
    kept: tuple[int, ...]

    def trial(self, loss: float, kl: float) -> Trial:
        group = self.group
        return Trial(
            group=group.name,
            kind=group.kind,
            layer=group.layer,
            ratio=self.ratio,
            units=group.size,
            removed=self.made[1],
            loss=loss,
            kl=kl,
        )

    @property
    def made(self) -> tuple[str, int]:
        """The group, and the number of units to remove. In small groups several ratios give the same number."""
        return self.group.name, self.group.size - len(self.kept)

    @property
    def plan(self) -> dict[str, list[int]]:
        return {self.group.name: list(self.kept)}


def cuts(graph: DependencyGraph, scores: Scores, ratios: Sequence[float]) -> list[TrialCut]:
    """Every trial of Alg. 3, in model order: the lowest-scored ``ratio`` of each prunable group inside a layer.

    A ratio that is named twice counts once. A group without a removable unit has no trial. Raises InputError for ratios
    that are not strictly between 0 and 1, or when there is no trial.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise InputError(
            f"Ratios of an analysis must be strictly between 0 and 1, such as 0.25,0.5; got {list(ratios)}."
        )
    groups = [group for group in graph.prunable if group.size > group.least and group.layer is not None]
    if not groups:
        raise InputError(
            "There is nothing to analyse: no layer has a prunable group with a unit that can be removed. `secateur "
            "inspect` shows the groups, and why the others are protected."
        )
    found = []
    for group in groups:
        order = group.in_turn(scores[group.name].argsort(stable=True).tolist())
        for ratio in sorted(set(ratios)):
            goes = min(max(1, round(ratio * group.size / group.runs)) * group.runs, group.size - group.least)
            found.append(TrialCut(group, ratio, tuple(sorted(order[goes:]))))
    return found


def measure_cuts(
    model: nn.Module,
    graph: DependencyGraph,
    calibration: Calibration | None,
    chosen: Sequence[TrialCut],
    *,
    cached: bool = True,
    done: Sequence[Trial] = (),
    keep: Callable[[list[Trial]], None] | None = None,
) -> tuple[float, list[Trial]]:
    """Loss and KL of every trial. The model is restored bit by bit, also after an exception.

    Trials of a group with the same number of units are run once.

    Memory beside the model, on the CPU: the dense model's probabilities, tokens x vocabulary in fp32 (0.8 GB for 4,096
    tokens and a vocabulary of 49,152), and the hidden states of the trials of one layer.

    Args:
        calibration: text; every token but the first of a window is predicted. A pass has ``batch_size`` windows, of one
            trial or of several.
        cached: run only the layers after the cut. Where the layers are no plain stack (``LayerStack.find``), every
            trial runs the whole model, with a message. False always runs the whole model, as the reference.
        done: trials of an earlier, interrupted call, which are not run again.
        keep: called with all trials so far whenever those of a layer are finished.

    Returns:
        The dense model's loss, and the trials in the order of ``chosen``.

    Raises:
        ModelError: a loss or a KL is not finite, which cannot be ranked. The dense model's loss is checked before the
            first trial.
    """
    text = calibration_for(calibration, "analyze")
    finished = {(trial.group, trial.removed): (trial.loss, trial.kl) for trial in done}
    once = list({cut.made: cut for cut in chosen}.values())
    stack = _stack(model, graph) if cached else None
    with borrowed(model), Bar("analysing", _passes(once, stack)) as bar:
        run = _Run(model, graph, text, stack, bar)
        if not math.isfinite(run.reference.loss):
            raise ModelError(
                f"The model's own loss on the calibration text is {run.reference.loss}, and no cut can be compared "
                "with it. Set calibration.precision=fp32. If that does not help, its weights are damaged."
            )
        for layer, together in _by_layer(once, stack):
            waiting = [cut for cut in together if cut.made not in finished]
            bar.advance(_passes(together, stack) - _passes(waiting, stack))
            if not waiting:
                continue
            for cut, measured in zip(waiting, run.try_out(waiting, layer), strict=True):
                if not all(map(math.isfinite, measured)):
                    raise ModelError(
                        f"Without {cut.made[1]} of the {cut.group.size} units of {cut.group.name} the model's loss is "
                        f"{measured[0]} and its KL {measured[1]}, which cannot be ranked. Set "
                        "calibration.precision=fp32, other --ratios or another --criterion."
                    )
                finished[cut.made] = measured
            if keep is not None:
                keep([cut.trial(*finished[cut.made]) for cut in chosen if cut.made in finished])
    return run.reference.loss, [cut.trial(*finished[cut.made]) for cut in chosen]


def _stack(model: nn.Module, graph: DependencyGraph) -> LayerStack | None:
    try:
        return LayerStack.find(model, graph)
    except ModelError as error:
        say(f"{error} Every trial runs the whole model, which takes about twice as long.")
        return None


def _start(cut: TrialCut, stack: LayerStack | None) -> int:
    """The first layer that a cut changes."""
    return (cut.group.layer or 0) if stack is not None and stack.inside(cut.group) else 0


def _by_layer(chosen: Iterable[TrialCut], stack: LayerStack | None) -> Iterator[tuple[int, list[TrialCut]]]:
    together: dict[int, list[TrialCut]] = {}
    for cut in chosen:
        together.setdefault(_start(cut, stack), []).append(cut)
    yield from sorted(together.items())


def _passes(chosen: Iterable[TrialCut], stack: LayerStack | None) -> int:
    """Number of layers to run for these trials, for the progress bar; whole passes where there is no stack."""
    return sum(len(stack) - _start(cut, stack) if stack is not None else 1 for cut in chosen)


class _Run:
    """The text, the dense model's predictions for it, and the hidden states at the input of the current layer."""

    def __init__(
        self, model: nn.Module, graph: DependencyGraph, text: Calibration, stack: LayerStack | None, bar: Bar
    ) -> None:
        self.model, self.graph, self.text, self.bar = model, graph, text, bar
        self.walker = None if stack is None else Walker(stack, text)
        self.reference = _Reference(zip(text.batches(), text.logits(model), strict=True))

    def try_out(self, chosen: Sequence[TrialCut], layer: int) -> list[tuple[float, float]]:
        """Loss and KL of trials that change nothing before ``layer``."""
        totals = torch.zeros(len(chosen), 2, dtype=torch.float64)
        for number, row, logits in self._answers(chosen, layer):
            totals[number] += self.reference.compare(row, self.text.ids[row], logits)
        return [(loss, kl) for loss, kl in (totals / self.reference.tokens).tolist()]

    def _answers(self, chosen: Sequence[TrialCut], layer: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(number of the trial, window, logits ``[window, vocabulary]``) for all trials and windows."""
        walker = self.walker
        if walker is None or not all(walker.stack.inside(cut.group) for cut in chosen):
            for number, cut in enumerate(chosen):
                with masked(self.model, self.graph, cut.plan):
                    rows = (found for logits in self.text.logits(self.model) for found in logits)
                    yield from ((number, row, found) for row, found in enumerate(rows))
                self.bar.advance(len(walker.stack) if walker is not None else 1, note=cut.group.name)
            return
        walker.go_to(layer)
        after = [self._after_the_cut(cut, walker) for cut in chosen]
        pairs = [(number, row) for number in range(len(chosen)) for row in range(len(self.text))]
        done, batch_size = 0, self.text.batch_size
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            states = torch.stack([after[number][row] for number, row in some])
            with self.text.autocast(self.model):
                logits = walker.stack.logits(self.text.ids[[row for _, row in some]], layer + 1, states)
            yield from ((number, row, found) for (number, row), found in zip(some, logits, strict=True))
            now = (start + len(some)) * (len(walker.stack) - layer) // len(self.text)
            self.bar.advance(now - done, note=chosen[some[-1][0]].group.name)
            done = now

    def _after_the_cut(self, cut: TrialCut, walker: Walker) -> torch.Tensor:
        """Hidden states after the layer of the cut, which runs under its mask: ``[windows, window, hidden]``."""
        with masked(self.model, self.graph, cut.plan):
            return torch.cat(walker.through())


class _Reference:
    """The dense model's predictions: probabilities for every predicted token, their entropy, and the loss."""

    def __init__(self, answers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``answers``: windows ``[n, window]`` with their logits ``[n, window, vocabulary]``, in order."""
        self._probabilities: list[torch.Tensor] = []
        self._negentropy: list[float] = []
        loss, self.tokens = 0.0, 0
        for ids, logits in answers:
            for row, found in zip(ids, logits, strict=True):
                log_p = torch.cat(
                    [part.float().log_softmax(-1).cpu() for part in found[:-1].split(_POSITIONS_PER_CHUNK)]
                )
                probabilities = log_p.exp()
                self._negentropy.append(float((probabilities * log_p).sum(dtype=torch.float64)))
                self._probabilities.append(probabilities)
                loss -= float(log_p.gather(1, row[1:, None]).sum(dtype=torch.float64))
                self.tokens += len(row) - 1
        self.loss = loss / self.tokens

    def compare(self, row: int, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Summed loss and KL(dense || these) of one window, float64 ``[2]``.

        KL = sum p log p - sum p z + logsumexp z, with p of the dense model and z the logits ``[window, vocabulary]``.
        """
        loss, kl = 0.0, self._negentropy[row]
        parts = (
            tensor.split(_POSITIONS_PER_CHUNK) for tensor in (logits[:-1], self._probabilities[row], ids[1:, None])
        )
        for some, probabilities, targets in zip(*parts, strict=True):
            z = some.float()
            norm = z.logsumexp(-1, keepdim=True)
            loss += float((norm - z.gather(1, targets.to(z.device))).sum(dtype=torch.float64))
            kl += float((norm - (probabilities.to(z.device) * z).sum(-1, keepdim=True)).sum(dtype=torch.float64))
        return torch.tensor([loss, kl], dtype=torch.float64)
