"""Is knowledge carried over from units that go to units that stay? LHSPG against one-shot pruning, equal tokens.

    python benchmarks/knowledge_transfer.py --seeds 0,1,2 --steps 60,100,300 --json transfer.jsonl

A tiny Llama is trained until it adds modulo p without a mistake, which it can do only with its FFNs: most of their
units are then masked at random in every layer, and it cannot any more. Each arm takes out the same units, reads the
same number of training tokens (all sums, by LoRA of the same rank, batch and learning rate), and is measured on all
sums:

* ``train, then cut``: all steps on the whole model, then the cut. What the kept units know then they knew before.
* ``one shot``: the cut, then all steps.
* ``one shot, restarted``: the same with LoRA and optimiser starting anew half-way, as LHSPG's do.
* ``decay, all steps``: one period of LHSPG. No step is made without the units, as in the first arm.
* ``decay``, ``half-space``: LHSPG for the first half of the steps (one period), then the rest. Beside the accuracy in
  the end stands that at the end of the period, when the units are exactly zero and no step was made without them.

If ``decay, all steps`` were no better than ``train, then cut``, nothing would be carried over; if ``decay`` is no
better in the end than ``one shot``, what was carried over could have been learned again with the same steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from secateur.graph import trace
from secateur.methods.lhspg import Decay, HalfSpace, Shrinking
from secateur.surgery import slice_model, zero_units
from secateur.training import LoraSettings, TrainingSettings, attach_lora, merge_lora, train
from secateur.types import Cut, DependencyGraph

LORA = LoraSettings(rank=4, alpha=8)
TRAINING = TrainingSettings(
    batch_size=128, micro_batch_size=128, learning_rate=3e-3, schedule="constant", precision="fp32"
)


@dataclass(frozen=True)
class World:
    """A model that knows something, where, and the text that says it."""

    model: Any
    graph: DependencyGraph
    ids: torch.Tensor
    """All sums as windows ``[p * p, 3]``: a, b, (a + b) mod p, each with tokens of its own."""
    removed: dict[str, list[int]]
    """Units that go."""

    @property
    def kept(self) -> dict[str, list[int]]:
        return Cut.removing(self.graph, self.removed)


def build(
    seed: int, *, modulus: int = 23, layers: int = 3, hidden: int = 32, steps: int = 800, share: float = 0.8
) -> World:
    """Train a model from scratch and choose the FFN units that go: ``share`` of them in every layer, at random."""
    pairs = [(a, b) for a in range(modulus) for b in range(modulus)]
    ids = torch.tensor([[a, modulus + b, 2 * modulus + (a + b) % modulus] for a, b in pairs])
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=3 * modulus, num_attention_heads=4, max_position_embeddings=16, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
            rows = ids[torch.randint(len(ids), (256,))]
            optimizer.zero_grad()
            F.cross_entropy(model(rows).logits[:, 1], rows[:, 2]).backward()
            optimizer.step()
    model.eval()
    graph, random = trace(model), Random(seed)
    size = 2 * hidden
    chosen = {f"layers.{layer}.mlp": sorted(random.sample(range(size), int(share * size))) for layer in range(layers)}
    return World(model, graph, ids, chosen)


def knows(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Accuracy of the sums, and their loss in nats."""
    with torch.no_grad():
        logits = model(ids).logits[:, 1]
    right = (logits.argmax(-1) == ids[:, 2]).float().mean()
    return {"accuracy": round(float(right), 4), "loss": round(float(F.cross_entropy(logits, ids[:, 2])), 4)}


def learn(world: World, model: Any, steps: int, seed: int, *callbacks: Callable[[Any], Any]) -> None:
    """LoRA training of ``model`` in place, merged at the end."""
    adapted = attach_lora(model, LORA, seed)
    made = [callback(adapted) for callback in callbacks]
    train(adapted, world.ids, TRAINING, steps=steps, seed=seed, description="learning", callbacks=made)
    merge_lora(adapted)


def train_then_cut(world: World, steps: int, seed: int) -> dict[str, float]:
    model = copy.deepcopy(world.model)
    learn(world, model, steps, seed)
    slice_model(model, world.graph, world.kept)
    return knows(model, world.ids)


def one_shot(world: World, steps: int, seed: int, restarts: int = 0) -> dict[str, float]:
    model = copy.deepcopy(world.model)
    slice_model(model, world.graph, world.kept)
    for part in range(restarts + 1):
        learn(world, model, steps // (restarts + 1), seed + part)
    return knows(model, world.ids)


def lhspg(world: World, steps: int, seed: int, kind: type[Shrinking], share: float = 0.5) -> dict[str, float]:
    """One period of ``share`` of the steps, the cut, and the rest of the steps."""
    model, period = copy.deepcopy(world.model), round(share * steps)

    def project(adapted: Any) -> Shrinking:
        return kind(trace(adapted), world.removed, {}, steps=period)

    learn(world, model, period, seed, project)
    zero_units(model, world.graph, world.kept)
    slice_model(model, world.graph, world.kept)
    carried = knows(model, world.ids)
    if steps > period:
        learn(world, model, steps - period, seed + 1)
    return knows(model, world.ids) | {f"{name}, end of the period": value for name, value in carried.items()}


ARMS: dict[str, Callable[[World, int, int], dict[str, float]]] = {
    "train, then cut": train_then_cut,
    "one shot": one_shot,
    "one shot, restarted": lambda world, steps, seed: one_shot(world, steps, seed, restarts=1),
    "decay, all steps": lambda world, steps, seed: lhspg(world, steps, seed, Decay, share=1.0),
    "decay": lambda world, steps, seed: lhspg(world, steps, seed, Decay),
    "half-space": lambda world, steps, seed: lhspg(world, steps, seed, HalfSpace),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean over seeds of accuracy and loss in the end, and at the end of the period."""
    lines = [
        "| steps | arm | accuracy | loss | accuracy at the end of the period |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for steps, arm in dict.fromkeys((row["steps"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["steps"], row["arm"]) == (steps, arm)]
        cells = [f"{statistics.fmean(row['accuracy'] for row in own):.3f}"]
        cells.append(f"{statistics.fmean(row['loss'] for row in own):.3f}")
        middle = [row[key] for row in own if (key := "accuracy, end of the period") in row]
        cells.append(f"{statistics.fmean(middle):.3f}" if middle else "")
        lines.append(f"| {steps} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="60,100,300")
    parser.add_argument("--share", type=float, default=0.8, help="of the FFN units that go")
    parser.add_argument("--arms", help="names with semicolons between them; all when left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        started = time.monotonic()
        world = build(seed, share=arguments.share)
        cut = copy.deepcopy(world.model)
        slice_model(cut, world.graph, world.kept)
        print(f"seed {seed}: trained {knows(world.model, world.ids)}, cut {knows(cut, world.ids)}", flush=True)
        for steps in map(int, arguments.steps.split(",")):
            for arm in arguments.arms.split(";") if arguments.arms else ARMS:
                row = {"seed": seed, "steps": steps, "arm": arm, **ARMS[arm](world, steps, seed)}
                rows.append(row)
                print(json.dumps(row), f"{time.monotonic() - started:.0f} s", flush=True)
                if arguments.json is not None:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
