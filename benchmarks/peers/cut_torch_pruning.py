"""Cuts the feed-forward layers of a Llama-like model by Torch-Pruning; runs in the tool's own environment.

    python cut_torch_pruning.py MODEL FRACTION IDS.safetensors OUT magnitude|taylor

As in the tool's own LLM example (local ranking, group importance), with every layer but gate, up and down projections
left alone: FFN channels are what all three tools can do on grouped queries.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch_pruning as tp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(source: str, fraction: float, text: str, out: str, criterion: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = load_file(text)["ids"]
    model.config.use_cache = False
    if criterion == "taylor":
        importance: Any = tp.importance.GroupTaylorImportance()
        for batch in ids.split(4):
            (model(input_ids=batch, labels=batch).loss * (len(batch) / len(ids))).backward()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    gates = [module.gate_proj for name, module in model.named_modules() if name.endswith(".mlp")]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": ids[:1, :16]},
        importance=importance,
        global_pruning=False,
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(gates, fraction),
        ignored_layers=[model.lm_head],
    )
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()
    widths = {gate.out_features for gate in gates}
    assert len(widths) == 1, f"Torch-Pruning left different widths: {widths}"
    model.config.intermediate_size = widths.pop()
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:6])
