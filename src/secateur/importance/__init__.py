"""How much each unit matters: one criterion a file. To add one, write the file and its line in ``CRITERIA``."""

from __future__ import annotations

from secateur.importance.activation import Activation
from secateur.importance.adapters import Adapters
from secateur.importance.base import Criterion
from secateur.importance.fisher import Fisher
from secateur.importance.hesso import HESSO, Hesso
from secateur.importance.magnitude import Magnitude
from secateur.importance.random import Random
from secateur.importance.taylor import Taylor

CRITERIA: dict[str, Criterion] = {
    "random": Random(),
    "magnitude": Magnitude(),
    "wanda": Activation(),
    "taylor": Taylor(),
    "fisher": Fisher(),
    "lora": Adapters(),
    **{criterion.name: criterion for criterion in HESSO},
}
"""Every criterion by name, with its default options."""

__all__ = ["CRITERIA", "Activation", "Adapters", "Criterion", "Fisher", "Hesso", "Magnitude", "Random", "Taylor"]
