"""What scoring costs: peak memory of LoRA-guided scores against full-gradient Taylor.

    python benchmarks/scoring_memory.py --model smollm2-135m --json scoring.json

Every measurement runs in a process of its own, on the same model and the same batch of windows. Peak memory is the
highest resident memory of the process (``VmHWM``), whole and without what Python and the libraries take before there
is a model. Scores: first-order Taylor with gradients of all weights (as LLM-Pruner's code keeps them) or of the
prunable ones alone, and the LoRA-guided estimate. Each is measured "plainly" (the whole batch at once) and "frugally"
(one window at a time, activations recomputed layer by layer: how the criterion comes), since what both share hides what
they differ in. What a whole training step costs: benchmarks/step_cost.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCORES = ("taylor, all weights", "taylor, prunable weights", "lora")


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
        parameter.data = parameter.data.to(getattr(torch, arguments.dtype))
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
    from secateur.importance import Adapters, Taylor
    from secateur.importance.base import borrowed, mean_loss_backward, recomputed

    before = resident()
    model, graph, ids = prepare(arguments, adapters=arguments.what == "lora")
    blocks = TokenBlocks(ids, ("noise",) * len(ids))
    gc.collect()
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew, without what loading took
    started = time.monotonic()
    size = 1 if arguments.frugal else arguments.batch
    with recomputed(model, arguments.frugal):
        if arguments.what == "taylor, all weights":
            with borrowed(model, [name for name, _ in model.named_parameters()]):
                mean_loss_backward(model, blocks, size)
        elif arguments.what == "lora":
            _check(Adapters(batch_size=size, recompute=False).score(model, graph, blocks, 0))
        else:
            _check(Taylor(batch_size=size).score(model, graph, blocks, 0))
    seconds = time.monotonic() - started
    peak = resident()["peak"]
    return {
        "what": arguments.what,
        "how": "frugally" if arguments.frugal else "plainly",
        "peak": peak,
        "peak_without_libraries": peak - before["now"],
        "on_top_of_model": peak - loaded["now"],
        "seconds": round(seconds, 2),
    }


def _check(scores: Any) -> None:
    assert all(bool(scores[name].isfinite().all()) for name in scores)


def in_a_process(arguments: argparse.Namespace, what: str, frugal: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--what", what, "--model", arguments.model, "--dtype", arguments.dtype]
    command += ["--batch", str(arguments.batch), "--window", str(arguments.window)]
    run = subprocess.run([*command, *(["--frugal"] if frugal else [])], capture_output=True, text=True)
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--frugal", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what is not None:
        print(json.dumps(score(arguments)))
        return
    rows = [in_a_process(arguments, what, frugal) for frugal in (False, True) for what in SCORES]
    found = {(row["what"], row["how"]): row for row in rows}
    for lora, taylor in (("plainly", "plainly"), ("frugally", "frugally"), ("frugally", "plainly")):
        for what in SCORES[:2]:
            ours, other = found["lora", lora], found[what, taylor]
            ratios = [ours[key] / other[key] for key in ("peak_without_libraries", "peak", "seconds")]
            print(
                f"LoRA-guided {lora} / {what} {taylor}: memory {ratios[0]:.3f} "
                f"(with Python and libraries {ratios[1]:.3f}), time {ratios[2]:.2f}"
            )
    if arguments.json is not None:
        settings = {key: getattr(arguments, key) for key in ("model", "batch", "window", "dtype")}
        arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
