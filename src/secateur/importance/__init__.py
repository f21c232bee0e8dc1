"""Importance of units: one criterion in each file. To add one, write its file and its line in ``CRITERIA``."""

from __future__ import annotations

from typing import Any

from secateur.importance.base import Criterion
from secateur.importance.block_influence import BlockInfluence
from secateur.importance.fisher import Fisher
from secateur.importance.flap import Fluctuation
from secateur.importance.hesso import HESSO, Hesso
from secateur.importance.llm_pruner import Salience
from secateur.importance.lora import LoRA
from secateur.importance.magnitude import Magnitude
from secateur.importance.random import Random
from secateur.importance.taylor import Taylor
from secateur.importance.wanda import WandaSP
from secateur.plugins import find

CRITERIA: dict[str, type[Criterion]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": WandaSP,
    "flap": Fluctuation,
    "taylor": Taylor,
    "fisher": Fisher,
    "llm-pruner": Salience,
    "block-influence": BlockInfluence,
    "lora": LoRA,
    **{criterion.name: criterion for criterion in HESSO},
}
"""Every criterion by name. Its fields are its options."""


def criterion_class(name: Any) -> type[Criterion]:
    """The criterion ``name``, one of ``CRITERIA`` or ``package.module:Class``; InputError for any other."""
    return find(name, CRITERIA, Criterion)


__all__ = [
    "CRITERIA",
    "BlockInfluence",
    "Criterion",
    "Fisher",
    "Fluctuation",
    "Hesso",
    "LoRA",
    "Magnitude",
    "Random",
    "Salience",
    "Taylor",
    "WandaSP",
    "criterion_class",
]
