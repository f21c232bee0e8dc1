"""LoRAPrune's estimate of the gradient against the true one: rank correlation of unit scores, at three moments.

    python benchmarks/lora_estimate.py --model smollm2-135m -o docs/methods

At LoRA's initialisation, after a warm-up, and after training, all on the same calibration text. Within each group:
for the output side (q k v, gate up), the input side (o, down), both added up, and the output side's estimate as a
guess at both. Between groups (``all``): for the output side of all units of the model, each by the parameters that it
frees, as a global ranking compares them. Form and normalisation within a group are the method's; ``--set
method.normalise=true`` is what LoRAPrune's code does. Writes ``loraprune-estimate.json`` and
``loraprune-estimate.png`` and prints the means.

The true gradient of a wrapped weight is allocated here, one batch after the other: this is for studies, not for runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import secateur
from secateur import progress
from secateur.data import read_texts
from secateur.importance.lora import LoRA, row_sums
from secateur.methods.loraprune import LoRAPruneSettings
from secateur.planning import countable, restrict
from secateur.planning.stacks import comparable
from secateur.training import attach_lora, train
from secateur.types import DependencyGraph, Member, NodeGroup
from secateur.units import adapter_of, base_members, dequantised, is_adapter_parameter, lora_layer, sum_rows
from secateur.walk import Calibration, borrowed

SIDES = ("out", "in", "both", "out for both")
ALL = "all"
"""Group and kind of the agreement between groups."""


@dataclass(frozen=True)
class Agreement:
    """Of one side of one group: Spearman's rank correlation of its units' scores with those by the true gradient.

    Or, with ``ALL`` as group and kind, of the output side of all units of the model in one ranking, as a global ranking
    compares them: not normalised, divided by the parameters that go with a unit.
    """

    group: str
    kind: str
    side: str
    """``out``, ``in``, or ``both`` added up as the criterion does; ``out for both``: the estimate of the output side
    alone against the truth of both, which says whether leaving the input side out makes a better criterion."""
    correlation: float
    overlap: float
    """Of the fifth of the units that the true gradient puts lowest, the fraction that the estimate puts there too."""


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors, ties by index; 1 for the same order, −1 for the opposite, NaN for one unit."""
    ranks = [values.argsort(stable=True).argsort(stable=True).double() for values in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norm) if norm > 0 else float("nan")


def compare_with_true_gradient(
    model: nn.Module, graph: DependencyGraph, text: Calibration, criterion: LoRA | None = None
) -> list[Agreement]:
    """Score every prunable group of a model with adapters by the estimate and by the true ``∂L/∂W``, and compare.

    Both see the same mean loss over ``text``, the same effective weight ``W + s B A`` and the same form and
    normalisation. The last agreement is that between groups, whatever ``criterion`` normalises. Memory: a gradient for
    every wrapped weight. The model is left as it was.
    """
    options = criterion or LoRA(normalise=True)
    adapters = [name for name, _ in model.named_parameters() if is_adapter_parameter(name)]
    frozen = {member.parameter for group in graph.prunable for member, _ in _members(model, group)}
    with borrowed(model, [*adapters, *frozen]) as trained:
        text.backward(model)
        sums = {group.name: _unit_sums(group, _members(model, group), trained, options) for group in graph.prunable}
    found = [item for group in graph.prunable for item in _within(group, sums[group.name], options.normalise)]
    return found + _between(graph, sums)


def _members(model: nn.Module, group: NodeGroup) -> list[tuple[Member, LoraLayer]]:
    layers = [(member, lora_layer(model, member.parameter)) for member in base_members(group)]
    return [(member, layer) for member, layer in layers if layer is not None]


UnitSums = list[tuple[str, torch.Tensor]]
"""For each matrix that a group lives on its side, and the estimate and the truth of the units, ``[2, size]``."""


def _unit_sums(
    group: NodeGroup,
    members: Sequence[tuple[Member, LoraLayer]],
    trained: dict[str, nn.Parameter],
    options: LoRA,
) -> UnitSums:
    sums: UnitSums = []
    for member, layer in members:
        gradient = trained[member.parameter].grad
        assert gradient is not None
        guess = sum_rows(row_sums(layer, member.axis, options), member, group.size)
        truth = sum_rows(true_row_sums(layer, gradient, member.axis, options), member, group.size)
        sums.append((member.role, torch.stack([guess, truth]).cpu()))
    return sums


def _within(group: NodeGroup, sums: UnitSums, normalise: bool) -> list[Agreement]:
    """The agreements on one group, by side."""
    added: dict[str, torch.Tensor] = {}
    for role, scores in sums:
        norms = scores.norm(dim=1, keepdim=True)
        share = torch.where(norms > 0, scores / norms, 0.0) if normalise else scores
        for side in (role, "both"):
            added[side] = added.get(side, torch.zeros(2, group.size)) + share
    if "out" in added:
        added["out for both"] = torch.stack([added["out"][0], added["both"][1]])
    return [
        Agreement(group.name, group.kind, side, spearman(guess, truth), _overlap(guess, truth))
        for side, (guess, truth) in added.items()
    ]


def _between(graph: DependencyGraph, sums: Mapping[str, UnitSums]) -> list[Agreement]:
    """The agreement on all units; none where no matrix that produces units has an adapter."""
    plain, parts = countable(graph), []
    for group in graph.prunable:
        producing = [scores for side, scores in sums[group.name] if side == "out"]
        if producing:
            guess, truth = torch.stack(producing).sum(0)
            cost = plain.unit_cost(group)
            parts.append(torch.stack([comparable(scores, cost, "parameters") for scores in (guess, truth)]))
    if not parts:
        return []
    guess, truth = torch.cat(parts, dim=1)
    return [Agreement(ALL, ALL, "out", spearman(guess, truth), _overlap(guess, truth))]


def true_row_sums(layer: LoraLayer, gradient: torch.Tensor, axis: int, options: LoRA) -> torch.Tensor:
    """``row_sums`` with the gradient itself instead of its estimate."""
    adapter = adapter_of(layer)
    delta = adapter.scaling * (adapter.b.detach().float() @ adapter.a.detach().float())
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    product = gradient.float() * (dequantised(layer.get_base_layer()).float() + (delta.T if transposed else delta))
    value = product.abs() if options.form == "absolute" else product.square()
    return value.sum(1 - axis)


def _overlap(guess: torch.Tensor, truth: torch.Tensor) -> float:
    lowest = max(1, len(truth) // 5)
    chosen, right = (set(values.argsort(stable=True)[:lowest].tolist()) for values in (guess, truth))
    return len(chosen & right) / lowest


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = secateur.load_recipe(None, arguments.overrides, {"model.name": arguments.model, "method": "loraprune"})
    method = recipe.method.settings
    assert isinstance(method, LoRAPruneSettings)
    model, tokenizer = secateur.load(arguments.model)
    texts = read_texts(model, tokenizer, recipe.texts, recipe.seed)
    assert texts.calibration is not None
    assert texts.recovery is not None
    adapted = attach_lora(model, recipe.lora, recipe.seed)
    graph = restrict(secateur.trace(adapted), recipe.budget)
    moments: dict[str, list[dict[str, Any]]] = {}
    done = 0
    for steps in (0, arguments.warm_up, arguments.steps):
        started = time.monotonic()
        if steps > done:
            train(
                adapted,
                texts.recovery.ids,
                recipe.training.model_copy(update={"schedule": "constant"}),
                steps=steps - done,
                seed=recipe.seed + done,
                description=f"{steps - done} steps",
            )
            done = steps
        found = compare_with_true_gradient(
            adapted,
            graph,
            Calibration(texts.calibration, arguments.batch_size),
            LoRA(form=method.form, normalise=method.normalise),
        )
        moments[f"{done} steps"] = [asdict(item) for item in found]
        print(f"after {done} steps ({time.monotonic() - started:.0f} s): {summary(found)}", flush=True)
    return {
        "model": arguments.model,
        "form": method.form,
        "normalise": method.normalise,
        "lora": recipe.lora.model_dump(mode="json"),
        "learning_rate": recipe.training.learning_rate,
        "tokens_per_step": recipe.training.batch_size * recipe.recovery.window,
        "calibration_tokens": texts.calibration.ids.numel(),
        "seed": recipe.seed,
        "moments": moments,
    }


def summary(found: Sequence[Agreement]) -> str:
    parts = []
    for kind in dict.fromkeys(item.kind for item in found):
        for side in SIDES:
            mean, overlap = means([asdict(item) for item in found], kind, side)
            if not math.isnan(mean):
                parts.append(f"{kind} {side} {mean:.2f} (lowest fifth {overlap:.0%})")
    return ", ".join(parts)


def means(found: Sequence[dict[str, Any]], kind: str, side: str) -> tuple[float, float]:
    """Mean rank correlation and overlap over the groups of a kind."""
    chosen = [item for item in found if item["kind"] == kind and item["side"] == side]
    chosen = [item for item in chosen if not math.isnan(item["correlation"])]
    if not chosen:
        return math.nan, math.nan
    return statistics.fmean(i["correlation"] for i in chosen), statistics.fmean(i["overlap"] for i in chosen)


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel a kind: for each moment and side the groups as dots, and their mean as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(item["kind"] for found in result["moments"].values() for item in found))
    kinds.remove(ALL)
    figure = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(panels, kinds, strict=True):
        for index, side in enumerate(SIDES):
            for place, found in enumerate(result["moments"].values()):
                values = [i["correlation"] for i in found if i["kind"] == kind and i["side"] == side]
                x = place + 0.2 * (index - 1.5)
                ax.scatter([x] * len(values), values, s=6, alpha=0.4, color=f"C{index}")
                mean = means(found, kind, side)[0]
                ax.hlines(mean, x - 0.08, x + 0.08, color=f"C{index}", linewidth=3, label=side if place == 0 else None)
        ax.set(title=kind, xticks=range(len(result["moments"])), xticklabels=list(result["moments"]), ylim=(-0.6, 1.05))
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("rank correlation with the true gradient")
    panels[0].legend(title="side", fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--warm-up", type=int, default=8, help="optimiser steps before the second look")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps before the third")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the picture and the numbers")
    arguments = parser.parse_args()
    progress.show()
    result = measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "loraprune-estimate.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.output / "loraprune-estimate.png")


if __name__ == "__main__":
    main()
