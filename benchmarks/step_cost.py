"""What a training step costs under LHSPG and under LoRAPrune, against a plain LoRA step: time and peak memory.

    python benchmarks/step_cost.py --model smollm2-135m --ratio 0.2 --json step_cost.json

Time: in one process and on the same weights the arms take turns, in another order in every round, each with the same
batch, optimiser and precision, and what the Trainer does in a step: forward, backward, clip, optimiser, callback. What
is given is the median over rounds of a step of the arm / the plain step of that round, with the quartiles; and two
numbers that the noise of the machine moves less: the fastest step of the arm / the fastest plain step, and what the
arm's callback alone takes of a plain step (the masks of the forward and backward pass are not in it). Peak memory: a
process for each arm, the highest resident memory (``VmHWM``; on CUDA ``max_memory_allocated``) over some steps after
the first ones, whole and without what Python and the libraries take before there is a model.

LHSPG projects the units that go at ``--ratio`` in the middle of a long period, LoRAPrune scores in every step and has
its masks on. ``--tiny`` takes a small random Llama, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur
from secateur.importance import CRITERIA
from secateur.methods.guided import GuidedPruning
from secateur.methods.lhspg import Decay, HalfSpace
from secateur.methods.loraprune import LoRAPruneSettings
from secateur.planning import Budget, allocate, restrict
from secateur.precision import autocast
from secateur.surgery import sharing_copy
from secateur.training import LoraSettings, attach_lora

PLAIN = "plain LoRA"
ARMS = (PLAIN, "lhspg, decay", "lhspg, half-space", "loraprune")
LONG = 10_000
"""Steps of the period that is looked into: its end, which only writes zeros, is not part of the measurement."""

Step = Callable[[int], tuple[float, float]]
"""Number of the step → seconds, and those of them that are spent in the callback."""


def prepare(arguments: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """The model with adapters, and one batch of ids."""
    torch.manual_seed(0)
    if arguments.tiny:
        shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "vocab_size": 512}
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))
        model = model.to(arguments.device)
    else:
        model = secateur.load(arguments.model, device=arguments.device)[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (arguments.batch, arguments.window), generator=torch.Generator().manual_seed(0))
    adapted = attach_lora(model, LoraSettings(rank=arguments.rank, alpha=2 * arguments.rank), seed=0)
    return adapted.train(), ids.to(model.device)


def callback_of(arm: str, model: Any, arguments: argparse.Namespace) -> Any:
    """What the Trainer would call in every step; begun on ``model``."""
    budget = Budget(ratio=arguments.ratio)
    graph = restrict(secateur.trace(model), budget)
    if arm == "loraprune":
        own = LoRAPruneSettings()
        # a schedule that goes on all the time, so that decisions are part of the measurement
        callback: Any = GuidedPruning(
            graph, budget, lambda step: min(0.99, 0.5 + step / LONG), every=own.every, criterion=own
        )
    else:
        scores = CRITERIA["random"]().score(model, graph, None, 0)
        kind = Decay if arm.endswith("decay") else HalfSpace
        callback = kind(graph, allocate(graph, scores, budget), {}, steps=LONG)
    callback.on_train_begin(SimpleNamespace(max_grad_norm=0.0), SimpleNamespace(global_step=0), None, model=model)
    return callback


def steps_of(arms: tuple[str, ...], arguments: argparse.Namespace) -> tuple[dict[str, Step], Any]:
    """A function for each arm that makes its n-th step; all on the same weights."""
    model, ids = prepare(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def step_of(arm: str) -> Step:
        own = sharing_copy(model) if arm == "loraprune" else model  # masks hang on modules, not on weights
        callback = None if arm == PLAIN else callback_of(arm, own, arguments)

        def called(event: str, number: int, **kwargs: Any) -> float:
            synchronise()
            started = time.perf_counter()
            if callback is not None:
                getattr(callback, event)(None, SimpleNamespace(global_step=number), None, **kwargs)
            synchronise()
            return time.perf_counter() - started

        def step(number: int) -> tuple[float, float]:
            synchronise()
            started = time.perf_counter()
            with autocast("auto", model.device):
                loss = own(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            within = called("on_pre_optimizer_step", number, model=own)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            within += called("on_optimizer_step", number, model=own)
            optimiser.zero_grad()
            synchronise()
            return time.perf_counter() - started, within

        return step

    return {arm: step_of(arm) for arm in arms}, model


def timed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms in turns."""
    steps, _ = steps_of(ARMS, arguments)
    for step in steps.values():
        step(0)
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    within: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(1, arguments.steps + 1):
        order = [ARMS[(number + place) % len(ARMS)] for place in range(len(ARMS))]
        for arm in order:
            whole, part = steps[arm](number)
            taken[arm].append(whole)
            within[arm].append(part)
    rows: list[dict[str, Any]] = []
    plain_step = statistics.median(taken[PLAIN])
    for arm in ARMS:
        ratios = [own / plain for own, plain in zip(taken[arm], taken[PLAIN], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "arm": arm,
                "seconds": round(statistics.median(taken[arm]), 4),
                "steps": len(ratios),
                "time_ratio": round(statistics.median(ratios), 3),
                "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
                "fastest_ratio": round(min(taken[arm]) / min(taken[PLAIN]), 3),
                "callback_ratio": round(statistics.median(within[arm]) / plain_step, 3),
            }
        )
    return rows


def resident() -> dict[str, int]:
    """Bytes of this process in memory now and at most since the mark was set anew."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[name].split()[0]) * 1024 for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}


def peak_of(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In this process: a few steps of one arm, and the most memory that they took."""
    before = resident()["now"]
    steps, model = steps_of((arm,), arguments)
    for number in range(2):
        steps[arm](number)
    gc.collect()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    for number in range(2, 2 + max(3, LoRAPruneSettings().every)):
        steps[arm](number)
    peak = torch.cuda.max_memory_allocated() if cuda else resident()["peak"]
    return {"peak": peak, "peak_without_libraries": peak if cuda else peak - before}


def in_a_process(arm: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder, hub id or built-in name")
    parser.add_argument("--tiny", action="store_true", help="a small random model instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each arm")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm is not None:
        print(json.dumps(peak_of(arguments.arm, arguments)))
        return
    rows = timed(arguments)
    if not arguments.no_memory:
        plain = None
        for row in rows:
            found = in_a_process(row["arm"])
            plain = plain or found
            row |= found | {f"{key}_ratio": round(found[key] / plain[key], 3) for key in found}
    for row in rows:
        memory = "".join(
            f", {key} {row[key]:.3f}" for key in ("peak_ratio", "peak_without_libraries_ratio") if key in row
        )
        time_ratio = f"time ratio {row['time_ratio']:.3f} {row['quartiles']}, fastest {row['fastest_ratio']:.3f}"
        time_ratio += f", callback alone {row['callback_ratio']:.3f}"
        print(f"{row['arm']}: {row['seconds']} s a step, {time_ratio}{memory}")
    if arguments.json is not None:
        settings = {
            key: getattr(arguments, key) for key in ("model", "tiny", "device", "ratio", "rank", "batch", "window")
        }
        arguments.json.write_text(
            json.dumps({**settings, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
