"""Perplexity after pruning and after recovery, method by method, under one recovery recipe.

    python benchmarks/quality.py --text wiki.test.raw --methods lorashear,taylor,wanda,magnitude,random --ratio 0.2

Every method gets the same model, groups, calibration text, recovery steps and seed. A progressive method trains while
it prunes; ``--equal-tokens`` gives the one-shot methods those steps too, as additional recovery, so that all see the
same number of training tokens. ``--text`` is a file that nothing here trains on, read as one string, in windows that
do not overlap (512 tokens, the first 40,960). Prints JSON lines, and appends them to ``--json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur import progress
from secateur.config import revise
from secateur.data import read_ids
from secateur.evaluation import text_loss
from secateur.methods import METHODS
from secateur.precision import autocast_dtype

WINDOW, TOKENS = 512, 40_960
STATES = ("dense", "pruned", "recovered")


def perplexity(model: Any, tokenizer: Any, file: Path) -> float:
    ids = read_ids(file, tokenizer, WINDOW, TOKENS)
    return text_loss(model, ids, autocast=autocast_dtype("auto", model.device)).perplexity


def one_run(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, measure, recover and measure again."""
    model, tokenizer = secateur.load(arguments.model)
    recipe = secateur.load_recipe(None, arguments.overrides, {"method": method, "budget.ratio": arguments.ratio})
    recipe = revise(recipe, {"seed": arguments.seed, "evaluation.speed": False, "evaluation.baseline": None})
    steps = recipe.recovery.steps
    if arguments.equal_tokens and METHODS[method].needs != "training":
        steps += arguments.equal_tokens
    started = time.monotonic()
    result = secateur.prune(model, tokenizer, recipe=revise(recipe, {"recovery.steps": steps}))
    row = {
        "method": method,
        "settings": arguments.overrides,
        "ratio": result.plan.ratio_reached,
        "parameters": result.plan.parameters_after,
        "recovery_steps": steps,
        "held_out": {state: result.metrics[state]["perplexity"] for state in STATES if state in result.metrics},
        "seconds": round(time.monotonic() - started),
    }
    if arguments.text is not None:
        row["perplexity"] = perplexity(model, tokenizer, arguments.text)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="lorashear,taylor,wanda,magnitude,random")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="text that nothing trains on, such as WikiText-2's wiki.test.raw")
    parser.add_argument(
        "--equal-tokens", type=int, default=0, metavar="STEPS", help="more recovery for one-shot methods"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    progress.show()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for method in arguments.methods.split(","):
        row = one_run(method, arguments)
        print(json.dumps(row), flush=True)
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
