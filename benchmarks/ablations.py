"""What each part of LoRAShear is worth: one setting changed at a time, several ratios and seeds, equal training tokens.

    python benchmarks/ablations.py run --analysis ANALYSIS/analysis.json --text wiki.test.raw --json ablations.jsonl
    python benchmarks/ablations.py table --json ablations.jsonl --write docs/methods/lorashear.md

``run`` appends a line for every finished run and leaves out what the file has already (the same recipe to the last
key and the same contents of the files that it names), so that it can be stopped at any time and called again. Every
variant has the steps of the default in all: warm-up, periods and recovery together. ``--text`` is a file that nothing
here trains on; ``--dry-run`` says what would be run. ``table`` prints Markdown: per ratio the geometric mean of
perplexity over the held-out sources, or perplexity of ``--text``, mean over seeds with the standard error of the
paired difference from the default. Runs are paired with those of their own default alone; each default of the file
(other settings, another text or model) has a table of its own, and so have, together, the rows of older files that do
not say which was theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import secateur
from secateur import progress
from secateur.compare.contents import digests
from secateur.config import Recipe, dump, load_recipe, revise
from secateur.data import read_ids
from secateur.evaluation import text_loss
from secateur.methods import METHODS
from secateur.precision import autocast_dtype
from secateur.workspace import read_json_lines

WINDOW, TOKENS = 512, 40_960
DEFAULT = "default"
BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"
Overrides = Mapping[str, Any]


def variants(default: Recipe, analysis: Path | None) -> dict[str, Overrides]:
    """Name → what differs from the default; only what really differs is listed."""
    own = default.method.settings.model_dump()
    warmup = own["warmup_steps"]
    steps = warmup + own["periods"] * own["period_steps"]
    criterion = max(own["saliency"], key=lambda name: own["saliency"][name])
    half = max(1, (steps - warmup) // 2)
    whole = steps + default.recovery.steps
    rank = default.lora.rank
    one_shot = {"method": criterion, "recovery.steps": whole, "recovery.repair": False}
    every: dict[str, Overrides] = {
        DEFAULT: {},
        "one shot, all steps in recovery": one_shot,
        "decay": {"method.projection": "decay"},
        "half-space": {"method.projection": "half-space"},
        "half-space, epsilon 0.5": {"method.projection": "half-space", "method.epsilon": 0.5},
        "two periods": {"method.periods": 2, "method.period_steps": half, "recovery.steps": whole - warmup - 2 * half},
        # patience 0, as a recovery that stops early would have read less than the others
        "dynamic shares": {"recovery.round_steps": max(1, default.recovery.steps // 4), "recovery.patience": 0},
        "constant shares": {"recovery.round_steps": 0},
        "two stages": {"recovery.instructions": ["self"]},
        "teacher": {"recovery.teacher": 0.5},
        "rank / 2": {"lora.rank": max(1, rank // 2), "lora.alpha": max(1, default.lora.alpha // 2)},
        "rank x 2": {"lora.rank": 2 * rank, "lora.alpha": 2 * default.lora.alpha},
        "rank x 4": {"lora.rank": 4 * rank, "lora.alpha": 4 * default.lora.alpha},
        "one shot with repair": {**one_shot, "recovery.repair": True},
    }
    if criterion not in METHODS:  # one of HESSO's proxies, say
        every = {name: more for name, more in every.items() if "method" not in more}
    proxies = ("magnitude", "average-magnitude", "cosine", "first-order", "second-order")
    every["saliency, five proxies"] = {"method.saliency": {f"hesso-{name}": 0.2 for name in proxies}}
    if warmup == 0 and own["periods"] == 1:  # what LoRA learned needs some steps before
        first = max(1, steps // 4)
        warm = {"method.warmup_steps": first, "method.period_steps": steps - first}
        by_lora = {f"hesso-{'lora-' if name in proxies[2:] else ''}{name}": 0.2 for name in proxies}
        every["warm-up"] = warm
        every["warm-up, saliency by LoRA"] = {**warm, "method.saliency": by_lora}
    if analysis is not None:
        for share in (0.05, 0.1, 0.2):
            protect = {"budget.protect_from": str(analysis), "budget.protect_share": share}
            every[f"analysis, {share:.0%} protected"] = protect
    plain = dump(default)
    return {name: more for name, more in every.items() if name == DEFAULT or dump(revise(default, more)) != plain}


def key(recipe: Recipe, text: Path | None) -> str:
    """What a finished run is known by: every setting, and what the files that it reads hold."""
    read = hashlib.sha256(text.read_bytes()).hexdigest() if text else None
    facts = [recipe.model_dump(mode="json"), digests(recipe, ()), read]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def family(recipe: Recipe, text: Path | None) -> str:
    """What runs that differ in nothing but seed and ratio have in common."""
    return key(revise(recipe, {"seed": 0, "budget.ratio": 0.5}), text)


def one_run(recipe: Recipe, text: Path | None) -> dict[str, Any]:
    """Prune, recover and measure."""
    started = time.monotonic()
    model, tokenizer = secateur.load(**recipe.model.model_dump())
    dtype, ids = autocast_dtype("auto", model.device), None
    if text is not None:
        ids = read_ids(text, tokenizer, WINDOW, TOKENS)
    result = secateur.prune(model, tokenizer, recipe=recipe)
    states = [state for state in ("dense", "pruned", "recovered") if state in result.metrics]
    row: dict[str, Any] = {
        "reached": result.plan.ratio_reached,
        "perplexity": {state: result.metrics[state]["perplexity"] for state in states},
        "rounds": result.metrics.get("recovery", {}).get("rounds", []),
    }
    if ids is not None:
        row["text"] = text_loss(model, ids, autocast=dtype).perplexity
    return row | {"seconds": round(time.monotonic() - started)}


def run(arguments: argparse.Namespace) -> None:
    finished = {row["key"] for row in read(arguments.json)}
    quiet = {"evaluation.speed": False, "evaluation.baseline": None}
    flags = {"model.name": arguments.model, "method": "lorashear"}
    default = revise(load_recipe(None, arguments.overrides, flags), quiet)
    known = variants(default, arguments.analysis)
    chosen = [name.strip() for name in arguments.variants.split(";")] if arguments.variants else list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise SystemExit(f"There is no variant {', '.join(unknown)}; there are: {'; '.join(known)}")
    wanted = [
        (seed, ratio, name)
        for seed in map(int, arguments.seeds.split(","))  # seeds outermost: a stopped run has whole rows of the table
        for ratio in map(float, arguments.ratios.split(","))
        for name in chosen
    ]
    for number, (seed, ratio, name) in enumerate(wanted, start=1):
        recipe = revise(default, {"seed": seed, "budget.ratio": ratio, **known[name]})
        mark = key(recipe, arguments.text)
        print(f"{number}/{len(wanted)} {name}, ratio {ratio}, seed {seed}: ", end="", flush=True)
        if mark in finished or arguments.dry_run:
            print("there already" if mark in finished else f"to do, {dict(known[name])}")
            continue
        row = {"key": mark, "variant": name, "ratio": ratio, "seed": seed, "changes": dict(known[name])}
        row |= {"family": family(recipe, arguments.text), "default": family(default, arguments.text)}
        row |= {"settings": [arguments.model, *arguments.overrides]}
        row |= one_run(recipe, arguments.text)
        with arguments.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number_of(row):.2f} in {row['seconds']} s", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The finished runs; a line that a kill cut short is left out."""
    return read_json_lines(file) if file.exists() else []


def number_of(row: Mapping[str, Any]) -> float:
    """The one number of a run: perplexity of the text, or the geometric mean over the held-out sources."""
    if "text" in row:
        return float(row["text"])
    states = row["perplexity"]
    return statistics.geometric_mean(states.get("recovered", states["pruned"]).values())


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each default, under its settings where there are several."""
    found: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("default"), []).append(row)
    if len(found) == 1:
        return table(rows)
    return "\n".join(f"{_default_of(own[0])}:\n\n{table(own)}" for own in found.values())


def _default_of(row: Mapping[str, Any]) -> str:
    if "default" not in row:
        return "Runs that do not say what their default was"
    return f"Default {row['default'][:6]}, {' '.join(row['settings'])}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each variant, two columns for each ratio; rows of one default."""
    ratios = sorted({row["ratio"] for row in rows})
    lines_of = list(dict.fromkeys(_line(row) for row in rows))
    latest = {(_line(row), row["ratio"], row["seed"]): number_of(row) for row in rows}
    base = {(ratio, seed): value for ((name, _), ratio, seed), value in latest.items() if name == DEFAULT}
    head = "".join(f" {ratio:.0%} | against the default |" for ratio in ratios)
    lines = [f"| variant |{head}", f"| --- |{' ---: | ---: |' * len(ratios)}"]
    for line in lines_of:
        name, mark = line
        cells = []
        for ratio in ratios:
            own = {seed: value for (which, at, seed), value in latest.items() if (which, at) == (line, ratio)}
            logs = [math.log(value / base[ratio, seed]) for seed, value in own.items() if (ratio, seed) in base]
            cells += [_mean(list(own.values())), "" if name == DEFAULT else _change(logs)]
        alone = [other for other, _ in lines_of].count(name) == 1
        lines.append(f"| {name if alone else f'{name} ({mark[:6]})'} | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    where = "the text that nothing trained on" if all("text" in row for row in rows) else "the held-out sources"
    return "\n".join([*lines, "", f"Perplexity of {where}; seeds {', '.join(map(str, seeds))}."]) + "\n"


def _line(row: Mapping[str, Any]) -> tuple[str, str]:
    """What the line of a row is known by: one name may stand for several families (of two analyses, say)."""
    return row["variant"], row.get("family", "")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" if values else ""


def _change(logs: Sequence[float]) -> str:
    """Mean paired change, with its standard error when there are several seeds."""
    if not logs:
        return ""
    error = f" ± {100 * statistics.stdev(logs) / math.sqrt(len(logs)):.1f}" if len(logs) > 1 else ""
    return f"{100 * math.expm1(statistics.fmean(logs)):+.1f}{error} %"


def write(text: str, page: Path) -> None:
    """Put the table between the marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the table: add the lines {BEGIN} and {END}.")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--json", type=Path, required=True)
    runs.add_argument("--model", default="smollm2-135m")
    runs.add_argument("--variants", help="names with semicolons between them; all when left out")
    runs.add_argument("--ratios", default="0.2,0.5")
    runs.add_argument("--seeds", default="0,1,2")
    runs.add_argument("--analysis", type=Path, help="analysis.json of the model, from `secateur analyze`")
    runs.add_argument("--text", type=Path, help="text that nothing trains on, such as WikiText-2's wiki.test.raw")
    runs.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    runs.add_argument("--dry-run", action="store_true")
    shown = commands.add_parser("table")
    shown.add_argument("--json", type=Path, required=True)
    shown.add_argument("--write", type=Path, help="page to put the table into")
    arguments = parser.parse_args()
    if arguments.command == "run":
        progress.show()
        run(arguments)
        return
    text = tables(read(arguments.json))
    print(text)
    if arguments.write is not None:
        write(text, arguments.write)


if __name__ == "__main__":
    main()
