"""Quality per token: the decisive experiments, each over several seeds, in one call that can be stopped and repeated.

    python benchmarks/quality.py --out quality.jsonl --text wiki.test.txt
    python benchmarks/quality.py --out quality.jsonl --text wiki.test.txt --only curve,methods --up-to 1.6M

Every row of an experiment is a set of recipe keys, run for every seed from the dense model: ``secateur``'s own stages
in memory, measured dense, pruned and recovered. A finished run is a line of ``--out``, and is not repeated: it is known
by every key of its recipe and by the contents of the files that it reads. A killed run starts again. At the end, and
with ``--dry-run``, a table of each experiment is printed in Markdown, with the spread over seeds beside every change.

``--text`` is a file that is only measured, such as WikiText-2's raw test as .txt; without it, the held-out part of the
built-in text is measured. ``--up-to`` leaves out rows of more tokens. Nothing here depends on the device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import secateur
from secateur import progress
from secateur.compare.contents import digests
from secateur.compare.rows import metric_of
from secateur.compare.run import pruning_steps
from secateur.config import Recipe, load_recipe, revise
from secateur.data import check_sources, load_whole, read_texts
from secateur.effort import count_of
from secateur.errors import InputError, SecateurError
from secateur.evaluation import evaluate_tasks, machine
from secateur.evaluation.tasks import check_tasks
from secateur.planning import versions
from secateur.stages import Result, make, rehearse, sized, texts_of, with_possible_repair
from secateur.surgery import checked_trace
from secateur.types import DependencyGraph
from secateur.workspace import Workspace, read_json_lines

CURVE = (45_000, 200_000, 800_000, 1_600_000, 6_500_000)
"""Training tokens."""
TOTALS = (200_000, 1_600_000)
"""Tokens of all stages together, for every method."""
METHODS = ("fisher", "gisp", "ddp", "lorashear", "loraprune", "llm-pruner", "obs", "random")
OWN_STEPS = {"ddp": "steps", "lorashear": "period_steps", "loraprune": "steps"}
"""Method that trains → the key of its steps."""
OWN_SHARE = 0.3
"""Their part of all tokens."""
TEXT_TOKENS = 40_960
RATIOS = (0.2, 0.5)
WIDTHS = {
    "uniform": ("fisher", "layer"),
    "ranked": ("fisher", "global"),
    "gisp": ("gisp", "global"),
    "searched": ("evopress", "global"),
}
"""Row → method, ``budget.ranking``."""
Flags = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of an experiment."""

    experiment: str
    name: str
    against: str
    """The row of the same experiment that it is compared with."""
    flags: Flags
    ratios: Sequence[float] = RATIOS


@dataclass(frozen=True, eq=False)
class Run:
    """A row at one ratio with one seed."""

    row: Row
    recipe: Recipe
    key: str


def experiments(default: Recipe) -> list[Row]:
    """Every row of every experiment, by the recipe that its keys are put into."""
    step, rows = step_tokens(default), []
    gisp: Any = revise(default, {"method": {"name": "gisp"}}).method.settings
    windows = {"calibration.tokens": gisp.cuts * gisp.windows * default.calibration.window}  # each is read once
    for tokens, kind, teacher in product(CURVE, ("lora", "full"), (0, 1)):
        flags = {"recovery.steps": tokens // step, "recovery.tokens": max(tokens, default.recovery.tokens)}
        flags |= {"recovery.finetuning": kind, "recovery.teacher": teacher}
        rows.append(Row("curve", f"{tokens:,} {kind}, KL {teacher}", f"{tokens:,} lora, KL 0", flags))
    rows.append(Row("refit", "off", "off", {"recovery.repair": False}))
    for tokens in (8_192, 32_768, 131_072):
        rows.append(Row("refit", f"{tokens:,}", "off", {"recovery.repair": True, "recovery.repair_tokens": tokens}))
    for repair, on in product((False, True), repeat=2):
        name = f"repair {'on' if repair else 'off'}, reconstruction {'on' if on else 'off'}"
        flags = {"recovery.repair": repair, "recovery.reconstruct": on}
        rows.append(Row("reconstruction", name, "repair off, reconstruction off", flags))
    for total, method in product(TOTALS, METHODS):
        flags = {"method": {"name": method}, "effort.tokens": total, **(windows if method == "gisp" else {})}
        if method in OWN_STEPS:
            flags[f"method.{OWN_STEPS[method]}"] = int(OWN_SHARE * total) // step
        rows.append(Row("methods", f"{total:,} {method}", f"{total:,} {METHODS[0]}", flags))
    for name, (method, ranking) in WIDTHS.items():
        flags = {"method": {"name": method}, "budget.ranking": ranking, **windows}
        rows.append(Row("widths", name, "uniform", flags, (0.5,)))
    return rows


def step_tokens(recipe: Recipe) -> int:
    """Tokens of an optimiser step."""
    return recipe.training.batch_size * recipe.recovery.window


def runs_of(rows: Sequence[Row], default: Recipe, arguments: argparse.Namespace) -> list[Run]:
    """What was asked for. Seeds outermost: a stopped call has whole experiments."""
    names = list(dict.fromkeys(row.experiment for row in rows))
    unknown = sorted(set(arguments.only) - set(names))
    if unknown:
        raise InputError(f"There is no experiment {', '.join(unknown)}; there are: {', '.join(names)}.")
    chosen, found = [row for row in rows if row.experiment in (arguments.only or names)], []
    for seed, row, ratio in product(arguments.seeds, chosen, arguments.ratios):
        recipe = revise(default, {"seed": seed, "budget.ratio": ratio, **row.flags})
        tokens = recipe.effort.tokens or recipe.recovery.steps * step_tokens(recipe)
        if ratio in row.ratios and tokens <= arguments.up_to:
            facts = [recipe.model_dump(mode="json"), digests(recipe, arguments.tasks), arguments.tasks]
            mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
            found.append(Run(row, recipe, mark))
    return found


def settled(recipe: Recipe, model: PreTrainedModel) -> tuple[Recipe, DependencyGraph]:
    """The recipe with the amounts of every stage, and the graph of the model."""
    graph = checked_trace(model, recipe.budget.kinds)
    return sized(with_possible_repair(recipe, model, graph), model, graph), graph


def amounts(recipe: Recipe, text: Mapping[str, int]) -> dict[str, int]:
    """Stage → tokens, by the tokens of text of every purpose; a stage that reads its text twice counts it once."""
    read = {stage: text[stage] for stage in ("calibration", "repair", "reconstruct") if stage in text}
    trained = {"method": pruning_steps(recipe), "recovery": recipe.recovery.steps}
    return read | {stage: steps * step_tokens(recipe) for stage, steps in trained.items() if steps}


def one_run(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """Prune, recover and measure."""
    model, tokenizer = secateur.load(**run.recipe.model.model_dump())
    recipe, graph = settled(run.recipe, model)
    wanted = dict(texts_of(recipe, graph))
    measured_on = wanted.pop("evaluation")
    texts = read_texts(model, tokenizer, wanted, recipe.seed)
    texts = replace(texts, evaluation=load_whole(measured_on, tokenizer, recipe.seed, measured_on.tokens))
    result = Result(model, tokenizer, rehearse(model, graph, recipe), graph, recipe)
    make(result, texts, Workspace(None), lambda stage: nullcontext())
    numbers, states = result.metrics, ("dense", "pruned", "recovered")
    with torch.no_grad():
        scores = evaluate_tasks(model, tokenizer, tasks, batch_size=recipe.evaluation.batch_size) if tasks else {}
    line: dict[str, Any] = {
        "model": recipe.model.name,
        "ratio": recipe.budget.ratio,
        "reached": result.plan.ratio_reached,
    }
    line |= {"seed": recipe.seed, "seconds": numbers["seconds"], "measured_tokens": numbers["tokens"], "tasks": scores}
    line["tokens"] = amounts(recipe, {name: blocks.ids.numel() for name, blocks in vars(texts).items() if blocks})
    line["perplexity"] = {state: numbers[state]["perplexity"] for state in states if state in numbers}
    return line | {"machine": machine(), "versions": versions()}


def finished(file: Path) -> dict[str, dict[str, Any]]:
    """Key → line of every finished run; a line that a kill cut short is left out."""
    return {line["key"]: line for line in (read_json_lines(file) if file.exists() else [])}


def number(line: Mapping[str, Any], state: str) -> float:
    """Perplexity in a state, over all sources together; of the last state where there was no recovery."""
    by_source, tokens = line["perplexity"].get(state, line["perplexity"]["pruned"]), line["measured_tokens"]
    return math.exp(sum(tokens[name] * math.log(by_source[name]) for name in tokens) / sum(tokens.values()))


def tables(runs: Sequence[Run], done: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a table for each experiment and ratio of which a run is finished."""
    found: dict[tuple[str, float], dict[Row, dict[int, Mapping[str, Any]]]] = {}
    for run in runs:
        if run.key in done:
            place = run.row.experiment, run.recipe.budget.ratio
            found.setdefault(place, {}).setdefault(run.row, {})[run.recipe.seed] = done[run.key]
    text = []
    for (experiment, ratio), lines in sorted(found.items(), key=lambda item: item[0]):
        by_name = {row.name: own for row, own in lines.items()}
        dense = statistics.fmean(number(line, "dense") for own in lines.values() for line in own.values())
        text += [f"### {experiment}, {ratio:.0%}", "", f"Dense {dense:.2f}. {_LEGEND}", "", *_HEAD]
        text += [*(_cells(row, own, by_name.get(row.against, {})) for row, own in lines.items()), ""]
    return "\n".join(text)


_LEGEND = "Mean over seeds ± standard deviation (max − min); changes of recovered perplexity, paired by seed."
_HEAD = (
    "| row | seeds | tokens | seconds | pruned | recovered | tasks | against | change |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
)


def _cells(row: Row, own: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> str:
    lines, last = own.values(), {seed: number(line, "recovered") for seed, line in own.items()}
    changes = [100 * (last[seed] / number(base[seed], "recovered") - 1) for seed in last if seed in base]
    means = [statistics.fmean(sum(line[what].values()) for line in lines) for what in ("tokens", "seconds")]
    scored = [[s[metric_of(s)] for s in line["tasks"].values() if metric_of(s)] for line in lines]
    cells = [row.name, ",".join(map(str, own)), *(f"{mean:,.0f}" for mean in means)]
    cells += [_spread([number(line, "pruned") for line in lines], ".2f"), _spread(list(last.values()), ".2f")]
    cells += [_spread([statistics.fmean(accuracies) for accuracies in scored if accuracies], ".3f")]
    cells += ["", ""] if row.name == row.against else [row.against, _spread(changes, "+.1f", " %")]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean ± standard deviation (max − min); a single seed has no spread."""
    if len(values) < 2:
        return f"{values[0]:{form}}{unit} (one seed)" if values else ""
    apart = torch.tensor(values, dtype=torch.float64).std(), max(values) - min(values)
    deviation, most = (f"{float(value):{form.lstrip('+')}}" for value in apart)
    return f"{statistics.fmean(values):{form}} ± {deviation} ({most}){unit}"


def work(runs: Sequence[Run], arguments: argparse.Namespace) -> int:
    """Make every run that is not finished, or only say which. Returns how many failed."""
    done, failed, model = finished(arguments.out), 0, None
    for index, run in enumerate(runs, start=1):
        where = f"{run.row.experiment}, {run.row.name}, {run.recipe.budget.ratio:.0%}, seed {run.recipe.seed}"
        print(f"{index}/{len(runs)} {where}: ", end="", flush=True)
        if run.key in done:
            print("there already")
            continue
        try:
            if arguments.dry_run:
                model = model or secateur.load(**run.recipe.model.model_dump())[0]
                recipe, graph = settled(run.recipe, model)
                tokens = amounts(recipe, {name: text.tokens for name, text in texts_of(recipe, graph).items()})
                print(f"{sum(tokens.values()):,} tokens:", ", ".join(f"{key} {tokens[key]:,}" for key in tokens))
                continue
            line = {"key": run.key, "experiment": run.row.experiment, "row": run.row.name}
            line |= {"changes": dict(run.row.flags), **one_run(run, arguments.tasks)}
        except Exception as error:  # a ratio out of reach, too little memory; the next call tries it again
            failed += 1
            print(f"failed: {type(error).__name__}: {error}")
            continue
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        done[run.key] = line
        print(f"{number(line, 'pruned'):.2f}, then {number(line, 'recovered'):.2f}", flush=True)
    print("\n" + tables(runs, done))
    return failed


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of values with commas between them."""
    return lambda text: [of(item.strip()) for item in text.split(",") if item.strip()]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each finished run")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", type=listed(str), default=[], metavar="EXPERIMENT,...")
    parser.add_argument("--ratios", type=listed(float), default=list(RATIOS))
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2])
    parser.add_argument("--up-to", type=count_of, default="200k", help="the most tokens of a row; default 200k")
    parser.add_argument("--text", type=Path, help="a text file that is only measured")
    parser.add_argument("--tasks", type=listed(str), default=[], help="as in secateur evaluate")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and their tokens")
    arguments = parser.parse_args(given)
    flags: dict[str, Any] = {"model.name": arguments.model, "evaluation.speed": False, "evaluation.baseline": None}
    if arguments.text is not None:
        flags |= {"evaluation.text": [str(arguments.text)], "evaluation.tokens": TEXT_TOKENS}
    try:
        check_tasks(arguments.tasks)
        default = load_recipe(None, arguments.overrides, flags)
        check_sources(default.evaluation)
        runs = runs_of(experiments(default), default, arguments)
    except SecateurError as error:
        raise SystemExit(str(error)) from error
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    progress.show(not arguments.dry_run)
    return work(runs, arguments)


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
