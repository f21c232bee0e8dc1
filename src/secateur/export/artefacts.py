"""The artefacts beside the model in a finished folder: recipe, graph, plan, scores, numbers and log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secateur.errors import InputError
from secateur.export.card import model_card
from secateur.export.huggingface import ARTEFACTS
from secateur.export.report import html_report
from secateur.export.story import Story
from secateur.export.sums import SUMS, write_sums
from secateur.types import Scores


def write_artefacts(folder: Path, story: Story, scores: Scores | None, events: Sequence[Mapping[str, Any]]) -> None:
    """Write the model card into ``folder``, and recipe, graph, plan, scores, numbers, log and report below it.

    The last file contains the checksums of everything in ``folder``."""
    artefacts = folder / ARTEFACTS
    (artefacts / "recipe.yaml").write_text(story.recipe)
    (artefacts / "graph.json").write_text(json.dumps(story.graph.to_json()) + "\n")
    (artefacts / "metrics.json").write_text(json.dumps(story.metrics, indent=1) + "\n")
    (artefacts / "run.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    story.plan.save(artefacts / "plan.json")
    if scores is not None:
        scores.save(artefacts / "scores.safetensors")
    (folder / "README.md").write_text(model_card(story))
    (artefacts / "report.html").write_text(html_report(story))
    write_sums(folder, artefacts / SUMS)


def read_scores(folder: Path) -> Scores:
    """The scores in the folder of a finished run. Raises InputError when it has none, or they are damaged."""
    file = folder / ARTEFACTS / "scores.safetensors"
    if not file.is_file():
        raise InputError(
            f"{folder} has no scores ({file} is missing). Give the output folder of a finished run of `secateur prune` "
            "whose method scores units, in one round (budget.rounds)."
        )
    try:
        return Scores.load(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}. Give the folder of another run.") from error
