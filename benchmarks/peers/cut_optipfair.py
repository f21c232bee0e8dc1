"""Cuts the feed-forward layers of a Llama-like model by OptiPFair; runs in the tool's own environment.

    python cut_optipfair.py MODEL FRACTION IDS.safetensors OUT weights|hybrid

``weights`` is its default (MAW: the largest and smallest weights of gate and up projections), ``hybrid`` the same with
activations from calibration text.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from optipfair import prune_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(source: str, fraction: float, text: str, out: str, criterion: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = load_file(text)["ids"]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * fraction,
        dataloader=DataLoader(batches, batch_size=4) if criterion == "hybrid" else None,  # type: ignore[arg-type]
        show_progress=False,
    )
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:6])
