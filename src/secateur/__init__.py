"""secateur: prune whole structures from language models, guided by LoRA, and recover the lost knowledge.

The names below are the public interface. They are imported at their first use, because ``import secateur`` must be
fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.config import Recipe, load_recipe
    from secateur.errors import SecateurError
    from secateur.loading import load
    from secateur.pipeline import apply_plan, prune, prune_ratios
    from secateur.planning import Budget
    from secateur.stages import Result, save
    from secateur.surgery import checked_trace as trace
    from secateur.types import DependencyGraph, PruningPlan

    __version__: str

_HOMES = {
    "Budget": "planning.Budget",
    "DependencyGraph": "types.DependencyGraph",
    "PruningPlan": "types.PruningPlan",
    "Recipe": "config.Recipe",
    "Result": "stages.Result",
    "SecateurError": "errors.SecateurError",
    "apply_plan": "pipeline.apply_plan",
    "load": "loading.load",
    "load_recipe": "config.load_recipe",
    "prune": "pipeline.prune",
    "prune_ratios": "pipeline.prune_ratios",
    "save": "stages.save",
    "trace": "surgery.checked_trace",
}

__all__ = [
    "Budget",
    "DependencyGraph",
    "PruningPlan",
    "Recipe",
    "Result",
    "SecateurError",
    "__version__",
    "apply_plan",
    "load",
    "load_recipe",
    "prune",
    "prune_ratios",
    "save",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("secateur")
    if name in _HOMES:
        room, _, offered = _HOMES[name].partition(".")
        return getattr(importlib.import_module(f"secateur.{room}"), offered)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
