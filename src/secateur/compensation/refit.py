"""Repair in closed form, layer by layer: each consumer is refitted on the pruned and refitted layers before it.

Four windows of five are fitted to, and the fifth says how far to go (``gram.solve_refit``). The first positions of a
window are left out: attention sinks have activations a hundred times as large as all other tokens, and would dominate
the fit. (Reconstruction after pruning: SlimGPT, FLAP and others; docs/recovery.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.compensation.gram import Gram, Solution, solve_refit
from secateur.compensation.guard import EVERY, SKIPPED, Guarded, Target, check_inside, guarded, text_for
from secateur.compensation.obs import removed_units
from secateur.compensation.stream import check_adds_to_stream
from secateur.errors import ModelError
from secateur.progress import Bar
from secateur.surgery import masked, updated
from secateur.surgery.rows import removed_rows
from secateur.surgery.updates import Updates
from secateur.types import Cut, DependencyGraph, Kept, Removed
from secateur.units import Rows
from secateur.walk import Calibration, EnoughError, Inputs, LayerStack, Walker, borrowed, watched

KEY = "recovery.repair"
MORE_WINDOWS = "Raise calibration.tokens, or lower calibration.window."
"""What to do about too little text for a method that compensates."""
_FALL_BACK = 0.3
"""A consumer with a shorter step towards the dense target is fitted to its own target, if that is better."""


@dataclass(frozen=True)
class Refit:
    """How one consumer was refitted."""

    before: float
    """Distance of its output from the target on the check windows, as a share of the target's square."""
    after: float
    ridge: float
    step: float
    """0: it is not changed."""
    target: Target


@dataclass(frozen=True)
class Compensated(Guarded):
    """New values for consumers, not yet written, with their effect on the loss."""

    refits: dict[str, Refit] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """See ``Guarded.facts``."""
        return {"refits": {name: asdict(refit) for name, refit in self.refits.items()}, **super().facts}


def compensate(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Kept,
    calibration: Calibration | None,
    target: Target = "dense",
    start: Updates | None = None,
) -> Compensated:
    """New values for the weights that consume the kept units of the cut groups. The model is restored.

    The columns of removed units keep their values. Stacked experts are not refitted. The result never makes the loss on
    the check windows larger: all changes are made, half of each, or none. Costs about four forward passes over the
    text for layers with two consumers, and two with the target ``own``, which does not run the dense model. Memory:
    hidden states of both models, and the Gram matrices of one consumer.

    Args:
        model: the dense model.
        calibration: 20 tokens for each input of a consumer, or more; at least ``EVERY`` windows.
        start: path of a parameter of a layer → its value in the pruned model, where that differs from the dense one
            (folded gates).

    Raises:
        ModelError: as ``check_refittable``.
        DataError: there is no text.
    """
    text = text_for(calibration, KEY)
    cut = Cut.keeping(graph, kept)
    stack = check_refittable(model, graph, cut, target)
    walk = _Walk(model, graph, Walker(stack, text), Walker(stack, text), target, start or {})
    with borrowed(model), torch.no_grad(), Bar("repairing", len(stack)) as bar:
        for layer in range(len(stack)):
            walk.refit_layer(layer, {name: units for name, units in cut.items() if graph[name].layer == layer})
            bar.advance()
        return walk.guarded(cut)


def remove_and_compensate(
    model: nn.Module,
    graph: DependencyGraph,
    counts: Mapping[str, int],
    calibration: Calibration | None,
    target: Target = "dense",
    swaps: int = 0,
) -> tuple[Removed, Compensated]:
    """Choose ``counts`` units of each group by optimal brain surgery (``obs``), and compensate for them.

    Layer by layer: a group is chosen and its consumer refitted on the pruned and refitted layers before it. Otherwise
    as ``compensate``.

    Args:
        swaps: most tries to exchange removed units for others (``Elimination.swap``).

    Returns:
        The removed units by group, and the new values.

    Raises:
        ModelError: the text has fewer than ``EVERY`` windows, or as ``check_removable``.
        DataError: there is no text.
    """
    text = text_for(calibration, "Optimal brain surgery", MORE_WINDOWS)
    stack = check_removable(model, graph, counts, target=target)
    walk = _Walk(model, graph, Walker(stack, text), Walker(stack, text), target, swaps=swaps)
    removed: Removed = {}
    with borrowed(model), torch.no_grad(), Bar("removing", len(stack)) as bar:
        for layer in range(len(stack)):
            here = {name: count for name, count in counts.items() if count and graph[name].layer == layer}
            removed |= walk.remove_in_layer(layer, here)
            bar.advance()
        return removed, walk.guarded(Cut.removing(graph, removed))


def check_removable(
    model: nn.Module, graph: DependencyGraph, names: Iterable[str], key: str = KEY, target: Target = "own"
) -> LayerStack:
    """The layers. Raises ModelError unless optimal brain surgery can cut these groups.

    ``key`` is the key of the recipe that asks for it, and ``target`` that of the refit.
    """
    names = list(names)
    stack = check_inside(model, graph, names, key)
    for name in names:
        if len(consumers_of(model, graph, Cut.removing(graph, {name: [0]}))) != 1:
            raise ModelError(
                f"Optimal brain surgery needs one linear that consumes a group's units, and {name} has more, or none. "
                f'Choose another method, or protect the group with budget.protect=["{name}"].'
            )
    _check_target(stack, graph, names, target)
    return stack


def check_refittable(
    model: nn.Module, graph: DependencyGraph, kept: Iterable[str], target: Target = "own"
) -> LayerStack:
    """The layers. Raises ModelError unless consumers of these groups can be refitted, to this target."""
    kept = list(kept)
    stack = check_inside(model, graph, kept, KEY)
    _check_target(stack, graph, kept, target)
    return stack


def _check_target(stack: LayerStack, graph: DependencyGraph, names: Iterable[str], target: Target) -> None:
    if target == "stream":
        sample = Cut.removing(graph, {name: [0] for name in names})
        check_adds_to_stream(stack, consumers_of(stack.model, graph, sample))


@dataclass
class _Walk:
    """Both models on their way through the layers: the dense one, and the pruned one with its new weights."""

    model: nn.Module
    graph: DependencyGraph
    dense: Walker
    pruned: Walker
    target: Target
    start: Updates = field(default_factory=dict)
    swaps: int = 0
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    refits: dict[str, Refit] = field(default_factory=dict)

    def refit_layer(self, layer: int, here: Mapping[str, Sequence[int]]) -> None:
        """Refit the consumers of this layer one by one, and move on."""
        self._through(layer, consumers_of(self.model, self.graph, here), lambda name, fit, rows: (rows, here), here)

    def remove_in_layer(self, layer: int, here: Mapping[str, int]) -> Removed:
        """Choose the units of this layer's groups, and refit their consumers; so many of each go."""
        removed: Removed = {}
        sample = {name: [0] for name in here}
        consumers = consumers_of(self.model, self.graph, Cut.removing(self.graph, sample))

        def choose(name: str, fit: Gram, rows: Rows) -> tuple[Rows, Kept]:
            [group] = [self.graph[one] for one in here if consumes(self.graph, one, name)]
            [member] = [one for one in group.members if one.role == "in" and one.parameter == name]
            columns = member.rows(range(group.size))
            removed[group.name] = removed_units(fit, matrix_of(rows), columns, here[group.name], group.runs, self.swaps)
            kept = Cut.removing(self.graph, {group.name: removed[group.name]})
            return consumers_of(self.model, self.graph, kept)[name], kept

        self._through(layer, consumers, choose, {})
        return removed

    def guarded(self, cut: Cut) -> Compensated:
        """The changes that lower the loss on the check windows."""
        found = guarded(self.model, self.graph, cut, self.pruned.calibration, self.updates, self.start)
        return Compensated(**vars(found), refits=self.refits)

    def _through(
        self,
        layer: int,
        consumers: Mapping[str, Rows],
        choose: Callable[[str, Gram, Rows], tuple[Rows, Kept]],
        others: Kept,
    ) -> None:
        """Refit each consumer in turn, and move both models to the next layer.

        ``choose`` gives the rows of the consumer that are removed, and the units that stay, once its inputs are known.
        ``others`` are cut as well where the layer is left, whatever consumes them.
        """
        new: dict[str, torch.Tensor] = {}
        done: dict[str, Sequence[int]] = {}
        before: list[tuple[Rows, torch.Tensor]] = []
        for name in self._in_order(consumers):
            fit, check = self._grams(before, consumers[name], new, done)
            rows, kept = choose(name, fit, consumers[name])
            solution, target = self._solution(rows, fit, check)
            self.refits[name] = Refit(solution.before, solution.after, solution.ridge, solution.step, target)
            if solution.step > 0:
                new[name] = _written(rows, solution.weight)
            before.append((rows, matrix_of(rows).clone()))
            done |= {group: kept[group] for group in kept if consumes(self.graph, group, name)}
        if self.target != "own":
            self.dense.go_to(layer + 1)
        with updated(self.model, self._values(layer, new)), masked(self.model, self.graph, {**others, **done}):
            self.pruned.go_to(layer + 1)
        self.updates |= new

    def _values(self, layer: int, new: Updates) -> Updates:
        """The values of the pruned model's parameters in this layer, where they differ from the dense model's."""
        inside = f"{self.pruned.stack.path}.{layer}."
        return {**{name: value for name, value in self.start.items() if name.startswith(inside)}, **new}

    def _in_order(self, consumers: Mapping[str, Rows]) -> list[str]:
        """Names in the order in which the layer calls them."""
        if len(consumers) < 2:
            return list(consumers)
        called = {name: Inputs() for name in consumers}
        with watched(self.model, called):
            self.pruned.batch(0)
        return sorted(consumers, key=lambda name: called[name].turn)

    def _grams(
        self, before: list[tuple[Rows, torch.Tensor]], rows: Rows, new: Mapping[str, torch.Tensor], done: Kept
    ) -> tuple[Gram, Gram]:
        """Sums for fitting and for checking, a batch at a time.

        The target ``own`` needs only those of the inputs: the others follow from them.
        """
        weight, values = matrix_of(rows).clone(), self._values(self.pruned.layer, new)
        outputs = 0 if self.target == "own" else weight.shape[0]
        fit, check = (Gram.empty(outputs, weight.shape[1], weight.device) for _ in range(2))
        watch = [*(one for one, _ in before), rows] if self.target == "stream" else [rows]
        first, calls = 0, None  # after the first batch, a pass ends at the consumer's last use
        for number, ids in enumerate(self.dense.calibration.batches()):
            seen, now = ({one.name: Inputs(calls if one is rows else None) for one in watch} for _ in range(2))
            if self.target != "own":
                with watched(self.model, seen), suppress(EnoughError):
                    self.dense.batch(number)
            with updated(self.model, values), masked(self.model, self.graph, done), watched(self.model, now):
                with suppress(EnoughError):
                    self.pruned.batch(number)
                calls = now[rows.name].calls
                x = now[rows.name].values
                wanted = x[:, :0] if self.target == "own" else seen[rows.name].values.float() @ weight.float().T
                if self.target == "stream":
                    wanted = wanted + self._drift(number, before, seen, now)
            windows, width = ids.shape
            x = x.view(windows, width, -1)[:, SKIPPED:]
            y = wanted.view(windows, width, -1)[:, SKIPPED:]
            checks = torch.tensor([(first + row) % EVERY == EVERY - 1 for row in range(windows)])
            for gram, chosen in ((fit, ~checks), (check, checks)):
                if bool(chosen.any()):
                    gram.add(x[chosen].flatten(0, 1), y[chosen].flatten(0, 1))
            first += windows
        return (fit.towards(weight), check.towards(weight)) if self.target == "own" else (fit, check)

    def _drift(
        self,
        number: int,
        before: list[tuple[Rows, torch.Tensor]],
        seen: Mapping[str, Inputs],
        now: Mapping[str, Inputs],
    ) -> torch.Tensor:
        """How far the residual stream before the consumer is from the dense one, ``[tokens, outputs]``.

        ``before`` has the consumers of the layer that were refitted already, with their old weights. Their new weights
        are in place meanwhile.
        """
        drift = torch.zeros(())
        if self.dense.layer > 0:
            drift = (self.dense.states[number] - self.pruned.states[number]).float().flatten(0, -2)
        for rows, old in before:
            drift = drift + seen[rows.name].values.float() @ old.float().T
            kept = rows.others.to(old.device)
            drift = drift - now[rows.name].values.float()[:, kept] @ matrix_of(rows).float()[:, kept].T
        return drift

    def _solution(self, rows: Rows, fit: Gram, check: Gram) -> tuple[Solution, Target]:
        """Towards the target that was asked for; towards the consumer's own where that leads nowhere."""
        weight, kept = matrix_of(rows), rows.others.to(rows.tensor.device)
        old = weight if rows.name not in self.start else self.start[rows.name].to(weight.device).movedim(rows.axis, -1)
        solution = solve_refit(fit, check, old, kept)
        if self.target != "own" and solution.step < _FALL_BACK:
            other = solve_refit(fit.towards(weight), check.towards(weight), old, kept)
            after = check.error(other.weight, kept)
            if other.step > 0 and after < solution.after:
                return Solution(other.weight, other.ridge, other.step, solution.before, after), "own"
        return solution, self.target


def consumers_of(model: nn.Module, graph: DependencyGraph, kept: Kept) -> dict[str, Rows]:
    """The matrices that lose inputs in a cut to ``kept``, by name."""
    rows = removed_rows(model, graph, kept, role="in")
    return {item.name: item for item in rows if item.tensor.dim() == 2 and item.name.endswith(".weight")}


def consumes(graph: DependencyGraph, group: str, parameter: str) -> bool:
    """Whether ``parameter`` consumes the units of ``group``."""
    return any(member.role == "in" and member.parameter == parameter for member in graph[group].members)


def matrix_of(rows: Rows) -> torch.Tensor:
    """The consumer's weight as it is now, ``[outputs, inputs]``."""
    return rows.tensor.detach().movedim(rows.axis, -1)


def _written(rows: Rows, weight: torch.Tensor) -> torch.Tensor:
    """A copy of the consumer's whole weight with ``weight`` (``[outputs, kept]``) in the columns of the kept inputs."""
    new = rows.tensor.detach().clone()
    values = weight.to(new.dtype).to(new.device)
    return new.index_copy_(rows.axis, rows.others.to(new.device), values if rows.axis == 1 else values.T)
