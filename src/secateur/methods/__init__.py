"""The methods by name. To add one: its file, its line in ``METHODS``, its test, a recipe, a page in docs/methods."""

from __future__ import annotations

from secateur.methods.base import Decision, Method, PruningTask
from secateur.methods.fisher import Fisher
from secateur.methods.flap import FLAP
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.lorashear import LoRAShear
from secateur.methods.magnitude import Magnitude
from secateur.methods.periods import Period, Periods, PeriodSettings
from secateur.methods.random import Random
from secateur.methods.saliency import Saliency
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.taylor import Taylor
from secateur.methods.transfer import Transfer
from secateur.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "lorashear": LoRAShear,
    "loraprune": LoRAPrune,
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "taylor": Taylor,
    "fisher": Fisher,
    "llm-pruner": LLMPruner,
    "flap": FLAP,
    "shortgpt": ShortGPT,
}
"""Every method by name."""

__all__ = [
    "METHODS",
    "Decision",
    "Method",
    "Period",
    "PeriodSettings",
    "Periods",
    "PruningTask",
    "Saliency",
    "Transfer",
]
