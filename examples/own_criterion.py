"""Your own criterion, against the others: a subclass of ``Criterion`` with a name and a ``score``.

Scores a channel or head by the largest weight that consumes it, and compares that with magnitude and Taylor under the
same budget, text and training. Run as: python examples/own_criterion.py [MODEL [FOLDER]]
or by name: PYTHONPATH=examples secateur prune MODEL -o FOLDER --method own_criterion:LargestWeight
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from torch import nn

import secateur
from secateur.compare import compare
from secateur.importance import Criterion
from secateur.types import DependencyGraph, Scores


class LargestWeight(Criterion):
    """A unit is as good as the largest weight among the columns that consume it."""

    name: ClassVar[str] = "largest-weight"
    summary: ClassVar[str] = "the largest weight that consumes a unit"

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: object, seed: int) -> Scores:
        scores = {}
        for group in graph.prunable:
            [member] = [member for member in group.members if member.role == "in"]
            weight = model.get_parameter(member.parameter).detach().abs()
            columns = weight.movedim(member.axis, 0).flatten(1).amax(dim=1)  # experts lie in a third axis
            scores[group.name] = columns[member.rows(range(group.size))].amax(dim=1)  # one number a unit, higher = keep
        return Scores(scores)


def main(name: str, folder: str | None = None) -> None:
    own = f"{Path(__file__).stem}:LargestWeight"  # package.module:Class, from where Python finds modules
    if folder is None:
        model, _ = secateur.load(name)
        plan = secateur.prune(model, ratio=0.2, method=own).plan
        print(f"{plan.parameters_before:,} -> {plan.parameters_after:,} parameters")
        return
    recipe = secateur.load_recipe(flags={"model.name": name})
    board = compare(recipe, [own, "magnitude", "taylor"], [0.2], Path(folder), resume=True)
    for row in board.rows:
        print(row.method, row.parameters, "parameters, perplexity", board.mean(row.pruned), board.mean(row.recovered))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["smollm2-135m"]))
