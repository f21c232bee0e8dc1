"""Where a run in several rounds stands: the model in memory, and which units of the dense model it still has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.planning import Budget, countable, parameters_in, restrict, share_of
from secateur.types import Cut, DependencyGraph, Kept, NodeGroup, Removed


@dataclass(frozen=True)
class Position:
    """The model in memory after the rounds that are ``done``, beside the dense one.

    Plans contain units of the dense model. Everything that acts on the model in memory counts the units that are left.
    Before the first round the two are the same.
    """

    dense: DependencyGraph
    graph: DependencyGraph
    """Of the model in memory."""
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Group name → dense units that are left, ascending, of each group that has lost some."""
    done: int = 0

    def here(self, kept: Kept) -> Kept:
        """The units of the model in memory that a plan for the dense model keeps."""
        found = {}
        for name, units in kept.items():
            places = {unit: place for place, unit in enumerate(self.kept.get(name, range(self.dense[name].size)))}
            if len(units) < len(places):  # a group that loses nothing may be no group any more
                found[name] = [places[unit] for unit in units]
        return found

    def removed(self, now: Removed) -> Removed:
        """All dense units that are gone when the units ``now`` of the model in memory go too."""
        gone = {name: set(units) for name, units in Cut.keeping(self.dense, self.kept).removed.items()}
        for name, units in now.items():
            left = self.kept.get(name, range(self.dense[name].size))
            gone[name] = gone.get(name, set()) | {left[unit] for unit in units}
        return {group.name: sorted(gone[group.name]) for group in self.dense if gone.get(group.name)}

    def budget(self, budget: Budget) -> Budget:
        """The budget of the next round, as fractions of the model in memory; ``budget`` itself if there is one round.

        After k of n rounds, k/n of ``budget.ratio`` of the dense parameters are removed, and k/n of each of
        ``budget.shares``. A fraction is 0 or below when the rounds before have removed that many already: a unit may be
        larger than what a round removes.
        """
        if budget.rounds == 1:
            return budget
        after = (self.done + 1) / budget.rounds
        goal = (1 - budget.ratio * after) * countable(self.dense).parameter_count()
        own: dict[str, Any] = {"ratio": 1 - goal / countable(self.graph).parameter_count(), "rounds": 1}
        own["shares"] = {name: share * after for name, share in budget.shares.items()}
        if self.done:
            # a budget may name the first two where the model has none
            able = {"ffn", "attention", *(group.kind for group in self.graph.prunable)}
            kinds = tuple(kind for kind in budget.kinds if kind in able)
            left = {share_of(budget, group) for group in self.graph.prunable}  # the other shares are over
            shares = {name: self._left_of(share, name, budget) for name, share in own["shares"].items() if name in left}
            # ``graph`` has the reasons of an analysis, which is one of the dense model
            own |= {"kinds": kinds or budget.kinds, "shares": shares, "protect_from": None}
        return budget.model_copy(update=own)

    def _left_of(self, share: float, name: str, budget: Budget) -> float:
        """The fraction that the groups of a share must lose now, to have lost ``share`` of their dense parameters."""
        dense, graph = countable(self.dense), countable(self.graph)
        whole = [group for group in dense if share_of(budget, group) == name]
        kept = {group.name: self.kept[group.name] for group in whole if group.name in self.kept}
        lost = dense.parameter_count() - dense.parameter_count(kept)
        here = parameters_in(graph, [group for group in graph if share_of(budget, group) == name])
        return max(0.0, share * parameters_in(dense, whole) - lost) / here

    def after_round(self, model: PreTrainedModel, kept: Kept, budget: Budget) -> Self:
        """The position after one more round, in which ``model`` was cut down to the dense units ``kept``.

        The model is traced anew. What the budget protects in the dense model stays protected, and so does the last unit
        of a group. Raises ModelError when the groups are not those of the dense model.
        """
        cut = Cut.keeping(self.dense, kept)
        left = {group.name: len(cut[group.name]) if group.name in cut else group.size for group in self.dense}
        found = trace(model)
        found = replace(found, groups=tuple(group for group in found if group.name in self.dense))
        graph = found.protected_as(restrict(self.dense, budget))
        groups = tuple(_as_before(group, left[group.name]) for group in graph)
        return replace(self, graph=replace(graph, groups=groups), kept=dict(cut), done=self.done + 1)


def _as_before(group: NodeGroup, left: int) -> NodeGroup:
    """``group``, protected when its units are no longer those of the dense model, of which so many are ``left``.

    The units of a layer with one KV head are its query heads.
    """
    if group.size == left or group.protected is not None:
        return group
    if left > 1:
        raise ModelError(
            f"{group.name} has {group.size} units after a cut to {left}, and a second round cannot go on from there. "
            "Set budget.rounds=1, and prune the result in a second run."
        )
    return replace(group, protected="one unit of the dense model is left", on_request=False)
