"""Where a run in several rounds stands: the model in memory, and which units of the dense model it still has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.planning import Budget, countable, restrict
from secateur.types import Cut, DependencyGraph, Kept, Removed


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
            places = {unit: place for place, unit in enumerate(self.kept[name])} if name in self.kept else None
            found[name] = list(units) if places is None else [places[unit] for unit in units]
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

        After k of n rounds, k/n of ``budget.ratio`` of the dense parameters are removed. The ratio is 0 or below when
        the rounds before have removed that many already: a unit may be larger than what a round removes.
        """
        if budget.rounds == 1:
            return budget
        before, after = self.done / budget.rounds, (self.done + 1) / budget.rounds
        goal = (1 - budget.ratio * after) * countable(self.dense).parameter_count()
        return budget.model_copy(
            update={
                "ratio": 1 - goal / countable(self.graph).parameter_count(),
                "shares": {name: 1 - (1 - own * after) / (1 - own * before) for name, own in budget.shares.items()},
                "protect_from": None if self.done else budget.protect_from,  # ``graph`` has its reasons
                "rounds": 1,
            }
        )

    def after_round(self, model: PreTrainedModel, kept: Kept, budget: Budget) -> Self:
        """The position after one more round, in which ``model`` was cut down to the dense units ``kept``.

        The model is traced anew. What the budget protects in the dense model stays protected. Raises ModelError when
        the groups are not those of the dense model.
        """
        found, cut = trace(model), Cut.keeping(self.dense, kept)
        sizes = {group.name: len(cut[group.name]) if group.name in cut else group.size for group in self.dense}
        inner = {group.name for group in self.dense if group.within in cut}  # they shrink with the units around them
        for group in self.dense:
            if group.name not in found or (group.name not in inner and found[group.name].size != sizes[group.name]):
                raise ModelError(
                    f"{group.name} is another group after a cut, and a second round cannot go on from there. Set "
                    "budget.rounds=1, and prune the result again."
                )
        graph = found.protected_as(restrict(self.dense, budget))
        return replace(self, graph=graph, kept=dict(cut), done=self.done + 1)
