"""How many full forward passes ``secateur analyze`` costs, against the naive loop: counted, and timed.

    python benchmarks/analysis_cost.py --model smollm2-135m --tokens 2048 --json cost.jsonl

Every decoder layer and the head count the tokens that they see; one full forward pass is all layers and the head once
for every token of the text, weighted by their parameters. The naive loop is one whole pass for every trial and one for
the dense model; ``--naive`` runs it too (it is the same code without the kept states), compares the numbers that come
out, and times both. Units are ranked by magnitude, so that only the trials are counted. Without ``--model`` a tiny
random Llama of 24 layers is taken.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur
from secateur import progress
from secateur.analysis import Trial
from secateur.data import TextSettings, TokenBlocks, load_blocks
from secateur.importance import CRITERIA
from secateur.importance.knowledge import cuts, measure_cuts
from secateur.walk import Calibration
from secateur.walk.stack import LayerStack


def tiny() -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads)).eval()


class Counts:
    """Tokens that went through each layer and through the head, while it is entered."""

    def __init__(self, model: Any, stack: LayerStack) -> None:
        self.seen: Counter[str] = Counter()
        self.modules = {str(index): layer for index, layer in enumerate(stack.layers)}
        self.modules["head"] = model.get_output_embeddings()
        self.weight = {name: _size(module) for name, module in self.modules.items()}

    def __enter__(self) -> Self:
        for name, module in self.modules.items():
            module.forward = self._counting(name, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for module in self.modules.values():
            del module.forward

    def _counting(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Around the forward itself, not a hook: the stack puts another in its place where a layer is skipped."""

        def count(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            states = out[0] if isinstance(out, tuple) else out
            self.seen[name] += states.shape[0] * states.shape[1]
            return out

        return count

    def passes(self, tokens: int) -> float:
        """Full forward passes over ``tokens`` tokens that all this was worth."""
        whole = sum(self.weight.values()) * tokens
        return sum(self.weight[name] * seen for name, seen in self.seen.items()) / whole


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def one_way(model: Any, graph: Any, blocks: TokenBlocks, chosen: Any, cached: bool) -> tuple[dict[str, float], Any]:
    counts, text = Counts(model, LayerStack.find(model, graph)), Calibration(blocks, precision="auto")
    started = time.monotonic()
    with counts:
        _, trials = measure_cuts(model, graph, text, chosen, cached=cached)
    seconds = time.monotonic() - started
    return {"passes": round(counts.passes(blocks.ids.numel()), 2), "seconds": round(seconds, 1)}, trials


def largest_difference(one: list[Trial], other: list[Trial]) -> float:
    return max(abs(a.kl - b.kl) / max(b.kl, 1e-3) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or built-in name")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--ratios", default="0.25,0.5")
    parser.add_argument("--naive", action="store_true", help="run the naive loop as well, and compare")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    progress.show()
    if arguments.model is None:
        model = tiny()
        ids = torch.randint(512, (arguments.tokens // arguments.window, arguments.window))
        blocks = TokenBlocks(ids, ("random",) * len(ids))
    else:
        model, tokenizer = secateur.load(arguments.model)
        text = TextSettings(tokens=arguments.tokens, window=arguments.window)
        blocks = load_blocks(text, "calibration", tokenizer, 0)
    graph = secateur.trace(model)
    scores = CRITERIA["magnitude"]().score(model, graph, None, 0)
    chosen = cuts(graph, scores, [float(ratio) for ratio in arguments.ratios.split(",")])
    cost, trials = one_way(model, graph, blocks, chosen, cached=True)
    tried = len({cut.made for cut in chosen})
    row: dict[str, Any] = {"model": arguments.model or "tiny", "tokens": blocks.ids.numel(), "trials": tried}
    row |= {"cached": cost, "naive_passes": tried + 1}
    if arguments.naive:
        slow, other = one_way(model, graph, blocks, chosen, cached=False)
        row |= {"naive": slow, "largest_relative_difference_of_kl": largest_difference(trials, other)}
    print(json.dumps(row))
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
