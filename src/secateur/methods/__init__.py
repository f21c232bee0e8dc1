"""The methods by name. To add one: its file, its line in ``METHODS``, its test, a recipe, a page in docs/methods.

A method that scores once and cuts once is a line alone: ``one_shot`` of its criterion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur import importance
from secateur.importance import Criterion, criterion_class
from secateur.methods.base import Decision, Method, PruningTask, TextRead
from secateur.methods.bypass import Bypass
from secateur.methods.ddp import DDP
from secateur.methods.evopress import EvoPress
from secateur.methods.flap import FLAP
from secateur.methods.gisp import GISP
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.lorashear import LoRAShear
from secateur.methods.obs import OBS
from secateur.methods.one_shot import one_shot
from secateur.methods.periods import Period, Periods, PeriodSettings
from secateur.methods.saliency import Saliency
from secateur.methods.transfer import Transfer
from secateur.methods.wanda import Wanda
from secateur.plugins import find, source_digest

METHODS: dict[str, type[Method]] = {
    "lorashear": LoRAShear,
    "loraprune": LoRAPrune,
    "ddp": DDP,
    "random": one_shot("random", importance.Random),
    "magnitude": one_shot("magnitude", importance.Magnitude),
    "wanda": Wanda,
    "taylor": one_shot("taylor", importance.Taylor),
    "fisher": one_shot("fisher", importance.Fisher),
    "llm-pruner": LLMPruner,
    "flap": FLAP,
    "obs": OBS,
    "gisp": GISP,
    "evopress": EvoPress,
    "bypass": Bypass,
    "shortgpt": one_shot("shortgpt", importance.BlockInfluence),
}
"""Every method by name."""


def method_class(name: Any) -> type[Method]:
    """The method ``name``: one of ``METHODS``, or ``package.module:Class``; a criterion there is cut by in one shot.

    Raises InputError for any other.
    """
    found: type[Method] | type[Criterion] = find(name, METHODS, Method, Criterion)
    return one_shot(name, found) if issubclass(found, Criterion) else found


def method_source(name: str, settings: Mapping[str, Any]) -> str:
    """``plugins.source_digest`` of a method and of the criteria of one's own in its ``saliency``; empty for secateur's.

    Raises InputError when one of them is not there.
    """
    saliency = settings.get("saliency")
    named = [one for one in saliency if ":" in one] if isinstance(saliency, Mapping) else []
    return source_digest([method_class(name), *map(criterion_class, named)])


__all__ = [
    "METHODS",
    "Decision",
    "Method",
    "Period",
    "PeriodSettings",
    "Periods",
    "PruningTask",
    "Saliency",
    "TextRead",
    "Transfer",
    "method_class",
    "method_source",
    "one_shot",
]
