"""The model card: ``README.md`` of a saved folder."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from secateur.export.story import Story, compare_states, widths
from secateur.loading import BUILT_IN
from secateur.pages import markdown_page

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(story: Story) -> str:
    """Markdown with a YAML head: the cut, the numbers, how to load the model, and the recipe that repeats the run."""
    values = {
        "story": story,
        "head": yaml.safe_dump(_head(story), sort_keys=False, allow_unicode=True).strip(),
        "comparison": compare_states(story.metrics),
        "widths": widths(story),
    }
    return markdown_page("secateur.export", "templates/card.md.jinja", values)


def licence_of(base_model: str) -> str | None:
    """Licence of a built-in model, or from the model card in a local folder; None when it is not known."""
    if base_model in BUILT_IN:
        return BUILT_IN[base_model].licence.lower()
    card = Path(base_model).expanduser() / "README.md"
    try:
        head = card.read_text(encoding="utf-8").split("---", 2)[1]
        licence = yaml.safe_load(head).get("license")
    except (OSError, UnicodeDecodeError, IndexError, AttributeError, yaml.YAMLError):
        return None  # no card, or one without a head: then the licence is not known here
    return licence if isinstance(licence, str) else None


def _head(story: Story) -> dict[str, object]:
    head: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "secateur", story.plan.method],
    }
    if story.licence:
        head["license"] = story.licence
    if _HUB_ID.fullmatch(story.plan.base_model) and not Path(story.plan.base_model).exists():
        head["base_model"] = story.plan.base_model
    return head
