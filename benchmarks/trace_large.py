"""Time and memory of finding the groups of large models, from their configurations alone.

    python benchmarks/trace_large.py --json trace.jsonl

Each model is built without weights and traced in a process of its own; then the groups are checked on its narrow
stand-in, as ``secateur inspect`` and every run do. Peak memory is that of the process, with Python and torch, which
alone need ``baseline`` megabytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.graph import trace
from secateur.surgery import protect_failing

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-70B": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "Mixtral-8x22B": (
        "mixtral",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32768,
            "sliding_window": None,
        },
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
}


def measure(name: str) -> dict[str, Any]:
    """What one model costs; to be called once in a process, since the peak is that of its whole life."""
    torch.set_num_threads(1)
    baseline = _peak()
    started = time.perf_counter()
    model_type, sizes = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.bfloat16)
    built = time.perf_counter()
    graph = trace(model)
    traced = time.perf_counter()
    checked_graph = protect_failing(model, graph)
    checked = time.perf_counter()
    return {
        "model": name,
        "parameters": graph.parameter_count(),
        "groups": dict(Counter(group.kind for group in checked_graph)),
        "may_be_cut": dict(Counter(group.kind for group in checked_graph.prunable)),
        "seconds_to_build": round(built - started, 2),
        "seconds_to_trace": round(traced - built, 2),
        "seconds_to_check": round(checked - traced, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "baseline_megabytes": baseline,
        "peak_megabytes": _peak(),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", type=Path, help="append the results to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.models[0])))
        return
    for name in arguments.models:
        command = [sys.executable, __file__, name, "--here"]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
        print(line, flush=True)
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
