"""The same task for secateur and for tools that install from PyPI: FFN channels, equal widths, then the same recovery.

    python benchmarks/peers/run.py --model smollm2-135m --ratio 0.2 --environment out/peers-venv --json peers.json

FFN channels of models with grouped queries are what Torch-Pruning and OptiPFair can both cut, so that is the task: so
many channels in every layer that ``--ratio`` of all parameters goes. Each gets the same model, the same calibration
text, and, for what it cuts, the same LoRA recovery and evaluation by secateur. The tools run in an environment that
this script makes; torch and transformers in it are those of the caller, so that nobody has an older version.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import secateur
from secateur import progress
from secateur.config import Recipe, revise
from secateur.data import Texts, read_texts
from secateur.evaluation import losses_by_source, parameter_count
from secateur.graph import trace
from secateur.precision import autocast_dtype
from secateur.recovery import RecoveryTask, recover, source_losses

TOOLS = {"torch-pruning": "1.6.1", "optipfair": "0.4.2"}
"""The newest on PyPI when this was written."""
RUNS = (
    ("torch-pruning", "cut_torch_pruning.py", "magnitude"),
    ("torch-pruning", "cut_torch_pruning.py", "taylor"),
    ("optipfair", "cut_optipfair.py", "weights"),
    ("optipfair", "cut_optipfair.py", "hybrid"),
)
OURS = ("magnitude", "wanda", "taylor", "fisher", "random")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with the tools; packages of the caller can be seen in it."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        place = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(place, "caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"{name}=={version}" for name, version in TOOLS.items()]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    return python


def perplexity(model: Any, texts: Texts, recipe: Recipe) -> dict[str, float]:
    assert texts.evaluation is not None
    dtype = autocast_dtype(recipe.evaluation.precision, model.device)
    losses = losses_by_source(model, texts.evaluation, batch_size=recipe.evaluation.batch_size, autocast=dtype)
    return {source: round(loss.perplexity, 2) for source, loss in losses.items()}


def recovery_task(recipe: Recipe, texts: Texts, dense: Path) -> RecoveryTask:
    """What ``prune`` gives the recovery of our own rows; the dense model is opened where something is asked of it."""
    assert texts.recovery is not None
    reference, teacher = {}, None
    if texts.validation is not None or recipe.recovery.teacher > 0:
        model, _ = secateur.load(str(dense))
        if texts.validation is not None:
            reference = source_losses(model, texts.validation, recipe.training)
        teacher = model if recipe.recovery.teacher > 0 else None
    return RecoveryTask(
        text=texts.recovery,
        instructions=texts.instructions,
        validation=texts.validation,
        reference=reference,
        teacher=teacher,
    )


def peers(arguments: argparse.Namespace, recipe: Recipe, texts: Texts, folder: Path, fraction: float) -> None:
    python = environment(arguments.environment)
    here = Path(__file__).parent
    for tool, script, criterion in RUNS:
        out = folder / f"{tool}-{criterion}"
        command = [str(python), str(here / script), str(folder / "dense"), str(fraction)]
        command += [str(folder / "ids.safetensors"), str(out), criterion]
        started = time.monotonic()
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        row: dict[str, Any] = {"tool": f"{tool} {TOOLS[tool]}", "criterion": criterion}
        if run.returncode:
            report(arguments, {**row, "error": run.stderr.strip().splitlines()[-1]})
            continue
        row["seconds_with_loading"] = round(time.monotonic() - started, 1)
        model, _ = secateur.load(str(out))
        row["parameters"] = parameter_count(model)
        row["pruned"] = perplexity(model, texts, recipe)
        if recipe.recovery.steps:
            task = recovery_task(recipe, texts, folder / "dense")
            recover(model, task, recipe.recovery, lora=recipe.lora, training=recipe.training, seed=recipe.seed)
            row["recovered"] = perplexity(model, texts, recipe)
        report(arguments, row)


def ours(arguments: argparse.Namespace, recipe: Recipe) -> None:
    for name in OURS:
        model, tokenizer = secateur.load(arguments.model)
        result = secateur.prune(model, tokenizer, recipe=revise(recipe, {"method": name}))
        row = {
            "tool": "secateur",
            "criterion": name,
            "seconds_of_scoring": result.metrics["seconds"]["decide"],
            "parameters": result.plan.parameters_after,
        }
        for state in ("pruned", "recovered"):
            if state in result.metrics:
                values = result.metrics[state]["perplexity"]
                row[state] = {source: round(value, 2) for source, value in values.items()}
        report(arguments, row)


def report(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--environment", type=Path, required=True, help="folder for the tools' virtual environment")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    progress.show()
    flags = {"model.name": arguments.model, "budget.ratio": arguments.ratio, "budget.ranking": "layer"}
    flags |= {"budget.kinds": ["ffn"], "evaluation.speed": False, "evaluation.baseline": None, "method": "taylor"}
    recipe = secateur.load_recipe(None, arguments.overrides, flags)
    model, tokenizer = secateur.load(arguments.model)
    texts = read_texts(model, tokenizer, recipe.texts, recipe.seed)
    graph = trace(model)
    channels = sum(graph.unit_cost(group) * group.size for group in graph.prunable if group.kind == "ffn")
    fraction = arguments.ratio * graph.parameter_count() / channels
    if fraction >= 1:
        sys.exit(f"The FFN holds {channels / graph.parameter_count():.0%} of all parameters; ask for a smaller ratio.")
    report(
        arguments, {"tool": "dense", "parameters": parameter_count(model), "pruned": perplexity(model, texts, recipe)}
    )
    assert texts.calibration is not None
    with tempfile.TemporaryDirectory(prefix="secateur-peers-") as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "dense")
        assert tokenizer is not None
        tokenizer.save_pretrained(folder / "dense")
        save_file({"ids": texts.calibration.ids}, folder / "ids.safetensors")
        del model
        peers(arguments, recipe, texts, folder, fraction)
    ours(arguments, recipe)


if __name__ == "__main__":
    main()
