"""Your own criterion, against the others: a method is a subclass of ``Method`` with a name and a ``run``.

Scores a channel or head by the largest weight that consumes it, and compares that with magnitude and Taylor under the
same budget, text and training. Run as: python examples/own_criterion.py [MODEL [FOLDER]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import secateur
from secateur.compare import compare
from secateur.methods import METHODS, Decision, Method, PruningTask
from secateur.types import Scores


class LargestWeight(Method):
    """A unit is as good as the largest weight among the columns that consume it."""

    name = "largest-weight"
    summary = "one shot: the largest weight that consumes a unit"
    needs = "nothing"  # or "text": task.calibration; or "training": task.training_blocks as well

    def run(self, task: PruningTask) -> Decision:
        weights = dict(task.model.named_parameters())
        scores = {}
        for group in task.prunable:
            [member] = [member for member in group.members if member.role == "in"]
            weight = weights[member.parameter].detach().abs()
            columns = weight.movedim(member.axis, 0).flatten(1).amax(dim=1)  # experts lie in a third axis
            scores[group.name] = columns[member.rows(range(group.size))].amax(dim=1)  # one number a unit, higher = keep
        return Decision(task.allocate(Scores(scores)), Scores(scores))


def main(name: str, folder: str | None = None) -> None:
    METHODS["largest-weight"] = LargestWeight
    if folder is None:
        model, _ = secateur.load(name)
        plan = secateur.prune(model, ratio=0.2, method="largest-weight").plan
        print(f"{plan.parameters_before:,} -> {plan.parameters_after:,} parameters")
        return
    recipe = secateur.load_recipe(flags={"model.name": name})
    board = compare(recipe, ["largest-weight", "magnitude", "taylor"], [0.2], Path(folder), resume=True)
    for row in board.rows:
        print(row.method, row.parameters, "parameters, perplexity", board.mean(row.pruned), board.mean(row.recovered))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["smollm2-135m"]))
