"""Does pruning keep a language that the text it looks at does not have? The same run with English and with own text.

    python benchmarks/another_language.py --model smollm2-135m --json language.jsonl

Two runs of one recipe, which differ only in what calibration and training read: the built-in English sources, or
``--text``, UTF-8 in any script. Both are measured on held-out parts of ``--text`` and of the English Wikipedia. Without
``--text`` it is Bulgarian: pages of Wikipedia that gensim carries among its test data (40,000 characters). A tokenizer
that knows no Cyrillic falls back to bytes, so that perplexities are those of tokens, to be compared down a column only.
"""

from __future__ import annotations

import argparse
import bz2
import html
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import secateur
from secateur import progress
from secateur.config import load_recipe, revise
from secateur.data.wikimarkup import prose

ENGLISH = ["wikipedia", "news", "python-docs", "python-code"]


def bulgarian(folder: Path) -> Path:
    """A text file from what the package gensim carries; it is found, not imported."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise SystemExit("Give --text, or pip install 'secateur[builtin]' for the Bulgarian pages.")
    packed = Path(spec.origin).parent / "test" / "test_data" / "bgwiki-latest-pages-articles-shortened.xml.bz2"
    dump = bz2.decompress(packed.read_bytes()).decode("utf-16")
    pages = [prose(html.unescape(page)) for page in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)]
    documents = [""]
    for paragraph in "\n\n".join(pages).split("\n\n"):
        documents[-1] += f"{paragraph}\n\n"
        if len(documents[-1]) > 600:  # short ones, so that each split has some
            documents.append("")
    path = folder / "bulgarian.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents if text), encoding="utf-8")
    return path


def run(arguments: argparse.Namespace, text: Path) -> list[dict[str, Any]]:
    default = load_recipe(None, arguments.overrides, {"model.name": arguments.model, "method": arguments.method})
    common = {
        "budget.ratio": arguments.ratio,
        "evaluation.text": [str(text), "wikipedia"],
        "evaluation.baseline": None,
        "evaluation.speed": False,
    }
    rows = []
    for name, sources in (("English", ENGLISH), (text.stem, [str(text)])):
        recipe = revise(default, {**common, "calibration.text": sources, "recovery.text": sources})
        model, tokenizer = secateur.load(**recipe.model.model_dump())
        metrics = secateur.prune(model, tokenizer, recipe=recipe).metrics
        states = {
            state: {Path(source).stem: value for source, value in metrics[state]["perplexity"].items()}
            for state in ("dense", "pruned", "recovered")
            if state in metrics
        }
        rows.append({"looked at": name, "ratio": arguments.ratio, "perplexity": states})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each state of each run, a column for each text that was measured."""
    names = list(rows[0]["perplexity"]["dense"])
    lines = [f"| calibration and training on | state | {' | '.join(names)} |", f"| --- | --- |{' ---: |' * len(names)}"]
    for row in rows:
        for state, values in row["perplexity"].items():
            cells = " | ".join(f"{value:.2f}" for value in values.values())
            lines.append(f"| {row['looked at']} | {state} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder, hub id or built-in name")
    parser.add_argument("--text", type=Path, help="UTF-8 text in any language; Bulgarian when left out")
    parser.add_argument("--method", default="lorashear")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    progress.show()
    with tempfile.TemporaryDirectory() as folder:
        print(table(run(arguments, arguments.text or bulgarian(Path(folder)))))


if __name__ == "__main__":
    main()
