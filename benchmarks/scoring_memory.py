"""What scoring costs: peak memory of LoRA-guided scores against full-gradient Taylor.

    python benchmarks/scoring_memory.py --model smollm2-135m --json scoring.json

Every measurement runs in a process of its own, on the same model and the same batch of windows. Peak memory is the
highest resident memory of the process (``VmHWM``), whole and without what Python and the libraries take before there
is a model. Scores: first-order Taylor with gradients of all weights (as LLM-Pruner's code keeps them) or of the
prunable ones alone, and the LoRA-guided estimate, each in three ways:

* "plainly": the whole batch at once, as LLM-Pruner's code runs it, and as the Taylor criterion comes (four windows);
* "by window": one window at a time;
* "frugally": one window at a time, activations recomputed layer by layer, as the LoRA-guided criterion comes.

In all of them the logits of a few positions are held at a time. When both are frugal, little is left but the weights W
and their gradients G, so that the ratio cannot be much below W / (W + G): a half with gradients of all weights in the
same type. ``--base bfloat16`` holds the frozen weights of the LoRA-guided rows in that type, which only a criterion
without gradients of the weights can afford.

glibc keeps freed tensors of up to 32 MB on its heap, where aligned blocks leave holes that hardly anything fits into
again; resident memory is then up to twice what is in use. Here both sides run with ``MALLOC_MMAP_THRESHOLD_=65536``,
which gives every tensor back when it is freed (``--heap default`` measures without). What a whole training step costs:
benchmarks/step_cost.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCORES = ("taylor, all weights", "taylor, prunable weights", "lora")
WAYS = ("plainly", "by window", "frugally")


def resident() -> dict[str, int]:
    """Bytes in memory now and at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[name].split()[0]) * 1024 for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}


def prepare(arguments: argparse.Namespace, adapters: bool) -> tuple[Any, Any, Any]:
    """The model, with adapters or without; its graph; and one batch of ids."""
    import torch

    import secateur
    from secateur.planning import Budget, restrict
    from secateur.training import LoraSettings, attach_lora

    model: Any = secateur.load(arguments.model)[0]
    for parameter in model.parameters():
        # a copy, so that the weights are in memory, and not pages of a file that are read when they are needed
        parameter.data = parameter.data.to(getattr(torch, arguments.base if adapters else arguments.dtype), copy=True)
    if adapters:
        model = attach_lora(model, LoraSettings(), seed=0)
    graph = restrict(secateur.trace(model), Budget())
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (arguments.batch, arguments.window), generator=generator)
    return model, graph, ids


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, score one batch by ``arguments.what``, and report memory."""
    from secateur.data import TokenBlocks
    from secateur.importance import Taylor
    from secateur.importance.lora import AdapterGradients, LoRA
    from secateur.training import attach_lora  # noqa: F401  what it imports is no memory of the model
    from secateur.walk import Calibration, borrowed, recomputed

    before = resident()
    model, graph, ids = prepare(arguments, adapters=arguments.what == "lora")
    size = arguments.batch if arguments.way == "plainly" else 1
    text = Calibration(TokenBlocks(ids, ("noise",) * len(ids)), size)
    gc.collect()
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew, without what loading took
    started = time.monotonic()
    with recomputed(model, arguments.way == "frugally"):
        if arguments.what == "taylor, all weights":
            with borrowed(model, [name for name, _ in model.named_parameters()]):
                text.backward(model)
        elif arguments.what == "lora":  # not by LoRA().score, which always recomputes
            with borrowed(model, [name for name, _ in model.named_parameters() if ".lora_" in name]):
                text.backward(model)
                _check(AdapterGradients(model, graph, LoRA()).scores())
        else:
            _check(Taylor().score(model, graph, text, 0))
    seconds = time.monotonic() - started
    peak = resident()["peak"]
    return {
        "what": arguments.what,
        "how": arguments.way,
        "peak": peak,
        "peak_without_libraries": peak - before["now"],
        "on_top_of_model": peak - loaded["now"],
        "seconds": round(seconds, 2),
    }


def _check(scores: Any) -> None:
    assert all(bool(scores[name].isfinite().all()) for name in scores)


def in_a_process(arguments: argparse.Namespace, what: str, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--what", what, "--way", way]
    for key in ("model", "dtype", "base", "batch", "window"):
        command += [f"--{key}", str(getattr(arguments, key))]
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536"} if arguments.heap == "exact" else {}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | heap)
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--base", choices=("float32", "bfloat16"), help="of the LoRA-guided rows; default: --dtype")
    parser.add_argument("--heap", choices=("exact", "default"), default="exact", help="see above")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, default="plainly", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.base = arguments.base or arguments.dtype
    if arguments.what is not None:
        print(json.dumps(score(arguments)))
        return
    rows = [in_a_process(arguments, what, way) for way in WAYS for what in SCORES]
    found = {(row["what"], row["how"]): row for row in rows}
    for lora, taylor in (*((way, way) for way in WAYS), ("frugally", "by window"), ("frugally", "plainly")):
        for what in SCORES[:2]:
            ours, other = found["lora", lora], found[what, taylor]
            ratios = [ours[key] / other[key] for key in ("peak_without_libraries", "peak", "seconds")]
            print(
                f"LoRA-guided {lora} / {what} {taylor}: memory {ratios[0]:.3f} "
                f"(with Python and libraries {ratios[1]:.3f}), time {ratios[2]:.2f}"
            )
    if arguments.json is not None:
        settings = {key: getattr(arguments, key) for key in ("model", "batch", "window", "dtype", "base", "heap")}
        arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
