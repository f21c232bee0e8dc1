"""LoRAPrune's estimate of the gradient against the true one: rank correlation of unit scores, at three moments.

    python benchmarks/lora_estimate.py --model smollm2-135m -o docs/methods

At LoRA's initialisation, after a warm-up, and after training, all on the same calibration text. Within each group:
for the output side (q k v, gate up), the input side (o, down), both added up, and the output side's estimate as a
guess at both. Between groups (``all``): for the output side of all units of the model, each by the parameters that it
frees, as a global ranking compares them. Form and normalisation within a group are the method's; ``--set
method.normalise=true`` is what LoRAPrune's code does. Writes ``loraprune-estimate.json`` and
``loraprune-estimate.png`` and prints the means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import secateur
from secateur import progress
from secateur.data import read_texts
from secateur.importance.adapters import Options
from secateur.importance.estimate import ALL, Agreement, compare_with_true_gradient
from secateur.methods.loraprune import LoRAPruneSettings
from secateur.planning import restrict
from secateur.training import attach_lora, train

SIDES = ("out", "in", "both", "out for both")


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
            texts.calibration,
            Options(method.form, method.normalise),
            batch_size=arguments.batch_size,
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
