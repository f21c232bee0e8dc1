"""Whether a change of the code changed a plan: every method on every tiny family and on the built-in model.

    python benchmarks/same_plans.py record --to plans.json [--built-in]
    python benchmarks/same_plans.py check plans.json [--only llama-gqa/wanda]

``record`` prunes each model by each method, and by some variants of their settings, and writes a line for every plan:
a digest of the plan and one of the weights after the run. ``check`` does the same again and lists what differs; it
ends with 1 when a plan does. The same seed gives the same plan on the same machine only, so a file is checked where it
was recorded. Weights may differ where a rewritten sum rounds otherwise; such a difference is shown and does not fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.config import Recipe, load_recipe
from secateur.errors import SecateurError
from secateur.methods import METHODS
from secateur.testing.tiny import TINY
from secateur.testing.tokenizer import tiny_tokenizer
from secateur.whole import write_whole

BUILT_IN = "smollm2-135m"
WORDS = "the letter came late and nobody in the house had asked who wrote it before the winter".split()
OVER = ["recovery.steps=0", "evaluation.speed=false", "evaluation.baseline=null", "training.precision=fp32"]
OF_TRAINING = {
    "lorashear": ["method.period_steps=3"],
    "loraprune": ["method.steps=4"],
    "shortgpt": ["budget.kinds=[layer]", "budget.ratio=0.3"],
}
VARIANTS: dict[str, list[str]] = {
    "wanda layer by layer": ["method=wanda", "method.inputs=pruned"],
    "wanda query": ["method=wanda", "budget.kinds=[ffn,query]"],
    "taylor equal": ["method=taylor", "budget.ranking=layer"],
    "taylor protected": ["method=taylor", "budget.protect_first=1", "budget.ratio=0.1"],
    "magnitude all": ["method=magnitude", "method.over=all"],
    "magnitude expert": ["method=magnitude", "budget.kinds=[expert]", "budget.ratio=0.1"],
    "magnitude hidden": ["method=magnitude", "budget.kinds=[hidden]", "budget.ratio=0.1"],
    "flap without biases": ["method=flap", "method.compensate=false"],
    "llm-pruner mixed": ["method=llm-pruner", "method.form=mixed", "method.members=max", "method.rounds=3"],
    "llm-pruner vector": ["method=llm-pruner", "method.form=vector", "method.members=product"],
    "fisher repaired": ["method=fisher", "recovery.repair=true"],
    "lorashear periods": [
        "method=lorashear",
        "method.periods=2",
        "method.period_steps=2",
        "method.warmup_steps=2",
        "method.projection=half-space",
        "method.saliency={hesso-magnitude: 1.0, taylor: 0.5}",
    ],
    "lorashear by adapters": [
        "method=lorashear",
        "method.period_steps=2",
        "method.warmup_steps=2",
        "method.saliency={lora: 1.0}",
    ],
    "loraprune both sides": ["method=loraprune", "method.steps=4", "method.normalise=true", "method.sides=both"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    record = actions.add_parser("record")
    record.add_argument("--to", type=Path, required=True)
    record.add_argument("--built-in", action="store_true", help=f"{BUILT_IN} as well (10 minutes on two cores)")
    check = actions.add_parser("check")
    check.add_argument("file", type=Path)
    check.add_argument("--only", default="", help="plans whose name begins so")
    asked = parser.parse_args()
    known = json.loads(asked.file.read_text()) if asked.action == "check" else {}
    to = asked.to.absolute() if asked.action == "record" else None
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        text = Path("text.txt")  # which blocks are read depends on the name of a text
        text.write_text(_text(), encoding="utf-8")
        if asked.action == "record":
            models = [*TINY, *([BUILT_IN] if asked.built_in else [])]
            found = {name: _decided(name, text) for model in models for name in _names(model)}
            write_whole(to, json.dumps(found, indent=0) + "\n")
        else:
            sys.exit(_check(known, asked.only, text))


def _check(known: dict[str, dict[str, str]], only: str, text: Path) -> int:
    chosen = [name for name in known if name.startswith(only)]
    started, plans, weights = time.monotonic(), [], []
    for number, name in enumerate(chosen, start=1):
        now = _decided(name, text)
        plans += [name] if now["plan"] != known[name]["plan"] else []
        weights += [name] if now["weights"] != known[name]["weights"] else []
        print(f"\r{number}/{len(chosen)}", end="", file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"\n{len(chosen)} plans in {seconds:.0f} s: {len(plans)} are others, and {len(weights)} have other weights")
    for name in plans:
        print(f"another plan: {name}")
    for name in sorted(set(weights) - set(plans)):
        print(f"other weights: {name}")
    return 1 if plans or not chosen else 0


def _names(model: str) -> Iterator[str]:
    """``MODEL/METHOD`` for every method, and the variants where they are cheap."""
    yield from (f"{model}/{method}" for method in METHODS)
    if model in ("llama-gqa", "mixtral", BUILT_IN):
        yield from (f"{model}/{variant}" for variant in VARIANTS)


def _decided(name: str, text: Path) -> dict[str, str]:
    """Digests of the plan and of the weights after the run; of the message, where the method refuses."""
    model_name, _, choice = name.partition("/")
    torch.manual_seed(0)
    if model_name == BUILT_IN:
        model, tokenizer = secateur.load(BUILT_IN, device="cpu")
    else:
        model, tokenizer = TINY[model_name](), tiny_tokenizer()
    recipe = _recipe(model_name, choice, text)
    try:
        result = secateur.prune(model, tokenizer, recipe=recipe)
    except SecateurError as error:
        refused = type(error).__name__
        return {"plan": refused, "weights": refused}
    plan: dict[str, Any] = result.plan.model_dump(mode="json", exclude={"versions"})
    weights = hashlib.sha256()
    for path, tensor in sorted(result.model.state_dict().items()):
        weights.update(path.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {"plan": _digest(json.dumps(plan, sort_keys=True)), "weights": weights.hexdigest()[:16]}


def _recipe(model: str, choice: str, text: Path) -> Recipe:
    sections = ("calibration", "recovery", "evaluation")
    if model == BUILT_IN:
        sizes = [f"{section}.{key}" for section in sections for key in ("window=256", "tokens=4096")]
    else:
        sizes = [f"{s}.{key}" for s in sections for key in (f"text=[{text}]", "window=32", "tokens=512")]
    own = VARIANTS.get(choice) or [f"method={choice}", *OF_TRAINING.get(choice, [])]
    return load_recipe(None, [*sizes, *OVER, "budget.ratio=0.15", *own])


def _text() -> str:
    draw = random.Random(0)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(300))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
