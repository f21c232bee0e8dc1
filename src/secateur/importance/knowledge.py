"""Knowledge distribution analysis (LoRAShear, arXiv 2310.18356, Algorithm 3): the sensitivity of each node group.

Each node group is cut alone, at each of a few ratios, by masking. The change of the predictions is its sensitivity. A
cut in layer l does not change anything before l. The hidden states at the input of l are therefore kept, a trial runs
layer l under its mask, and all trials of a layer run through the rest of the model as one batch (``LayerStack``). Only
the states of one layer are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from secateur.analysis import Trial
from secateur.errors import InputError, ModelError
from secateur.progress import Bar, say
from secateur.surgery import masked
from secateur.token_loss import LogitReader, Reading
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.walk import Calibration, LayerStack, Walker, borrowed, calibration_for, input_device


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

    Memory beside the model: the dense model's last hidden states, and the hidden states of the trials of one layer. The
    dense model's predictions are computed from the former again for each batch of trials.

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
        self.reader = text.reader(model)
        self.reference = _Reference(self.reader, text)

    def try_out(self, chosen: Sequence[TrialCut], layer: int) -> list[tuple[float, float]]:
        """Loss and KL of trials that change nothing before ``layer``."""
        totals = torch.zeros(len(chosen), 2, dtype=torch.float64)
        walker = self.walker
        if walker is None or not all(walker.stack.inside(cut.group) for cut in chosen):
            for number, cut in enumerate(chosen):
                with masked(self.model, self.graph, cut.plan):
                    numbers = [number] * len(self.text)
                    self.text.read(self.reader, partial(self._add, totals, numbers, range(len(self.text))))
                self.bar.advance(len(walker.stack) if walker is not None else 1, note=cut.group.name)
        else:
            self._from_layer(chosen, layer, walker, totals)
        return [(loss, kl) for loss, kl in (totals / self.reference.tokens).tolist()]

    def _from_layer(self, chosen: Sequence[TrialCut], layer: int, walker: Walker, totals: torch.Tensor) -> None:
        """Run the layers after ``layer`` for all trials and windows; those of one window follow each other."""
        walker.go_to(layer)
        after = [self._after_the_cut(cut, walker) for cut in chosen]
        pairs = [(number, row) for row in range(len(self.text)) for number in range(len(chosen))]
        done, batch_size = 0, self.text.batch_size
        for start in range(0, len(pairs), batch_size):
            numbers, rows = zip(*pairs[start : start + batch_size], strict=True)
            states = torch.stack([after[number][row] for number, row in zip(numbers, rows, strict=True)])
            with self.text.autocast(self.model):
                use = partial(self._add, totals, numbers, rows)
                walker.stack.read(self.reader, self.text.ids[list(rows)], use, layer + 1, states)
            now = (start + len(rows)) * (len(walker.stack) - layer) // len(self.text)
            self.bar.advance(now - done, note=chosen[numbers[-1]].group.name)
            done = now

    def _after_the_cut(self, cut: TrialCut, walker: Walker) -> torch.Tensor:
        """Hidden states after the layer of the cut, which runs under its mask: ``[windows, window, hidden]``."""
        with masked(self.model, self.graph, cut.plan):
            return torch.cat(walker.through())

    def _add(
        self,
        totals: torch.Tensor,
        numbers: Sequence[int],
        rows: Sequence[int],
        some: slice,
        here: slice,
        logits: torch.Tensor,
    ) -> None:
        """Add loss and KL of a piece to those of its trials; ``numbers`` and ``rows`` of each window that is read."""
        found = self.reference.compare(rows[some], here, logits)
        totals.index_add_(0, torch.tensor(numbers[some]), found)


class _Reference:
    """The dense model's predictions, computed from its last hidden states when they are needed; and its loss.

    Of a model that cannot be split, the logits are kept, on the CPU.
    """

    def __init__(self, reader: LogitReader, text: Calibration) -> None:
        self._ids = text.ids
        self.tokens = self._ids[:, 1:].numel()
        self._places: list[tuple[Reading, int]] = []
        """For each window, the pass that read it, and its place there."""
        loss, device = 0.0, input_device(reader.model)
        for ids in text.batches():
            for rows in reader.passes(len(ids)):
                with text.autocast(reader.model), torch.no_grad():
                    reading = reader.start(ids[rows].to(device))
                    for here, logits in reading.read():
                        targets = ids[rows, here.start + 1 : here.stop + 1].flatten().to(logits.device)
                        losses = cross_entropy(logits.flatten(0, 1), targets, reduction="none")
                        loss += float(losses.sum(dtype=torch.float64))
                if reader.split is None:
                    reading = replace(reading, states=reading.states.cpu())
                self._places += [(reading, place) for place in range(len(ids[rows]))]
        self.loss = loss / self.tokens

    def compare(self, rows: Sequence[int], here: slice, logits: torch.Tensor) -> torch.Tensor:
        """Summed loss and KL(dense || these) at some positions of each window, float64 ``[n, 2]``.

        KL = sum p log p - sum p z + logsumexp z, with p of the dense model and z the logits, fp32
        ``[n, positions, vocabulary]``. ``rows``: numbers of the windows. Call it in the context of a pass.
        """
        found = torch.zeros(len(rows), 2, dtype=torch.float64)
        dense: tuple[int, torch.Tensor, float] | None = None
        for index, (row, z) in enumerate(zip(rows, logits, strict=True)):
            if dense is None or dense[0] != row:
                dense = row, *self._predicted(row, here, z.device)
            _, p, negentropy = dense
            norm = z.logsumexp(-1, keepdim=True)
            targets = self._ids[row, here.start + 1 : here.stop + 1, None].to(z.device)
            found[index, 0] = float((norm - z.gather(1, targets)).sum(dtype=torch.float64))
            found[index, 1] = float((norm - (p * z).sum(-1, keepdim=True)).sum(dtype=torch.float64)) + negentropy
        return found

    def _predicted(self, row: int, here: slice, device: torch.device) -> tuple[torch.Tensor, float]:
        """Probabilities ``[positions, vocabulary]``, and the sum of p log p."""
        reading, place = self._places[row]
        with torch.no_grad():
            log_p = reading.at(here, slice(place, place + 1))[0].to(device).float().log_softmax(-1)
            p = log_p.exp()
            return p, float((p * log_p).sum(dtype=torch.float64))
